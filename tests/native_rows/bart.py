"""BART and its relatives."""

import random

from tests.parity import Row


def bart_sizes(rng: random.Random, **overrides):
    """Two stacks of different depth, heads and width of the feed-forward network."""
    return {
        "vocab_size": 71,
        "d_model": 32,
        "encoder_layers": rng.choice((1, 2)),
        "decoder_layers": rng.choice((2, 3)),
        "encoder_attention_heads": rng.choice((2, 4)),
        "decoder_attention_heads": rng.choice((2, 4)),
        "encoder_ffn_dim": rng.choice((40, 56)),
        "decoder_ffn_dim": rng.choice((40, 56)),
        "max_position_embeddings": 64,
        "activation_function": rng.choice(("gelu", "relu", "silu")),
        "scale_embedding": rng.random() < 0.5,
        "pad_token_id": rng.choice((0, 1)),
        "bos_token_id": 3,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": rng.choice((2, None)),
        **overrides,
    }


ROWS = (Row("bart", bart_sizes, heads=("base",)),)
