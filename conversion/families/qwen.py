"""Qwen 2 and 3: Llama with windows in some layers; biases on queries, keys and values (2), or a norm per head (3)."""

from ..config_map import Fixed, Same
from ..family import Family
from ._common import (
    DROPOUT,
    HEAD_DIM,
    KV_HEADS,
    LLAMA_BLOCK,
    LLAMA_WEIGHTS,
    ONE_ATTENTION_BIAS,
    QK_NORM,
    RMS_EPS,
    SIZES,
    SWITCHED_WINDOW,
    UNDECLARED_HEAD_DIM,
    WHOLE_ROPE,
)


QWEN = (SIZES, KV_HEADS, RMS_EPS, DROPOUT, *LLAMA_BLOCK, WHOLE_ROPE, Same("hidden_act"), *SWITCHED_WINDOW)

FAMILIES = (
    Family(
        model_type="qwen2",
        config=(
            *QWEN, UNDECLARED_HEAD_DIM, Fixed(attention_bias=True, attention_output_bias=False),
        ),
        weights=LLAMA_WEIGHTS,
    ),
    Family(
        model_type="qwen3",
        config=(*QWEN, HEAD_DIM, ONE_ATTENTION_BIAS, Fixed(qk_norm="head")),
        weights=LLAMA_WEIGHTS + QK_NORM,
    ),
)  # fmt: skip
