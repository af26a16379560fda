"""T5, mT5 and UMT5."""

import random
from inspect import getsource

from transformers.models.umt5.modeling_umt5 import UMT5LayerSelfAttention

from tests.parity import Row


def t5_sizes(rng: random.Random, **overrides):
    """
    Heads whose width is not `d_model / num_heads`, and stacks of different depth. The native class sizes its cache by
    the encoder, so its decoder cannot be the deeper one.
    """
    return {
        "vocab_size": 71,
        "d_model": rng.choice((24, 32)),
        "d_kv": rng.choice((8, 16)),
        "d_ff": rng.choice((40, 56)),
        "num_layers": rng.choice((2, 3)),
        "num_decoder_layers": rng.choice((None, 1, 2)),
        "num_heads": rng.choice((2, 4)),
        "relative_attention_num_buckets": rng.choice((8, 32)),
        "relative_attention_max_distance": rng.choice((24, 128)),
        "feed_forward_proj": rng.choice(("relu", "gated-gelu", "gated-silu", "gelu")),
        "layer_norm_epsilon": rng.choice((1e-6, 1e-3)),
        "pad_token_id": rng.choice((0, 3)),
        "decoder_start_token_id": 0,
        **overrides,
    }


def t5(rng: random.Random):
    return t5_sizes(rng, tie_word_embeddings=rng.random() < 0.5)


def umt5_backends(config):
    """Where layers do not tell, as in transformers 5.17, the native decoder sees the future under sdpa."""
    knows_causality = "is_causal" in getsource(UMT5LayerSelfAttention)
    return ("eager", "sdpa") if knows_causality else ("eager",)


ROWS = (
    Row("t5", t5, heads=("base",)),
    Row("mt5", t5_sizes),
    Row("umt5", t5_sizes, heads=("base",), backends=umt5_backends),
)
