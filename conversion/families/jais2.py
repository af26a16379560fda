"""Jais 2: Llama's attention, LayerNorms and an ungated squared ReLU."""

from ..config_map import Renamed, Same
from ..family import Family
from ._common import (
    ATTENTION,
    DROPOUT,
    EMBEDDINGS_AND_HEAD,
    HEAD_DIM,
    KV_HEADS,
    LAYERNORM_BLOCK,
    ONE_ATTENTION_BIAS,
    PRE_NORMS,
    SIZES,
    UNGATED_FFN,
    WHOLE_ROPE,
)


FAMILIES = (
    Family(
        model_type="jais2",
        config=(
            SIZES, KV_HEADS, HEAD_DIM, DROPOUT, ONE_ATTENTION_BIAS, LAYERNORM_BLOCK, WHOLE_ROPE,
            Same("hidden_act", "mlp_bias"),
            Renamed("layer_norm_eps", "norm_eps"),
        ),
        weights=(*EMBEDDINGS_AND_HEAD, *ATTENTION, *UNGATED_FFN, *PRE_NORMS),
    ),
)  # fmt: skip
