"""Mistral: Llama without biases, with one window for all layers."""

from ..config_map import Same
from ..family import Family
from ._common import (
    DROPOUT,
    HEAD_DIM,
    KV_HEADS,
    LLAMA_BLOCK,
    LLAMA_WEIGHTS,
    RMS_EPS,
    SIZES,
    WHOLE_ROPE,
    WHOLE_WINDOW,
)


FAMILIES = (
    Family(
        model_type="mistral",
        config=(
            SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, DROPOUT, *LLAMA_BLOCK, WHOLE_ROPE, Same("hidden_act"), WHOLE_WINDOW,
        ),
        weights=LLAMA_WEIGHTS,
    ),
)  # fmt: skip
