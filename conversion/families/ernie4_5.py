"""ERNIE 4.5: Llama with pairs rotated in float32, and one flag for every bias."""

from ..config_map import Computed, Fixed, Same
from ..family import Family
from ._common import HEAD_DIM, KV_HEADS, LLAMA_BLOCK, LLAMA_WEIGHTS, RMS_EPS, SIZES, WHOLE_ROPE


BIASES = ("attention_bias", "attention_output_bias", "mlp_bias", "mlp_output_bias")

FAMILIES = (
    Family(
        model_type="ernie4_5",
        config=(
            SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, *LLAMA_BLOCK, WHOLE_ROPE, Same("hidden_act"),
            Fixed(rope_interleaved=True, rope_in_float32=True, rope_table_in_float32=True),
            Computed(
                ("use_bias",),
                lambda native: dict.fromkeys(BIASES, bool(native["use_bias"])),
                lambda fields: {"use_bias": fields["attention_bias"]},
                kept=("use_bias",),
            ),
        ),
        weights=LLAMA_WEIGHTS,
    ),
)  # fmt: skip
