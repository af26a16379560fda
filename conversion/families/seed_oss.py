"""Seed-OSS: Llama with a bias flag of its own for the output projection, and residual dropout."""

from ..config_map import Renamed, Same
from ..family import Family
from ._common import DROPOUT, HEAD_DIM, KV_HEADS, LLAMA_BLOCK, LLAMA_WEIGHTS, RMS_EPS, SIZES, WHOLE_ROPE


FAMILIES = (
    Family(
        model_type="seed_oss",
        config=(
            SIZES, KV_HEADS, HEAD_DIM, RMS_EPS, DROPOUT, *LLAMA_BLOCK, WHOLE_ROPE,
            Same("hidden_act", "mlp_bias", "attention_bias", "residual_dropout"),
            Renamed("attention_out_bias", "attention_output_bias"),
        ),
        weights=LLAMA_WEIGHTS,
    ),
)  # fmt: skip
