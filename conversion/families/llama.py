"""Llama 1 to 3: pre-RMSNorm, SwiGLU, rotary halves; and the types that transformers runs with Llama's classes."""

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


FAMILIES = tuple(
    Family(
        model_type=model_type,
        config=(
            SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, DROPOUT, *LLAMA_BLOCK, WHOLE_ROPE,
            Same("hidden_act", "mlp_bias"), ONE_ATTENTION_BIAS,
        ),
        weights=LLAMA_WEIGHTS,
    )
    for model_type in ("llama", "internlm3", "iquestcoder", "exaone")
)  # fmt: skip
