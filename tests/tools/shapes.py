"""Further variants for what depends on how a model is cut across devices: what is counted by the head, odd sizes."""

from . import kinds


# name -> kind, and the fields in which it differs
SHAPES = {
    "norm on each head": ("llama", {"qk_norm": "head", "qk_norm_after_rope": True}),
    "norm over all heads": ("llama", {"qk_norm": "full", "attention_gate": "elementwise"}),
    "norm per head": ("llama", {"qk_norm": "per_head", "clip_qkv": 2.0}),
    "sinks": ("llama", {"attention_sinks": True, "attention_gate": "headwise"}),
    "gate alone": ("llama", {"attention_gate": "headwise", "qk_norm": "head"}),
    "sub-norms": (
        "llama",
        {"attention_sub_norm": True, "ffn_sub_norm": True, "learned_scale_type": "channel", "layer_scale_init": 0.5},
    ),
    "alibi": ("llama", {"position_embedding_type": "alibi", "tie_word_embeddings": True}),
    "relative bias": ("llama", {"position_embedding_type": "relative_bias"}),
    "one key-value head": ("llama", {"num_key_value_heads": 1, "broadcast_key_value": True}),
    "odd heads": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8, "qk_norm": "head"}),
    "odd key-value heads": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}),
    "odd sizes": ("llama", {"vocab_size": 97, "intermediate_size": 51, "tie_word_embeddings": True}),
    "learned activation": ("llama", {"hidden_act": "xielu", "ffn_type": "mlp"}),
    "fused gate": ("llama", {"fused_gate_up": True, "mlp_bias": True, "attention_bias": True, "unfused_bias": True}),
    "head": ("llama", {"lm_head_bias": True, "lm_head_unread_bias": True, "lm_head_normalized": True}),
    "factorised": (
        "gpt-neox",
        {"embedding_size": 16, "output_projection": True, "tie_word_embeddings": True,
         "position_embedding_type": "learned", "embedding_norm": True},
    ),
    "layers differ": (
        "llama",
        {"num_hidden_layers": 3, "per_layer_config": {
            1: {"num_key_value_heads": 1, "intermediate_size": 16, "skip": ["mlp"]}, 2: {"skip": ["self_attn"]}}},
    ),
    "scaled embedding": (
        "llama", {"embedding_multiplier": 5.0, "tie_word_embeddings": True, "padding_embedding_frozen": True},
    ),
    "batchnorm": ("llama", {"norm_type": "batchnorm", "embedding_norm": True, "ffn_sub_norm": True}),
    "deepnorm": ("gpt-neox", {"parallel_block": "none", "norm_placement": "deepnorm"}),
    "encoder with a transform": ("encoder", {"lm_head_transform": True, "lm_head_bias": True}),
    "cross-attention with norms": ("seq2seq", {"qk_norm": "head", "num_key_value_heads": 2}),
    "cross-attention of one head": ("seq2seq", {"num_key_value_heads": 1, "position_embedding_type": "relative_bias"}),
    "tables apart": ("seq2seq", {"tie_word_embeddings": False, "share_embeddings": False}),
    "cross-attention with sinks": ("seq2seq", {"attention_sinks": True}),
}  # fmt: skip


def model(name: str, **fields):
    """As `kinds.model`, of a kind or a shape; `fields` replace its own."""
    kind, own = SHAPES.get(name, (name, {}))
    return kinds.model(kind, **{**own, **fields})


def batch(name: str, **options):
    """As `kinds.batch`."""
    return kinds.batch(SHAPES.get(name, (name,))[0], **options)
