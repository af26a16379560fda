"""Llama 1 to 3: pre-RMSNorm, SwiGLU, rotary halves."""

from ..config_map import Computed, Irrelevant, RopeParameters, Same
from ..family import Family
from ._common import DROPOUT, HEAD_DIM, KV_HEADS, LLAMA_BLOCK, LLAMA_WEIGHTS, RMS_EPS, SIZES


FAMILIES = (
    Family(
        model_type="llama",
        config=(
            SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, DROPOUT, *LLAMA_BLOCK, RopeParameters(),
            Same("hidden_act", "mlp_bias"),
            # One flag for all four projections.
            Computed(
                ("attention_bias",),
                lambda native: {
                    "attention_bias": native["attention_bias"],
                    "attention_output_bias": native["attention_bias"],
                },
                lambda fields: {"attention_bias": fields["attention_bias"]},
            ),
            Irrelevant("pretraining_tp", "how the original weights were sharded; the class no longer reads it"),
        ),
        weights=LLAMA_WEIGHTS,
    ),
)  # fmt: skip
