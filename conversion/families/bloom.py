"""BLOOM: ALiBi counted over real tokens, normed embeddings, tanh GELU and one QKV projection interleaved by head."""

from ..config_map import Computed, Fixed, Renamed, Same
from ..errors import ConversionError
from ..family import Deviation, Family
from ..rules import Rule
from ._common import (
    ALL_BIASES,
    FUSED_GRADIENT,
    FUSED_PRODUCT,
    LAYERNORM_BLOCK,
    NO_PADDING_ROW,
    QKV_BY_HEAD,
    fourfold_ffn,
    fused_qkv,
)


TRAINED_IN_PARTS = ("pretraining_tp", "slow_but_exact")


def _slow_but_exact(native):
    if native["slow_but_exact"] and native["pretraining_tp"] > 1:
        raise ConversionError(
            "`slow_but_exact` is True with a `pretraining_tp` above 1, where the native class sums slices of the "
            "output projections and leaves their biases out. Set `slow_but_exact` to False."
        )
    return {}


FAMILIES = (
    Family(
        model_type="bloom",
        config=(
            Same("vocab_size", "hidden_size", "attention_dropout"),
            Renamed("n_layer", "num_hidden_layers"),
            Renamed("n_head", "num_attention_heads"),
            Renamed("layer_norm_epsilon", "norm_eps"),
            Renamed("hidden_dropout", "residual_dropout"),
            Renamed("apply_residual_connection_post_layernorm", "residual_from_norm"),
            LAYERNORM_BLOCK, ALL_BIASES, NO_PADDING_ROW, fourfold_ffn("hidden_size"),
            Fixed(
                embedding_norm=True, hidden_act="gelu_fast", position_embedding_type="alibi",
                alibi_form="key_position", attention_score_form="biased",
            ),
            Computed(TRAINED_IN_PARTS, _slow_but_exact, lambda fields: {}, kept=TRAINED_IN_PARTS),
        ),
        weights=(
            Rule("transformer.word_embeddings.weight", "model.embed_tokens.weight"),
            Rule("transformer.word_embeddings_layernorm.{leaf}", "model.embedding_norm.{leaf}"),
            Rule("transformer.h.{layer}.input_layernorm.{leaf}", "model.layers.{layer}.self_attn_pre_norm.{leaf}"),
            fused_qkv("transformer.h.{layer}.self_attention.query_key_value", QKV_BY_HEAD),
            Rule("transformer.h.{layer}.self_attention.dense.{leaf}", "model.layers.{layer}.self_attn.o_proj.{leaf}"),
            Rule("transformer.h.{layer}.post_attention_layernorm.{leaf}", "model.layers.{layer}.mlp_pre_norm.{leaf}"),
            Rule("transformer.h.{layer}.mlp.dense_h_to_4h.{leaf}", "model.layers.{layer}.mlp.up_proj.{leaf}"),
            Rule("transformer.h.{layer}.mlp.dense_4h_to_h.{leaf}", "model.layers.{layer}.mlp.down_proj.{leaf}"),
            Rule("transformer.ln_f.{leaf}", "model.norm.{leaf}"),
            Rule("lm_head.weight", "lm_head.weight"),
        ),
        head_weights={"token_classification": (Rule("classifier.{leaf}", "score.{leaf}"),)},
        deviations=(
            FUSED_PRODUCT, FUSED_GRADIENT,
            Deviation(
                "the native GELU has a gradient of its own, a formula with constants of ten digits",
                gradients_only=True,
            ),
        ),
    ),
)  # fmt: skip
