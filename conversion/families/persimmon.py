"""Persimmon: LayerNorms, also on heads of queries and keys, partial rotation, ungated squared ReLU."""

from ..config_map import Fixed, Mapped, PartialRopeParameters, Renamed, Same
from ..family import Family
from ..rules import Rule
from ._common import (
    ALL_BIASES,
    DROPOUT,
    FUSED_GRADIENT,
    FUSED_PRODUCT,
    LAYERNORM_BLOCK,
    PRE_NORMS,
    QKV_BY_HEAD,
    SIZES,
    fused_qkv,
)


LAYER = "model.layers.{layer}."

FAMILIES = (
    Family(
        model_type="persimmon",
        config=(
            SIZES, DROPOUT, LAYERNORM_BLOCK, ALL_BIASES, PartialRopeParameters(),
            Same("hidden_act"),
            Renamed("layer_norm_eps", "norm_eps"),
            Renamed("hidden_dropout", "residual_dropout"),
            Mapped("qk_layernorm", "qk_norm", {True: "head", False: "none"}),
            Fixed(attention_residual_dropout=False),
        ),
        weights=(
            Rule("model.embed_tokens.weight", "model.embed_tokens.weight"),
            fused_qkv(LAYER + "self_attn.query_key_value", QKV_BY_HEAD),
            Rule(LAYER + "self_attn.dense.{leaf}", LAYER + "self_attn.o_proj.{leaf}"),
            Rule(LAYER + "self_attn.q_layernorm.{leaf}", LAYER + "self_attn.q_norm.{leaf}"),
            Rule(LAYER + "self_attn.k_layernorm.{leaf}", LAYER + "self_attn.k_norm.{leaf}"),
            Rule(LAYER + "mlp.dense_h_to_4h.{leaf}", LAYER + "mlp.up_proj.{leaf}"),
            Rule(LAYER + "mlp.dense_4h_to_h.{leaf}", LAYER + "mlp.down_proj.{leaf}"),
            *PRE_NORMS,
            Rule("model.final_layernorm.{leaf}", "model.norm.{leaf}"),
            Rule("lm_head.{leaf}", "lm_head.{leaf}"),
        ),
        deviations=(FUSED_PRODUCT, FUSED_GRADIENT),
    ),
)  # fmt: skip
