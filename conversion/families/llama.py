"""Llama 1 to 3: pre-RMSNorm, SwiGLU, rotary halves."""

from ..config_map import Same
from ..family import Family
from ._common import (
    DROPOUT,
    HEAD_DIM,
    KV_HEADS,
    LLAMA_BLOCK,
    LLAMA_WEIGHTS,
    ONE_ATTENTION_BIAS,
    RMS_EPS,
    SIZES,
    WHOLE_ROPE,
)


FAMILIES = (
    Family(
        model_type="llama",
        config=(
            SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, DROPOUT, *LLAMA_BLOCK, WHOLE_ROPE,
            Same("hidden_act", "mlp_bias"), ONE_ATTENTION_BIAS,
        ),
        weights=LLAMA_WEIGHTS,
    ),
)  # fmt: skip
