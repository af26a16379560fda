"""CWM: Llama 3 with windows in most layers."""

from ..config_map import LayerTypes, Same
from ..family import Family
from ._common import DROPOUT, HEAD_DIM, KV_HEADS, LLAMA_BLOCK, LLAMA_WEIGHTS, RMS_EPS, SIZES, WHOLE_ROPE


FAMILIES = (
    Family(
        model_type="cwm",
        config=(
            SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, DROPOUT, *LLAMA_BLOCK, WHOLE_ROPE, LayerTypes(window=8192),
            Same("hidden_act", "mlp_bias"),
        ),
        weights=LLAMA_WEIGHTS,
    ),
)  # fmt: skip
