"""Types close to Llama: other windows, biases, rotations, norms or activations."""

import random

from tests.native_rows.llama import rope, sizes
from tests.parity import Row


# Shorter than the rows' long input, so that dynamic scaling has something to do.
CONTEXTS = (24, 64)
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu2", "prelu")


def shape(rng: random.Random, **overrides):
    """Sizes, norm epsilon, and dropout that evaluation must ignore."""
    return sizes(
        rng,
        max_position_embeddings=rng.choice(CONTEXTS),
        rms_norm_eps=rng.choice((1e-8, 1e-6, 1e-3)),
        attention_dropout=rng.choice((0.0, 0.1)),
        hidden_act=rng.choice(ACTIVATIONS),
        **overrides,
    )


def shape_of_undeclared_heads(rng: random.Random):
    """As `shape`, for classes without the key `head_dim`: it is absent, given as it would be derived, or another."""
    config = shape(rng)
    derived = config["hidden_size"] // config["num_attention_heads"]
    config["head_dim"] = rng.choice((derived, derived, 24))
    return config


def without_derived_head_dim(rng: random.Random, config: dict):
    derived = config["hidden_size"] // config["num_attention_heads"]
    if config["head_dim"] == derived and rng.random() < 0.7:
        del config["head_dim"]
    return config


def layer_types(rng: random.Random, number: int = 3):
    return [rng.choice(("full_attention", "sliding_attention")) for _ in range(number)]


def flag(rng: random.Random):
    return rng.random() < 0.5


def ministral(rng: random.Random):
    config = shape(rng)
    return config | {
        "rope_parameters": rope(rng, config["head_dim"]),
        "sliding_window": rng.choice((3, 8, 4096)),
        "layer_types": rng.choice((None, layer_types(rng))),
    }


def ministral3(rng: random.Random):
    config = shape(rng)
    parameters = rope(rng, config["head_dim"])
    scale = {"llama_4_scaling_beta": rng.choice((0.0, 0.1, 0.7))}
    if "original_max_position_embeddings" not in parameters:
        scale["original_max_position_embeddings"] = 8
    if parameters["rope_type"] == "yarn":
        scale |= rng.choice(({}, {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16.0, "beta_slow": 2.0}))
    return config | {"rope_parameters": parameters | scale, "sliding_window": rng.choice((None, 5, 64))}


def smollm3(rng: random.Random):
    config = shape_of_undeclared_heads(rng)
    parameters = rope(rng, config["head_dim"])
    return without_derived_head_dim(rng, config) | {
        "rope_parameters": parameters,
        "attention_bias": flag(rng),
        "mlp_bias": flag(rng),
        "use_sliding_window": flag(rng),
        "sliding_window": 7,
        "layer_types": rng.choice((None, layer_types(rng))),
        # The last: longer than the stack.
        "no_rope_layers": rng.choice((None, None, [0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0, 1, 1])),
        "no_rope_layer_interval": rng.choice((2, 3, 4)),
    }


def cwm(rng: random.Random):
    config = shape(rng)
    return config | {
        "rope_parameters": rope(rng, config["head_dim"]),
        "mlp_bias": flag(rng),
        "pretraining_tp": rng.choice((1, 2)),
        "sliding_window": rng.choice((3, 8, 4096)),
        "layer_types": rng.choice((None, layer_types(rng))),
        "eos_token_id": rng.choice((None, 2, [2, 3])),
    }


def ernie4_5(rng: random.Random):
    config = shape(rng)
    del config["attention_dropout"]
    return config | {"rope_parameters": rope(rng, config["head_dim"]), "use_bias": rng.choice((False, True, None))}


def helium(rng: random.Random):
    config = shape(rng)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "head_dim": head_dim,
        "rope_parameters": rope(rng, head_dim),
        "attention_bias": flag(rng),
        "mlp_bias": flag(rng),
    }


def seed_oss(rng: random.Random):
    config = shape(rng)
    return config | {
        "rope_parameters": rope(rng, config["head_dim"]),
        "attention_bias": flag(rng),
        "attention_out_bias": flag(rng),
        "mlp_bias": flag(rng),
        "residual_dropout": rng.choice((0.0, 0.1)),
        "pretraining_tp": rng.choice((1, 2)),
    }


def hunyuan_v1_dense(rng: random.Random):
    config = shape(rng)
    parameters = rope(rng, config["head_dim"])
    if parameters["rope_type"] == "dynamic" or rng.random() < 0.3:
        parameters |= {"rope_type": "dynamic", "factor": 2.0, "alpha": rng.choice((None, 50.0, 1000.0))}
        if parameters["alpha"] is None:
            del parameters["alpha"]
    return config | {
        "rope_parameters": parameters,
        "attention_bias": flag(rng),
        "eod_token_id": rng.choice((None, 3, 7)),
        "pretraining_tp": rng.choice((1, 2)),
    }


def arcee(rng: random.Random):
    config = shape(rng)
    config["head_dim"] = rng.choice((None, config["head_dim"]))
    head_dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    return config | {"rope_parameters": rope(rng, head_dim), "attention_bias": flag(rng), "mlp_bias": flag(rng)}


def apertus(rng: random.Random):
    config = shape_of_undeclared_heads(rng)
    parameters = rope(rng, config["head_dim"])
    return without_derived_head_dim(rng, config) | {
        "rope_parameters": rng.choice((parameters, parameters, None)),
        "attention_bias": flag(rng),
        "hidden_act": rng.choice(("xielu", "xielu", "silu", "prelu")),
    }


def nanochat(rng: random.Random):
    config = shape_of_undeclared_heads(rng)
    parameters = rope(rng, config["head_dim"])
    return without_derived_head_dim(rng, config) | {
        "rope_parameters": parameters,
        "attention_bias": flag(rng),
        "final_logit_softcapping": rng.choice((None, 15.0, 2.5)),
    }


def exaone4(rng: random.Random):
    config = shape_of_undeclared_heads(rng)
    parameters = rope(rng, config["head_dim"])
    window = rng.choice((None, 3, 8))
    kinds = ["full_attention"] * 3 if window is None else rng.choice((None, layer_types(rng), ["full_attention"] * 3))
    return without_derived_head_dim(rng, config) | {
        "rope_parameters": parameters,
        "sliding_window": window,
        "sliding_window_pattern": rng.choice((2, 3, 4)) if kinds is None else rng.choice((2, 4, "LLG")),
        "layer_types": kinds,
    }


ROWS = tuple(
    Row(draw.__name__, draw, seeds=seeds)
    for draw, seeds in (
        (ministral, 6), (ministral3, 6), (smollm3, 8), (cwm, 6), (ernie4_5, 4), (helium, 4), (seed_oss, 4),
        (hunyuan_v1_dense, 6), (arcee, 4), (apertus, 6), (nanochat, 6), (exaone4, 6),
    )
)  # fmt: skip
