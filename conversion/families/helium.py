"""Helium: Llama with pairs rotated, norm weights applied in float32, and a square output projection."""

import math

from ..config_map import Computed, Fixed, Same
from ..errors import ConversionError
from ..family import Family
from ._common import DROPOUT, HEAD_DIM, KV_HEADS, LLAMA_WEIGHTS, RMS_EPS, SIZES, WHOLE_ROPE


def _square_output(native):
    """The output projection is square, and the scaling a quotient."""
    width = native["num_attention_heads"] * native["head_dim"]
    if width != native["hidden_size"]:
        raise ConversionError(
            f"`num_attention_heads` x `head_dim` is {width} and `hidden_size` {native['hidden_size']}, but the native "
            "class projects the attention's output with a square matrix. Make them equal."
        )
    return {"attention_scaling": 1 / math.sqrt(native["head_dim"])}


FAMILIES = (
    Family(
        model_type="helium",
        config=(
            SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, DROPOUT, WHOLE_ROPE, Same("hidden_act", "attention_bias", "mlp_bias"),
            Fixed(
                norm_type="rmsnorm", norm_casting_mode="gemma", norm_placement="pre", ffn_type="glu",
                rope_interleaved=True, attention_output_bias=False,
            ),
            Computed((), _square_output, lambda fields: {}),
        ),
        weights=LLAMA_WEIGHTS,
    ),
)  # fmt: skip
