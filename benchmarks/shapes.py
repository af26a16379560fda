"""Shapes of native models that benchmarks build with random weights, from 8M parameters to SmolLM2's 135M.

A shape is the name of a class of transformers, of its config's class, and the config's fields.
"""

# Of about 8M parameters each: 6 layers (or 4 and 4), width 256, 4 heads, 8192 tokens.
_SMALL = {
    "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
    "max_position_embeddings": 8192,
}  # fmt: skip
_GATED = {**_SMALL, "intermediate_size": 704, "num_key_value_heads": 2, "tie_word_embeddings": False}

SHAPES: dict[str, tuple[str, str, dict]] = {
    "llama-135m": (
        "LlamaForCausalLM", "LlamaConfig",
        {
            "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
            "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "llama-8m": ("LlamaForCausalLM", "LlamaConfig", _GATED),
    "gemma2-8m": (
        "Gemma2ForCausalLM", "Gemma2Config",
        {**_GATED, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 512},
    ),
    "gpt-neox-8m": (
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {**_SMALL, "intermediate_size": 1024, "tie_word_embeddings": False}
    ),
    "cohere2-8m": (
        "Cohere2ForCausalLM", "Cohere2Config", {**_GATED, "sliding_window": 512, "logit_scale": 1.0}
    ),
    "gpt2-8m": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 8192, "n_embd": 256, "n_layer": 6, "n_head": 4, "n_positions": 2048},
    ),
    "bloom-8m": (
        "BloomForCausalLM", "BloomConfig", {"vocab_size": 8192, "hidden_size": 256, "n_layer": 6, "n_head": 4}
    ),
    "marian-8m": (
        "MarianMTModel", "MarianConfig",
        {
            "vocab_size": 8192, "d_model": 256, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024,
            "max_position_embeddings": 2048, "activation_function": "swish", "scale_embedding": True,
        },
    ),
    "t5-8m": (
        "T5ForConditionalGeneration", "T5Config",
        {
            "vocab_size": 8192, "d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_decoder_layers": 4,
            "num_heads": 4,
        },
    ),
}  # fmt: skip

# That do not generate, and are trained alone.
ENCODERS: dict[str, tuple[str, str, dict]] = {
    "bert-8m": (
        "BertForMaskedLM", "BertConfig",
        {
            "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
            "intermediate_size": 1024, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
    ),
}  # fmt: skip
