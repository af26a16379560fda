"""StarCoder 2: Llama's attention in blocks with LayerNorms and an ungated network, with one window for all layers."""

from ..config_map import Computed, Renamed, Same
from ..family import Family
from ..rules import Rule
from ._common import (
    ATTENTION,
    DROPOUT,
    EMBEDDINGS_AND_HEAD,
    KV_HEADS,
    LAYERNORM_BLOCK,
    PRE_NORMS,
    SIZES,
    UNDECLARED_HEAD_DIM,
    WHOLE_ROPE,
    WHOLE_WINDOW,
)


LAYER = "model.layers.{layer}.mlp."
BIASES = ("attention_bias", "attention_output_bias", "mlp_bias", "mlp_output_bias")

FAMILIES = (
    Family(
        model_type="starcoder2",
        config=(
            SIZES, KV_HEADS, UNDECLARED_HEAD_DIM, DROPOUT, LAYERNORM_BLOCK, WHOLE_ROPE, WHOLE_WINDOW,
            Same("hidden_act", "residual_dropout", "embedding_dropout"),
            Renamed("norm_epsilon", "norm_eps"),
            Computed(
                ("use_bias",),
                lambda native: dict.fromkeys(BIASES, native["use_bias"]),
                lambda fields: {"use_bias": fields["attention_bias"]},
            ),
        ),
        weights=(
            *EMBEDDINGS_AND_HEAD, *ATTENTION, *PRE_NORMS,
            Rule(LAYER + "c_fc.{leaf}", LAYER + "up_proj.{leaf}"),
            Rule(LAYER + "act.{leaf}", LAYER + "act_fn.{leaf}"),
            Rule(LAYER + "c_proj.{leaf}", LAYER + "down_proj.{leaf}"),
        ),
    ),
)  # fmt: skip
