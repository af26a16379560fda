"""GLM and GLM-4: pre- or sandwich RMSNorm, partial rotation of pairs, gate and up projection in one matrix."""

from ..config_map import Fixed, PartialRopeParameters, Same
from ..family import Family
from ..rules import Rule
from ._common import (
    ATTENTION,
    DROPOUT,
    EMBEDDINGS_AND_HEAD,
    FUSED_GRADIENT,
    HEAD_DIM,
    KV_HEADS,
    PRE_NORMS,
    RMS_EPS,
    SIZES,
    fused_gate_up,
    layer_norms,
)


CONFIG = (
    SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, DROPOUT, PartialRopeParameters(),
    Same("hidden_act", "attention_bias"),
    Fixed(
        norm_type="rmsnorm", norm_casting_mode="llama", ffn_type="glu", attention_output_bias=False,
        fused_gate_up=True, rope_interleaved=True,
    ),
)  # fmt: skip

WEIGHTS = (
    *EMBEDDINGS_AND_HEAD, *ATTENTION, *PRE_NORMS,
    fused_gate_up("model.layers.{layer}.mlp.gate_up_proj"),
    Rule("model.layers.{layer}.mlp.down_proj.weight", "model.layers.{layer}.mlp.down_proj.weight"),
)  # fmt: skip

FAMILIES = (
    Family(
        model_type="glm",
        config=(*CONFIG, Fixed(norm_placement="pre")),
        weights=WEIGHTS,
        deviations=(FUSED_GRADIENT,),
    ),
    Family(
        model_type="glm4",
        config=(*CONFIG, Fixed(norm_placement="sandwich")),
        weights=(
            *WEIGHTS,
            *layer_norms(self_attn_branch_norm="post_self_attn_layernorm", mlp_branch_norm="post_mlp_layernorm"),
        ),
        deviations=(FUSED_GRADIENT,),
    ),
)
