"""Granite, Granite SWA and HyperCLOVA X."""

import random

from tests.native_rows.llama import rope, sizes
from tests.parity import Row


def multipliers(rng: random.Random):
    return {
        "embedding_multiplier": rng.choice((1.0, 12.0, 3, 0.7)),
        "logits_scaling": rng.choice((1.0, 8, 10.0, 0.3, 49.0)),
        "residual_multiplier": rng.choice((1.0, 0.22, 1.4)),
        "attention_multiplier": rng.choice((0.125, 0.3, 1.0)),
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "rms_norm_eps": rng.choice((1e-6, 1e-3)),
        "hidden_act": rng.choice(("silu", "gelu")),
    }


def undeclared_head_dim(rng: random.Random, config: dict):
    """The class derives `head_dim`, and reads one that it does not declare."""
    if rng.random() < 0.7:
        del config["head_dim"]
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def granite(rng: random.Random):
    config = sizes(rng) | multipliers(rng)
    head_dim = undeclared_head_dim(rng, config)
    return config | {"rope_parameters": rope(rng, head_dim)}


def granite_swa(rng: random.Random):
    config = granite(rng) | {"sliding_window": rng.choice((3, 7))}
    if rng.random() < 0.7:
        config["layer_types"] = [rng.choice(("full_attention", "sliding_attention")) for _ in range(3)]
    if rng.random() < 0.7:
        config["layer_rope_theta"] = [rng.choice((0, 10000, 10000.0, 500.0)) for _ in range(3)]
    return config


def hyperclovax(rng: random.Random):
    config = sizes(rng) | multipliers(rng)
    return config | {
        "attention_multiplier": rng.choice((None, config["attention_multiplier"])),
        "rope_parameters": rope(rng, config["head_dim"]),
        "use_post_norm": rng.random() < 0.5,
    }


ROWS = (
    Row("granite", granite, seeds=8),
    Row("granite_swa", granite_swa, seeds=8, backends=("eager",)),
    Row("hyperclovax", hyperclovax, seeds=8),
)
