"""Command R and Command R7B."""

import random

from tests.native_rows.granite import undeclared_head_dim
from tests.native_rows.llama import rope, sizes
from tests.parity import Row


def shared(rng: random.Random):
    config = sizes(rng)
    head_dim = undeclared_head_dim(rng, config)
    return config | {
        "rope_parameters": rope(rng, head_dim),
        "attention_bias": rng.random() < 0.5,
        "layer_norm_eps": rng.choice((1e-5, 1e-3)),
        "logit_scale": rng.choice((0.0625, 0.3, 1.0)),
        "hidden_act": rng.choice(("silu", "gelu")),
    }


def cohere(rng: random.Random):
    return shared(rng) | {"use_qk_norm": rng.random() < 0.5}


def cohere2(rng: random.Random):
    config = shared(rng) | {"sliding_window": rng.choice((3, 7))}
    if rng.random() < 0.7:
        config["layer_types"] = [rng.choice(("full_attention", "sliding_attention")) for _ in range(3)]
    elif rng.random() < 0.5:
        config["sliding_window_pattern"] = 2
    return config


ROWS = (Row("cohere", cohere, seeds=8), Row("cohere2", cohere2, seeds=8))
