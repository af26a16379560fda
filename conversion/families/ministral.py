"""Ministral: Llama with windows in some layers; Ministral 3: a query scale that grows with the position."""

from ..config_map import Computed, LayerTypes, RopeParameters, Same
from ..errors import ConversionError
from ..family import Family
from ._common import (
    DROPOUT,
    HEAD_DIM,
    KV_HEADS,
    LLAMA_BLOCK,
    LLAMA_WEIGHTS,
    NULLABLE_HEAD_DIM,
    RMS_EPS,
    SIZES,
    WHOLE_ROPE,
    WHOLE_WINDOW,
)


def _query_scale(native):
    """The class has no form without the scale."""
    missing = [
        name
        for name in ("llama_4_scaling_beta", "original_max_position_embeddings")
        if native["rope_parameters"].get(name) is None
    ]
    if missing:
        raise ConversionError(
            f"`rope_parameters` has no {' and '.join(missing)}, which the native class needs. Add it; "
            "`llama_4_scaling_beta` 0.0 scales nothing."
        )
    return {}


FAMILIES = (
    Family(
        model_type="ministral",
        config=(
            SIZES, KV_HEADS, NULLABLE_HEAD_DIM, RMS_EPS, DROPOUT, *LLAMA_BLOCK, WHOLE_ROPE, LayerTypes(window=4096),
            Same("hidden_act"),
        ),
        weights=LLAMA_WEIGHTS,
    ),
    Family(
        model_type="ministral3",
        config=(
            SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, DROPOUT, *LLAMA_BLOCK, WHOLE_WINDOW, Same("hidden_act"),
            RopeParameters(partial=False, per_layer_type=False, reads=("llama_4_scaling_beta",)),
            Computed((), _query_scale, lambda fields: {}),
        ),
        weights=LLAMA_WEIGHTS,
    ),
)  # fmt: skip
