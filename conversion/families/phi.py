"""Phi 1 and 2: one LayerNorm for attention and feed-forward side by side, partial rotation, biases everywhere."""

from ..config_map import Computed, Fixed, PartialRopeParameters, Renamed, Same
from ..family import Family
from ..rules import Rule
from ._common import (
    ALL_BIASES,
    DROPOUT,
    KV_HEADS,
    LAYERNORM_BLOCK,
    SIZES,
    UNDECLARED_HEAD_DIM,
)


LAYER = "model.layers.{layer}."

FAMILIES = (
    Family(
        model_type="phi",
        config=(
            SIZES, KV_HEADS, UNDECLARED_HEAD_DIM, DROPOUT, LAYERNORM_BLOCK, ALL_BIASES, PartialRopeParameters(),
            Same("hidden_act"),
            Renamed("layer_norm_eps", "norm_eps"),
            Renamed("resid_pdrop", "residual_dropout"),
            Renamed("embd_pdrop", "embedding_dropout"),
            Computed(
                ("qk_layernorm",),
                lambda native: {
                    "qk_norm": "head" if native["qk_layernorm"] else "none",
                    "heads_first_from": "norm" if native["qk_layernorm"] else "rotation",
                },
                lambda fields: {"qk_layernorm": fields["qk_norm"] != "none"},
            ),
            Fixed(parallel_block="shared_norm", lm_head_bias=True),
        ),
        weights=(
            Rule("model.embed_tokens.weight", "model.embed_tokens.weight"),
            *(
                Rule(LAYER + f"self_attn.{name}.{{leaf}}", LAYER + f"self_attn.{name}.{{leaf}}")
                for name in ("q_proj", "k_proj", "v_proj")
            ),
            Rule(LAYER + "self_attn.dense.{leaf}", LAYER + "self_attn.o_proj.{leaf}"),
            Rule(LAYER + "self_attn.q_layernorm.{leaf}", LAYER + "self_attn.q_norm.{leaf}"),
            Rule(LAYER + "self_attn.k_layernorm.{leaf}", LAYER + "self_attn.k_norm.{leaf}"),
            Rule(LAYER + "mlp.fc1.{leaf}", LAYER + "mlp.up_proj.{leaf}"),
            Rule(LAYER + "mlp.fc2.{leaf}", LAYER + "mlp.down_proj.{leaf}"),
            Rule(LAYER + "input_layernorm.{leaf}", LAYER + "self_attn_pre_norm.{leaf}"),
            Rule("model.final_layernorm.{leaf}", "model.norm.{leaf}"),
            Rule("lm_head.{leaf}", "lm_head.{leaf}"),
        ),
    ),
)  # fmt: skip
