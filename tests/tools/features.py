"""Features of a variant, each with the config that has it and one without: what an engine's check has to tell apart."""

import torch

from hf_variants import (
    VariantConfig,
    VariantForCausalLM,
    VariantForConditionalGeneration,
    VariantForMaskedLM,
    VariantSeq2SeqConfig,
)
from tests.parity import hostile_

from . import kinds


def variant(fields, seed=0):
    """A model of a config with weights that hide nothing."""
    config = fields if isinstance(fields, VariantSeq2SeqConfig) else VariantConfig(**fields)
    torch.manual_seed(seed)
    if config.is_encoder_decoder:
        built = VariantForConditionalGeneration(config)
    else:
        built = (VariantForCausalLM if config.is_causal else VariantForMaskedLM)(config)
    return hostile_(built, seed).eval()


def with_and_without(on, off):
    """The models of two configs, whose weights are equal where both have them."""
    on, off = variant(on), variant(off)
    has = off.state_dict()
    given = {
        name: tensor for name, tensor in on.state_dict().items() if name in has and has[name].shape == tensor.shape
    }
    off.load_state_dict(given, strict=False)
    return on, off


BASE = {**kinds.SIZES, "num_key_value_heads": 2, "head_dim": 10, "norm_eps": 1e-5}
ENCODER = {
    **BASE, "is_causal": False, "norm_type": "layernorm", "norm_placement": "post", "ffn_type": "mlp",
    "hidden_act": "gelu", "position_embedding_type": "learned", "type_vocab_size": 2,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 100.0}


def pair(**of_decoder):
    stack = {**BASE, "norm_type": "layernorm", "position_embedding_type": "sinusoidal"}
    encoder, decoder = of_decoder.pop("encoder", {}), of_decoder.pop("decoder", {})
    return VariantSeq2SeqConfig(
        encoder={**stack, **encoder}, decoder={**stack, **decoder}, decoder_start_token_id=1,
        share_embeddings=False, tie_word_embeddings=False, **of_decoder,
    )  # fmt: skip


# A feature -> the config that has it, and the same without it, of which the weights that both have are equal.
FEATURES = {
    "norm kind": ({**BASE, "norm_type": "layernorm"}, {**BASE, "norm_type": "rmsnorm"}),
    "1 + w": ({**BASE, "norm_unit_offset": True}, BASE),
    "1 + w of LayerNorm": (
        {**BASE, "norm_type": "layernorm", "norm_unit_offset": True},
        {**BASE, "norm_type": "layernorm"},
    ),
    "epsilon": ({**BASE, "norm_eps": 1e-1}, BASE),
    "norm place": ({**BASE, "norm_placement": "post"}, {**BASE, "final_norm": False}),
    "sandwich": ({**BASE, "norm_placement": "sandwich"}, BASE),
    "final norm": ({**BASE, "norm_placement": "post", "final_norm": True}, {**BASE, "norm_placement": "post"}),
    "no final norm": ({**BASE, "final_norm": False}, BASE),
    "embedding norm": ({**BASE, "embedding_norm": True}, BASE),
    "parallel": ({**BASE, "parallel_block": "two_norms"}, BASE),
    "shared norm": ({**BASE, "parallel_block": "shared_norm"}, {**BASE, "parallel_block": "two_norms"}),
    "residual multiplier": ({**BASE, "residual_multiplier": 0.3}, BASE),
    "residual multiplier in a sandwich": (
        {**BASE, "norm_placement": "sandwich", "residual_multiplier": 0.3},
        {**BASE, "norm_placement": "sandwich"},
    ),
    "learned scale": ({**BASE, "learned_scale_type": "channel", "layer_scale_init": 0.3, "mlp_bias": True}, BASE),
    "GLU": (BASE, {**BASE, "ffn_type": "mlp"}),
    "activation": ({**BASE, "hidden_act": "quick_gelu"}, {**BASE, "hidden_act": "silu"}),
    "biases": ({**BASE, "attention_bias": True, "mlp_bias": True}, BASE),
    "output bias alone": ({**BASE, "attention_output_bias": True}, BASE),
    "QK-norm": ({**BASE, "qk_norm": "head"}, BASE),
    "QK-norm of another kind": (
        {**BASE, "qk_norm": "head", "qk_norm_type": "layernorm", "qk_norm_bias": True},
        {**BASE, "qk_norm": "head"},
    ),
    "QK-norm without weights": ({**BASE, "qk_norm": "head", "qk_norm_affine": False}, BASE),
    "scaling": ({**BASE, "attention_scaling": 0.9}, BASE),
    "scaling by layer": ({**BASE, "scale_attn_by_inverse_layer_idx": True}, BASE),
    "learned positions": ({**BASE, "position_embedding_type": "learned"}, {**BASE, "position_embedding_type": "none"}),
    "offset of positions": (
        {**BASE, "position_embedding_type": "sinusoidal", "position_offset": 2},
        {**BASE, "position_embedding_type": "sinusoidal"},
    ),
    "layout of sinusoids": (
        {**BASE, "position_embedding_type": "sinusoidal", "sinusoidal_layout": "half"},
        {**BASE, "position_embedding_type": "sinusoidal"},
    ),
    "ALiBi": ({**BASE, "position_embedding_type": "alibi"}, {**BASE, "position_embedding_type": "none"}),
    "ALiBi divided": (
        {**BASE, "position_embedding_type": "alibi", "alibi_divisor": 10**0.5},
        {**BASE, "position_embedding_type": "alibi"},
    ),
    "no positions": ({**BASE, "position_embedding_type": "none"}, BASE),
    "theta": ({**BASE, "rope_parameters": ROPE}, BASE),
    "interleaved": ({**BASE, "rope_interleaved": True}, BASE),
    "reversed": ({**BASE, "rope_reversed": True}, BASE),
    "partial rotation": ({**BASE, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.4}},
                         {**BASE, "rope_parameters": ROPE}),
    "linear": ({**BASE, "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}},
               {**BASE, "rope_parameters": ROPE}),
    "yarn": (
        {**BASE, "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {**BASE, "rope_parameters": ROPE},
    ),
    "llama3": (
        {**BASE, "rope_parameters": {**ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                     "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
        {**BASE, "rope_parameters": ROPE},
    ),
    "proportional": (
        {**BASE, "rope_parameters": {**ROPE, "rope_type": "proportional", "partial_rotary_factor": 0.4}},
        {**BASE, "rope_parameters": ROPE},
    ),
    "rotation per layer type": (
        {**BASE, "layer_types": "SF", "sliding_window": 128,
         "rope_parameters": {"full_attention": ROPE, "sliding_attention": {**ROPE, "rope_theta": 9000.0}}},
        {**BASE, "rope_parameters": ROPE},
    ),
    "layers without rotation": ({**BASE, "no_rope_layers": [0, 1]}, BASE),
    "theta per layer": ({**BASE, "layer_rope_theta": [0, 50.0]}, BASE),
    "embedding multiplier": ({**BASE, "embedding_multiplier": 4.5}, BASE),
    "factorised embedding": (
        {**BASE, "embedding_size": 20, "embedding_projection_bias": True},
        {**BASE, "embedding_size": 20},
    ),
    "projection before the head": (
        {**BASE, "embedding_size": 20, "output_projection": True, "embedding_projection_bias": True},
        {**BASE, "embedding_size": 20, "output_projection": True},
    ),
    "logit scale": ({**BASE, "logit_scale": 0.3, "lm_head_bias": True}, {**BASE, "lm_head_bias": True}),
    "head bias": ({**BASE, "lm_head_bias": True}, BASE),
    "scale before the head": ({**BASE, "lm_head_input_scale": 0.3, "lm_head_bias": True}, {**BASE, "lm_head_bias": True}),
    "normalised head": ({**BASE, "lm_head_normalized": True}, BASE),
    "soft-cap of the logits": ({**BASE, "final_logit_softcapping": 3.0}, BASE),
    "layers that differ": (
        {**BASE, "per_layer_config": {1: {"num_key_value_heads": 1, "intermediate_size": 24, "attention_bias": True}}},
        {**BASE, "per_layer_config": {1: {"num_key_value_heads": 1, "intermediate_size": 24}}},
    ),
    "encoder": (ENCODER, {**ENCODER, "norm_type": "rmsnorm"}),
    "encoder, token types": (ENCODER, {**ENCODER, "type_vocab_size": 0}),
    "encoder, multiplier beside types": ({**ENCODER, "embedding_multiplier": 4.5}, ENCODER),
    "encoder, sandwich": ({**ENCODER, "norm_placement": "sandwich"}, {**ENCODER, "norm_placement": "pre"}),
    "encoder, rotation": (
        {**ENCODER, "position_embedding_type": "rope", "rope_parameters": ROPE},
        {**ENCODER, "position_embedding_type": "none"},
    ),
    "encoder, relative bias": (
        {**ENCODER, "position_embedding_type": "relative_bias"},
        {**ENCODER, "position_embedding_type": "none"},
    ),
    "encoder, factorised": (
        {**ENCODER, "embedding_size": 20, "embedding_projection_bias": True, "embedding_multiplier": 2.5},
        {**ENCODER, "embedding_size": 20, "embedding_projection_bias": True},
    ),
    "encoder, positions behind padding": (
        {**ENCODER, "position_ids_source": "input_ids", "position_offset": 0},
        ENCODER,
    ),
    "pooler": ({**ENCODER, "pooler": True}, ENCODER),
    "pair": (pair(), pair(decoder={"norm_placement": "post"})),
    "pair, final bias": (pair(final_logits_bias=True), pair()),
    "pair, sandwich": (pair(decoder={"norm_placement": "sandwich"}), pair()),
    "pair, one key/value head": (
        pair(decoder={"num_key_value_heads": 1, "residual_multiplier": 0.4}),
        pair(decoder={"num_key_value_heads": 1}),
    ),
    "pair, relative biases": (
        pair(encoder={"position_embedding_type": "relative_bias"}, decoder={"position_embedding_type": "relative_bias"}),
        pair(encoder={"position_embedding_type": "relative_bias"}, decoder={"position_embedding_type": "none"}),
    ),
    "pair, widths": (
        pair(encoder={"hidden_size": 24}),
        pair(encoder={"hidden_size": 24}, decoder={"attention_scaling": 0.9}),
    ),
}  # fmt: skip

# What some engines lack.
WINDOWED = {**BASE, "layer_types": "SF", "sliding_window": 8}
RARER = {
    "window": (WINDOWED, BASE),
    "window of an encoder": ({**ENCODER, "layer_types": "SF", "sliding_window": 8}, ENCODER),
    "soft-cap of the scores": ({**BASE, "attn_logit_softcapping": 3.0}, BASE),
    "sinks": ({**BASE, "attention_sinks": True}, BASE),
    "gate by head": ({**BASE, "attention_gate": "headwise"}, BASE),
    "gate by channel": ({**BASE, "attention_gate": "elementwise"}, BASE),
    "clamp": ({**BASE, "clip_qkv": 0.5}, BASE),
    "QK-norm over all heads": ({**BASE, "qk_norm": "full"}, BASE),
    "QK-norm after the rotation": (
        {**BASE, "qk_norm": "head", "qk_norm_after_rope": True},
        {**BASE, "qk_norm": "head"},
    ),
    "values that are turned": ({**BASE, "rope_turns_values": True}, BASE),
    "rotation from a table of the checkpoint": ({**BASE, "rope_table_in_checkpoint": True}, BASE),
    "norm before the output projection": ({**BASE, "attention_sub_norm": True}, BASE),
    "norm inside the FFN": ({**BASE, "ffn_sub_norm": True}, BASE),
    "DynamicTanh": ({**BASE, "norm_type": "dynamic_tanh"}, {**BASE, "norm_type": "layernorm"}),
    "branch norms": ({**BASE, "norm_placement": "branch"}, BASE),
    # In a batch with padding a norm has nothing but zeros, and its epsilon.
    "tiny epsilon": (
        {**BASE, "norm_placement": "branch", "norm_eps": 1e-8},
        {**BASE, "norm_placement": "branch", "norm_eps": 1e-2},
    ),
    "DeepNorm": ({**BASE, "norm_placement": "deepnorm"}, {**BASE, "norm_placement": "post"}),
    "squared ReLU": ({**BASE, "hidden_act": "relu2"}, BASE),
    "xIELU": ({**BASE, "hidden_act": "xielu", "ffn_type": "mlp"}, {**BASE, "ffn_type": "mlp"}),
    "relative bias of a decoder": (
        {**BASE, "position_embedding_type": "relative_bias"},
        {**BASE, "position_embedding_type": "none"},
    ),
    "relative bias per layer": (
        {**BASE, "position_embedding_type": "relative_bias", "relative_attention_per_layer": True},
        {**BASE, "position_embedding_type": "none"},
    ),
    "layers that lack a sublayer": (
        {**BASE, "num_hidden_layers": 3, "per_layer_config": {1: {"skip": ["self_attn"]}, 2: {"skip": ["mlp"]}}},
        {**BASE, "num_hidden_layers": 3, "per_layer_config": {1: {"skip": ["self_attn"]}}},
    ),
    "heads that differ": (
        {**BASE, "per_layer_config": {1: {"num_attention_heads": 2, "num_key_value_heads": 1}}},
        BASE,
    ),
    "transform of a head": ({**ENCODER, "lm_head_transform": True}, ENCODER),
    "pair, window of the decoder": (pair(decoder={"layer_types": "SF", "sliding_window": 8}), pair()),
    "pair, QK-norm": (pair(decoder={"qk_norm": "head"}), pair()),
}  # fmt: skip

# What a model is for -> its class, its kind, and fields of its config.
HEADS = {
    "classifier of an encoder": ("VariantForSequenceClassification", "encoder", {"num_labels": 3}),
    "classifier of a decoder": ("VariantForSequenceClassification", "llama", {"num_labels": 3}),
    "reward model": ("VariantForSequenceClassification", "llama", {"num_labels": 1}),
    "token classifier": ("VariantForTokenClassification", "encoder", {"num_labels": 3}),
    "spans": ("VariantForQuestionAnswering", "encoder", {}),
    "next sentence": ("VariantForNextSentencePrediction", "encoder", {"type_vocab_size": 2}),
    "embeddings of an encoder": ("VariantModel", "encoder", {}),
    "embeddings with a pooler": ("VariantModel", "encoder", {"pooler": True}),
    "embeddings of a decoder": ("VariantModel", "llama", {}),
    "two stacks": ("VariantSeq2SeqModel", "seq2seq", {}),
    "classifier of two stacks": ("VariantSeq2SeqForSequenceClassification", "seq2seq", {}),
    "token classifier of two stacks": ("VariantSeq2SeqForTokenClassification", "seq2seq", {}),
    "spans of two stacks": ("VariantSeq2SeqForQuestionAnswering", "seq2seq", {}),
}
