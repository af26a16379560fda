"""Arcee AFM: Llama's attention with an ungated feed-forward network."""

from ..config_map import Same
from ..family import Family
from ._common import (
    ATTENTION,
    DROPOUT,
    EMBEDDINGS_AND_HEAD,
    HEAD_DIM,
    KV_HEADS,
    ONE_ATTENTION_BIAS,
    PRE_NORMS,
    RMS_EPS,
    SIZES,
    UNGATED_BLOCK,
    UNGATED_FFN,
    WHOLE_ROPE,
)


FAMILIES = (
    Family(
        model_type="arcee",
        config=(
            SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, DROPOUT, *UNGATED_BLOCK, WHOLE_ROPE, ONE_ATTENTION_BIAS,
            Same("hidden_act", "mlp_bias"),
        ),
        weights=EMBEDDINGS_AND_HEAD + ATTENTION + UNGATED_FFN + PRE_NORMS,
    ),
)  # fmt: skip
