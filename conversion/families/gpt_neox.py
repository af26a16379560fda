"""GPT-NeoX and Pythia: two LayerNorms, branches side by side or in sequence, partial rotation, fused q, k and v."""

from ..config_map import Computed, Fixed, Mapped, PartialRopeParameters, Renamed, Same
from ..family import Family
from ..rules import Rule
from ._common import (
    DROPOUT,
    FUSED_GRADIENT,
    FUSED_PRODUCT,
    LAYERNORM_BLOCK,
    NO_PADDING_ROW,
    ONE_ATTENTION_BIAS,
    QKV_BY_HEAD,
    SIZES,
    fused_qkv,
)


LAYER = "gpt_neox.layers.{layer}."

FAMILIES = (
    Family(
        model_type="gpt_neox",
        config=(
            SIZES, DROPOUT, ONE_ATTENTION_BIAS, LAYERNORM_BLOCK, NO_PADDING_ROW, PartialRopeParameters(),
            Same("hidden_act"), Renamed("classifier_dropout", "token_classifier_dropout"),
            Renamed("layer_norm_eps", "norm_eps"),
            Mapped("use_parallel_residual", "parallel_block", {True: "two_norms", False: "none"}),
            Computed(
                ("hidden_dropout",),
                lambda native: dict.fromkeys(("embedding_dropout", "residual_dropout"), native["hidden_dropout"]),
                lambda fields: {"hidden_dropout": fields["residual_dropout"]},
            ),
            Fixed(mlp_bias=True, mlp_output_bias=True),
        ),
        weights=(
            Rule("gpt_neox.embed_in.weight", "model.embed_tokens.weight"),
            fused_qkv(LAYER + "attention.query_key_value", QKV_BY_HEAD),
            Rule(LAYER + "attention.dense.{leaf}", "model.layers.{layer}.self_attn.o_proj.{leaf}"),
            Rule(LAYER + "mlp.dense_h_to_4h.{leaf}", "model.layers.{layer}.mlp.up_proj.{leaf}"),
            Rule(LAYER + "mlp.dense_4h_to_h.{leaf}", "model.layers.{layer}.mlp.down_proj.{leaf}"),
            Rule(LAYER + "input_layernorm.{leaf}", "model.layers.{layer}.self_attn_pre_norm.{leaf}"),
            Rule(LAYER + "post_attention_layernorm.{leaf}", "model.layers.{layer}.mlp_pre_norm.{leaf}"),
            Rule("gpt_neox.final_layer_norm.{leaf}", "model.norm.{leaf}"),
            Rule("lm_head.{leaf}", "lm_head.{leaf}"),
        ),
        deviations=(FUSED_PRODUCT, FUSED_GRADIENT),
        head_weights={"token_classification": (Rule("classifier.{leaf}", "score.{leaf}"),)},
    ),
)  # fmt: skip
