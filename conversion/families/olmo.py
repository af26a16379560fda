"""OLMo 1 to 3: norms without weights, then norms on branches and over all heads of queries and keys, then windows."""

from ..config_map import Fixed, LayerTypes, NestedRopeParameters, Same
from ..family import Family
from ._common import (
    ATTENTION,
    DROPOUT,
    EMBEDDINGS_AND_HEAD,
    GATED_FFN,
    KV_HEADS,
    ONE_ATTENTION_BIAS,
    QK_NORM,
    RMS_EPS,
    SIZES,
    UNDECLARED_HEAD_DIM,
    WHOLE_ROPE,
    layer_norms,
)


SHARED = (
    SIZES, KV_HEADS, UNDECLARED_HEAD_DIM, DROPOUT, ONE_ATTENTION_BIAS, Same("hidden_act"),
    Fixed(ffn_type="glu", rope_in_float32=True, rope_table_in_float32=True),
)  # fmt: skip

OLMO2 = (
    *SHARED, RMS_EPS,
    Fixed(norm_type="rmsnorm", norm_casting_mode="gemma", norm_placement="branch", qk_norm="full"),
)  # fmt: skip
OLMO2_WEIGHTS = (
    *EMBEDDINGS_AND_HEAD, *ATTENTION, *QK_NORM, *GATED_FFN,
    *layer_norms(self_attn_branch_norm="post_attention_layernorm", mlp_branch_norm="post_feedforward_layernorm"),
)  # fmt: skip

FAMILIES = (
    Family(
        model_type="olmo",
        config=(
            *SHARED, WHOLE_ROPE, Same("clip_qkv"),
            Fixed(
                norm_type="layernorm", norm_affine=False, norm_eps=1e-5, norm_casting_mode="gemma",
                norm_placement="pre",
            ),
        ),
        weights=(*EMBEDDINGS_AND_HEAD, *ATTENTION, *GATED_FFN),
    ),
    Family(model_type="olmo2", config=(*OLMO2, WHOLE_ROPE), weights=OLMO2_WEIGHTS),
    Family(
        model_type="olmo3",
        config=(
            *OLMO2, NestedRopeParameters("full_attention", "sliding_attention"), LayerTypes(window=4096),
        ),
        weights=OLMO2_WEIGHTS,
    ),
)  # fmt: skip
