"""Nemotron."""

import random

from tests.native_rows.llama import rope, sizes
from tests.parity import Row


def nemotron(rng: random.Random):
    config = sizes(rng)
    if rng.random() < 0.3:
        config["head_dim"] = None
    head_dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    # Absent, the class fills in one half.
    parameters = rope(rng, head_dim, partial=rng.choice((0.5, 0.75, 1.0))) if rng.random() < 0.8 else None
    return config | {
        "rope_parameters": parameters,
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "norm_eps": rng.choice((1e-5, 1e-3)),
        "hidden_act": rng.choice(("relu2", "gelu")),
    }


ROWS = (Row("nemotron", nemotron, seeds=8),)
