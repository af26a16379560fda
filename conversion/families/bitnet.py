"""BitNet: Llama with a norm before the output projection and one inside the feed-forward network."""

from ..config_map import Fixed, Same
from ..family import Family
from ..rules import Rule
from ._common import (
    DROPOUT,
    KV_HEADS,
    LLAMA_BLOCK,
    LLAMA_WEIGHTS,
    ONE_ATTENTION_BIAS,
    RMS_EPS,
    SIZES,
    UNDECLARED_HEAD_DIM,
    WHOLE_ROPE,
)


LAYER = "model.layers.{layer}."

FAMILIES = (
    Family(
        model_type="bitnet",
        config=(
            SIZES, KV_HEADS, UNDECLARED_HEAD_DIM, RMS_EPS, DROPOUT, *LLAMA_BLOCK, WHOLE_ROPE, ONE_ATTENTION_BIAS,
            Same("hidden_act"), Fixed(attention_sub_norm=True, ffn_sub_norm=True),
        ),
        weights=(
            *LLAMA_WEIGHTS,
            Rule(LAYER + "self_attn.attn_sub_norm.{leaf}", LAYER + "self_attn.sub_norm.{leaf}"),
            Rule(LAYER + "mlp.ffn_sub_norm.{leaf}", LAYER + "mlp.sub_norm.{leaf}"),
        ),
    ),
)  # fmt: skip
