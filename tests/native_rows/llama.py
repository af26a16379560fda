"""Llama and what shares its options; also the random pieces that other rows use."""

import random

from tests.parity import Row


def sizes(rng: random.Random, heads: tuple[int, ...] = (2, 4), **overrides):
    """Tiny sizes: head_dim unlike hidden_size / heads, and grouped key/value heads."""
    num_heads = rng.choice(heads)
    return {
        "vocab_size": 71,
        "hidden_size": 32,
        "intermediate_size": rng.choice((40, 56)),
        "num_hidden_layers": 3,
        "num_attention_heads": num_heads,
        "num_key_value_heads": rng.choice([n for n in (1, 2, 4) if num_heads % n == 0]),
        "head_dim": rng.choice((8, 16)),
        "max_position_embeddings": 64,
        "tie_word_embeddings": rng.random() < 0.5,
        "pad_token_id": rng.choice((None, 0, 5)),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **overrides,
    }


def rope(rng: random.Random, head_dim: int, partial: float | None = None):
    """RoPE parameters of a random type; the original context is shorter than the row's long input."""
    parameters = {"rope_type": "default", "rope_theta": rng.choice((10000.0, 500000.0, 331.0))}
    kind = rng.choice(("default", "linear", "dynamic", "yarn", "longrope", "llama3"))
    width = int(head_dim * (partial or 1.0)) // 2
    parameters |= {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
        "longrope": {
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0 + 0.1 * i for i in range(width)],
            "long_factor": [2.0 + 0.3 * i for i in range(width)],
        },
        "llama3": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    }[kind] | {"rope_type": kind}  # fmt: skip
    if partial is not None:
        parameters["partial_rotary_factor"] = partial
    return parameters


def llama(rng: random.Random):
    config = sizes(rng)
    return config | {
        "rope_parameters": rope(rng, config["head_dim"]),
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "rms_norm_eps": rng.choice((1e-6, 1e-3)),
        "hidden_act": rng.choice(("silu", "gelu")),
        "pretraining_tp": rng.choice((1, 2)),
    }


def internlm3(rng: random.Random):
    config = llama(rng)
    del config["pretraining_tp"]
    # The class takes one flag for all biases.
    return config | {"mlp_bias": config["attention_bias"]}


def iquestcoder(rng: random.Random):
    config = llama(rng)
    del config["pretraining_tp"]
    return config


def bitnet(rng: random.Random):
    config = iquestcoder(rng)
    # The norm on the heads' outputs has the width of the model.
    del config["mlp_bias"], config["head_dim"]
    width = config["hidden_size"] // config["num_attention_heads"]
    return config | {"rope_parameters": rope(rng, width), "hidden_act": rng.choice(("relu2", "silu"))}


ROWS = (
    Row("llama", llama, seeds=8),
    Row("internlm3", internlm3),
    Row("iquestcoder", iquestcoder),
    Row("exaone", iquestcoder),
    Row("bitnet", bitnet),
)
