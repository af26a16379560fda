"""What CTranslate2's kernels lack, by the field that asks for it, and the fields that its loader takes."""

import math
from collections.abc import Iterator

from ....model.configuration_variant import VariantConfig
from ....model.configuration_variant_seq2seq import VariantSeq2SeqConfig
from ...errors import Refusal
from ..fields import Lack, in_the_way, others_in_the_way
from .kernels import activation_of


# What `spec` and `vocabulary` turn into weights, arguments and tokens.
TAKEN = frozenset(
    {
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "num_key_value_heads", "head_dim", "max_position_embeddings",
        "norm_type", "norm_eps", "norm_affine", "norm_bias", "norm_unit_offset",
        "norm_placement", "parallel_block", "final_norm", "embedding_norm", "residual_multiplier", "learned_scale_type",
        "ffn_type", "hidden_act", "mlp_bias", "mlp_output_bias",
        "attention_bias", "attention_output_bias", "qk_norm", "qk_norm_type", "qk_norm_affine", "qk_norm_bias",
        "attention_scaling", "scale_attn_by_inverse_layer_idx", "is_causal", "add_cross_attention",
        "cross_attention_hidden_size", "layer_types",
        "position_embedding_type", "rope_parameters", "rope_interleaved", "rope_reversed", "no_rope_layers",
        "layer_rope_theta", "position_offset", "sinusoidal_layout", "sinusoidal_padding_zero",
        "sinusoidal_table_stored", "alibi_divisor", "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "embedding_size", "embedding_projection_bias", "tie_word_embeddings", "embedding_multiplier",
        "embedding_multiplier_position", "type_vocab_size",
        "output_projection", "logit_scale", "final_logit_softcapping", "lm_head_bias", "lm_head_normalized",
        "lm_head_input_scale", "pooler", "pooler_scope",
        "bos_token_id", "eos_token_id",
    }
)  # fmt: skip
# Off their defaults these change nothing that the engine computes, for the reason given.
WITHOUT_EFFECT = {
    "position_ids_source": "without padding in between, every source counts the tokens",
    "generation_counts_padding": "without padding, there is nothing to count",
    "padding_mask_source": "the engine is told lengths, and knows no padding tokens",
    "pad_token_id": "the engine is told lengths, and knows no padding tokens",
    "sinusoidal_table_grows": "the table has the context's length, and the engine refuses longer inputs",
    "longrope_recomputes_cache": "where the long factors are ever used, `rope_parameters` is refused",
    "token_type_table": "the engine's decoders are given no token types",
    "lm_head_unread_bias": "it enters nothing",
    "lm_head_transform_bias": "of a head that stays behind, or is refused",
    "lm_head_transform_act": "of a head that stays behind, or is refused",
    "classifier_pooling": "the engine has no classifiers: its encoders give hidden states",
    "classifier_bias": "the engine has no classifiers: its encoders give hidden states",
    "classifier_transform": "the engine has no classifiers: its encoders give hidden states",
    "classifier_transform_bias": "the engine has no classifiers: its encoders give hidden states",
    "classifier_transform_act": "the engine has no classifiers: its encoders give hidden states",
    "classifier_transform_norm": "the engine has no classifiers: its encoders give hidden states",
    "classifier_transform_on_tokens": "the engine has no classifiers: its encoders give hidden states",
    "choice_pooling": "the engine has no classifiers: its encoders give hidden states",
    "choice_transform": "the engine has no classifiers: its encoders give hidden states",
    "choice_transform_act": "the engine has no classifiers: its encoders give hidden states",
}
# Of an encoder-decoder as a whole; its stacks have the fields above.
PAIR_TAKEN = frozenset(
    {"encoder", "decoder", "share_embeddings", "tie_word_embeddings", "final_logits_bias", "decoder_start_token_id",
     "bos_token_id", "eos_token_id"}
)  # fmt: skip
PAIR_WITHOUT_EFFECT = {
    "one_vocabulary": "of resizing",
    "unread_shared_embedding": "it enters nothing",
    "label_shift": "of training",
    "decoder_inputs_from_source": "the engine's decoder is always given its inputs",
    "labels_disable_cache": "of training",
    "is_encoder_decoder": "it is one",
    "use_cache": "the engine has a cache of its own",
    "initializer_range": "of training",
    "argument_order": "of how the model is called",
    "native_leftovers": "of the way back",
    "pad_token_id": "the engine is told lengths, and knows no padding tokens",
}


def stacks_in_the_way(config: VariantConfig | VariantSeq2SeqConfig) -> dict[str, dict[str, tuple]]:
    """By stack, the fields that CTranslate2 does not compute, with their values and the reasons."""
    known = TAKEN | WITHOUT_EFFECT.keys()
    if isinstance(config, VariantConfig):
        return {"": in_the_way(config, lacks, known)}
    found = {name: in_the_way(getattr(config, name), lacks, known) for name in ("encoder", "decoder")}
    found[""] = others_in_the_way(config, PAIR_TAKEN | PAIR_WITHOUT_EFFECT.keys())
    encoder, decoder = config.encoder, config.decoder
    if encoder.norm_eps != decoder.norm_eps:
        why = Refusal("it has one epsilon for all norms, and the encoder's is another")
        found["decoder"].setdefault("norm_eps", (decoder.norm_eps, why))
    if config.final_logits_bias and decoder.final_logit_softcapping is not None:
        why = Refusal("its bias is that of the projection, before the cap")
        found[""]["final_logits_bias"] = (True, why)
    return found


def lacks(config: VariantConfig, layer: VariantConfig) -> Iterator[Lack]:
    """The rows for one layer of a stack."""
    encoder, first = not config.is_causal, config.per_layer_config[0]
    pre = {"pre", "sandwich"}
    yield Lack(layer.norm_type not in ("rmsnorm", "layernorm"), "norm_type", "its norms are RMSNorm and LayerNorm")
    yield Lack(
        layer.norm_placement in ("branch", "deepnorm")
        or (layer.norm_placement in pre) != (first.norm_placement in pre),
        "norm_placement",
        "its norms stand before a branch, on both sides of it, or after the sum, alike in all layers",
    )
    yield Lack(
        layer.parallel_block != "none" and (encoder or config.add_cross_attention or layer.norm_placement != "pre"),
        "parallel_block",
        "its parallel layers are those of decoders without an encoder, with norms before the branches alone",
    )
    yield Lack(layer.norm_placement == "deepnorm", "deepnorm_alpha", "its residual is not scaled")
    yield Lack(layer.residual_from_norm, "residual_from_norm", "its residual starts before the norm")
    yield Lack(
        not config.first_layer_pre_norm, "first_layer_pre_norm", "a layer without its norm has no residual there"
    )
    yield Lack(
        config.embedding_norm and config.embedding_norm_position != "after_positions",
        "embedding_norm_position",
        "its embedding norm stands behind the positions",
    )
    yield Lack(bool(getattr(layer, "skip", ())), "skip", "its layers are whole")
    yield Lack(
        layer.num_attention_heads != first.num_attention_heads, "num_attention_heads", "all layers have as many heads"
    )
    yield Lack(
        activation_of(layer.hidden_act) is None or layer.hidden_act != first.hidden_act,
        "hidden_act",
        "its activations are relu, gelu (exact, tanh, sigmoid), silu, tanh and sigmoid, one for all layers",
    )
    yield Lack(layer.ffn_sub_norm, "ffn_sub_norm", "it has no norm inside the feed-forward network")
    yield from _attention(config, layer)
    yield from _positions(config, layer)
    yield Lack(
        config.embedding_size != config.hidden_size and config.embedding_projection_position != "before_positions",
        "embedding_projection_position",
        "it projects token embeddings before positions are added",
    )
    yield Lack(config.type_vocab_size > 0 and not encoder, "type_vocab_size", "its decoders are given no token types")
    yield Lack(config.task_type_vocab_size > 0, "task_type_vocab_size", "it is given no task types")
    yield Lack(
        config.lm_head_transform and not encoder,
        "lm_head_transform",
        "its head is one projection of the hidden states",
    )
    yield Lack(config.output_projection and encoder, "output_projection", "its encoders have none")


def _attention(config: VariantConfig, layer: VariantConfig) -> Iterator[Lack]:
    yield Lack(layer.attention_sub_norm, "attention_sub_norm", "it has no norm before the output projection")
    yield Lack(layer.attention_gate != "none", "attention_gate", "its attention has no gate")
    yield Lack(layer.attention_sinks, "attention_sinks", "its softmax has no sink")
    yield Lack(layer.attn_logit_softcapping is not None, "attn_logit_softcapping", "its scores have no cap")
    yield Lack(layer.clip_qkv is not None, "clip_qkv", "it does not clamp queries, keys and values")
    yield Lack(
        layer.qk_norm in ("full", "per_head") or (layer.qk_norm != "none" and config.add_cross_attention),
        "qk_norm",
        "its norm on queries and keys has one weight per channel of a head, in self-attention",
    )
    normed = layer.qk_norm != "none"
    yield Lack(
        normed and layer.qk_norm_type not in ("rmsnorm", "layernorm"),
        "qk_norm_type",
        "its norms are RMSNorm and LayerNorm",
    )
    yield Lack(normed and layer.qk_norm_eps != config.norm_eps, "qk_norm_eps", "it has one epsilon for all norms")
    yield Lack(
        layer.qk_norm_after_rope and config.position_embedding_type == "rope",
        "qk_norm_after_rope",
        "it normalises before the rotation",
    )
    # A decoder's prompt is not windowed at all, and the cache only where tokens come one by one.
    reach = config.sliding_window if config.is_causal else (config.sliding_window or 0) + 1
    yield Lack(
        "sliding_attention" in config.layer_types and reach < config.max_position_embeddings,
        "sliding_window",
        "it windows the cache of single steps and not the prompt, and encoders not at all",
    )


def _positions(config: VariantConfig, layer: VariantConfig) -> Iterator[Lack]:
    kind, heads, encoder = config.position_embedding_type, layer.num_attention_heads, not config.is_causal
    alibi = kind == "alibi"
    yield Lack(config.rope_turns_values, "rope_turns_values", "its rotation turns queries and keys")
    yield Lack(
        config.rope_table_in_checkpoint, "rope_table_in_checkpoint", "it computes the angles of its rotation itself"
    )
    yield Lack(alibi and encoder, "position_embedding_type", "its encoders have no ALiBi")
    yield Lack(alibi and config.alibi_bias_max != 8, "alibi_bias_max", "its slopes are the paper's")
    yield Lack(
        alibi and config.alibi_slope_order != "paper" and heads & (heads - 1) != 0,
        "alibi_slope_order",
        "its slopes are the paper's",
    )
    yield Lack(
        alibi and config.alibi_divisor != 1 and not divides_alibi_as_scores(config),
        "alibi_divisor",
        "it divides the bias as the scores, or not at all",
    )
    yield Lack(
        kind == "relative_bias" and not encoder and not config.add_cross_attention,
        "position_embedding_type",
        "a decoder by itself counts the distances of a prompt from its last token",
    )
    yield Lack(
        kind == "relative_bias" and config.relative_attention_per_layer and config.num_hidden_layers > 1,
        "relative_attention_per_layer",
        "the layers share one table",
    )
    entries = [entry for i in range(config.num_hidden_layers) if (entry := config.rope_parameters_of(i)) is not None]
    for lacks, why in (
        (
            lambda entry: entry["rope_type"] == "dynamic" and not entry.get("alpha"),
            "it has no rope_type dynamic, whose frequencies change with the length",
        ),
        (
            lambda entry: entry["rope_type"] == "longrope" and _uses_long_factors(config, entry),
            "it changes to the long factors where its table of angles grows, not where the text does, and never back",
        ),
        (lambda entry: "llama_4_scaling_beta" in entry, "queries are not scaled by their position"),
        (
            lambda entry: (
                entry["rope_type"] in ("yarn", "longrope") and (entry.get("partial_rotary_factor") or 1) != 1
            ),
            "a factor on the rotated part of a head alone is missing",
        ),
    ):
        yield Lack(any(map(lacks, entries)), "rope_parameters", why)


def divides_alibi_as_scores(config: VariantConfig) -> bool:
    """Whether the divisor of ALiBi's bias is that of the scores, in every layer."""
    scalings = [
        layer.head_dim**-0.5 if layer.attention_scaling is None else layer.attention_scaling
        for layer in config.per_layer_config
    ]
    alike = all(math.isclose(config.alibi_divisor * scaling, 1, rel_tol=1e-6) for scaling in scalings)
    return alike and not config.scale_attn_by_inverse_layer_idx


def _uses_long_factors(config: VariantConfig, entry: dict) -> bool:
    original = entry.get("original_max_position_embeddings") or config.max_position_embeddings
    return original < config.max_position_embeddings and entry["short_factor"] != entry["long_factor"]
