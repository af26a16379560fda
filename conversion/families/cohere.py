"""Command R and Command R7B: parallel blocks with one LayerNorm without bias, rotation of pairs in float32."""

from ..config_map import Computed, Fixed, LayerTypes, Mapped, Renamed, Same
from ..family import Family
from ._common import (
    ATTENTION,
    DROPOUT,
    EMBEDDINGS_AND_HEAD,
    GATED_FFN,
    HEAD_DIM,
    KV_HEADS,
    ONE_ATTENTION_BIAS,
    QK_NORM,
    SIZES,
    UNDECLARED_HEAD_DIM,
    WHOLE_ROPE,
    layer_norms,
)


CONFIG = (
    SIZES, KV_HEADS, DROPOUT, ONE_ATTENTION_BIAS, WHOLE_ROPE,
    Same("hidden_act", "logit_scale"),
    Renamed("layer_norm_eps", "norm_eps"),
    Fixed(
        norm_type="layernorm", norm_bias=False, norm_casting_mode="gemma", norm_placement="pre", ffn_type="glu",
        parallel_block="shared_norm", parallel_sum_order="residual_first", rope_interleaved=True, rope_in_float32=True,
    ),
)  # fmt: skip

WEIGHTS = (*EMBEDDINGS_AND_HEAD, *ATTENTION, *GATED_FFN, *layer_norms(self_attn_pre_norm="input_layernorm"))

FAMILIES = (
    Family(
        model_type="cohere",
        config=(
            *CONFIG, UNDECLARED_HEAD_DIM,
            Mapped("use_qk_norm", "qk_norm", {True: "per_head", False: "none"}),
        ),
        weights=(*WEIGHTS, *QK_NORM),
    ),
    Family(
        model_type="cohere2",
        config=(
            *CONFIG, HEAD_DIM, LayerTypes(window=4096),
            # Only layers with a window rotate; no key says so.
            Computed(
                (),
                lambda native: {
                    "no_rope_layers": [int(kind == "sliding_attention") for kind in native["layer_types"]]
                },
                lambda fields: {},
            ),
        ),
        weights=WEIGHTS,
    ),
)  # fmt: skip
