"""GPT-NeoX, GPT-J, CodeGen, Phi, Falcon, StableLM, Persimmon and Jais 2."""

import random

from tests.native_rows.llama import rope, sizes
from tests.parity import Row


def square(rng: random.Random, heads: tuple[int, ...] = (2, 4), **overrides):
    """Sizes of a type whose heads share `hidden_size`, each with its own key and value."""
    config = sizes(rng, heads, head_dim=rng.choice((8, 12, 16, 20)), **overrides)
    config["hidden_size"] = config["num_attention_heads"] * config.pop("head_dim")
    del config["num_key_value_heads"]
    return config


def partial_rope(rng: random.Random, config: dict, own_part: float):
    """RoPE parameters with a part of the head or, absent, the class's own; also under the names of old checkpoints."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    parts = [part for part in (0.25, 0.5, 0.75, 1.0) if head_dim * part % 2 == 0 and head_dim * part >= 4]
    if own_part in parts and rng.random() < 0.2:
        return {"rope_parameters": None}
    parameters = rope(rng, head_dim, partial=rng.choice(parts))
    if rng.random() < 0.3:
        theta, part = parameters.pop("rope_theta"), parameters.pop("partial_rotary_factor")
        scaling = None if parameters["rope_type"] == "default" else parameters
        return {"rope_scaling": scaling, "rope_theta": theta, "partial_rotary_factor": part}
    return {"rope_parameters": parameters}


def gpt_neox(rng: random.Random):
    config = square(rng)
    rope_parameters = partial_rope(rng, config, 0.25)
    if "rope_theta" in rope_parameters:
        rope_parameters["rotary_emb_base"] = rope_parameters.pop("rope_theta")
        rope_parameters["rotary_pct"] = rope_parameters.pop("partial_rotary_factor")
    elif rng.random() < 0.2:
        # A part of 3 or 5 channels, which the class rounds up to whole pairs.
        config["hidden_size"] = rng.choice((12, 20)) * config["num_attention_heads"]
        rope_parameters = {"rotary_pct": 0.25}
    return (
        config
        | rope_parameters
        | {
            "use_parallel_residual": rng.random() < 0.5,
            "attention_bias": rng.random() < 0.5,
            "layer_norm_eps": rng.choice((1e-5, 1e-3)),
            "hidden_act": rng.choice(("gelu", "gelu_fast", "silu")),
            "hidden_dropout": rng.choice((0.0, 0.1)),
            "attention_dropout": rng.choice((0.0, 0.2)),
            "classifier_dropout": rng.choice((0.1, 0.3)),
            "is_decoder": rng.random() < 0.5,
        }
    )


def phi(rng: random.Random):
    config = square(rng) | {"num_key_value_heads": rng.choice((None, 1, 2))}
    if rng.random() < 0.3:
        # The class reads the key, without declaring it, but not for the norms of queries and keys.
        config |= {"head_dim": config["hidden_size"] // config["num_attention_heads"] + 8}
        parameters = rope(rng, config["head_dim"], partial=rng.choice((0.5, 1.0)))
        options = {"rope_parameters": parameters, "qk_layernorm": False}
    else:
        options = partial_rope(rng, config, 0.5) | {"qk_layernorm": rng.random() < 0.5}
    return (
        config
        | options
        | {
            "layer_norm_eps": rng.choice((1e-5, 1e-3)),
            "hidden_act": rng.choice(("gelu_new", "gelu")),
            "resid_pdrop": rng.choice((0.0, 0.1)),
            "embd_pdrop": rng.choice((0.0, 0.2)),
            "attention_dropout": rng.choice((0.0, 0.3)),
        }
    )


def stablelm(rng: random.Random):
    config = square(rng)
    heads = config["num_attention_heads"]
    return (
        config
        | partial_rope(rng, config, 0.25)
        | {
            "num_key_value_heads": rng.choice([n for n in (1, 2, 4) if heads % n == 0]),
            "use_qkv_bias": rng.random() < 0.5,
            "qk_layernorm": rng.random() < 0.5,
            "use_parallel_residual": rng.random() < 0.5,
            "layer_norm_eps": rng.choice((1e-5, 1e-3)),
            "hidden_act": rng.choice(("silu", "gelu")),
            "hidden_dropout": rng.choice((0.0, 0.1)),
            "attention_dropout": rng.choice((0.0, 0.2)),
        }
    )


def falcon(rng: random.Random):
    config = square(rng, (1, 2, 4, 6))
    heads = config["num_attention_heads"]
    block = rng.choice(("multi query", "groups", "groups", "sequential", "parallel heads"))
    config |= {
        "multi query": {"multi_query": True, "parallel_attn": rng.random() < 0.7},
        "groups": {
            "new_decoder_architecture": True,
            "multi_query": rng.random() < 0.5,
            "num_kv_heads": rng.choice([n for n in (1, 2, 3, 6) if heads % n == 0]),
            "num_ln_in_parallel_attn": rng.choice((None, 1, 2)),
        },
        "sequential": {"multi_query": False, "parallel_attn": False},
        "parallel heads": {"multi_query": False, "num_ln_in_parallel_attn": rng.choice((None, 1))},
    }[block]
    del config["intermediate_size"]
    return config | {
        "ffn_hidden_size": rng.choice((None, 40, 56)),
        "alibi": rng.random() < 0.4,
        "bias": rng.random() < 0.5,
        "rope_parameters": rope(rng, config["hidden_size"] // heads),
        "layer_norm_epsilon": rng.choice((1e-5, 1e-3)),
        "activation": rng.choice(("gelu", "gelu_new")),
        "hidden_dropout": rng.choice((0.0, 0.1)),
        "attention_dropout": rng.choice((0.0, 0.2)),
    }


def falcon_backends(config) -> tuple[str, ...]:
    """The stock class adds ALiBi once in sdpa, as it was trained, but twice in eager attention."""
    return ("sdpa",) if config.alibi else ("eager", "sdpa")


def persimmon(rng: random.Random):
    config = square(rng)
    return (
        config
        | partial_rope(rng, config, 0.5)
        | {
            "qk_layernorm": rng.random() < 0.7,
            "layer_norm_eps": rng.choice((1e-5, 1e-3)),
            "hidden_act": rng.choice(("relu2", "gelu")),
            "hidden_dropout": rng.choice((0.0, 0.1)),
            "attention_dropout": rng.choice((0.0, 0.2)),
        }
    )


def jais2(rng: random.Random):
    config = sizes(rng)
    return config | {
        "rope_parameters": rope(rng, config["head_dim"]),
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "layer_norm_eps": rng.choice((1e-5, 1e-3)),
        "hidden_act": rng.choice(("relu2", "gelu")),
        "attention_dropout": rng.choice((0.0, 0.2)),
    }


def gptj(rng: random.Random):
    config = square(rng, (1, 2, 4))
    heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
    head_dim = hidden_size // heads
    return {
        "vocab_size": config["vocab_size"],
        "n_embd": hidden_size,
        "n_layer": config["num_hidden_layers"],
        "n_head": heads,
        "n_positions": config["max_position_embeddings"],
        "n_inner": rng.choice((None, 40, 4 * hidden_size)),
        "rotary_dim": rng.choice(range(2, head_dim + 1, 2)),
        "activation_function": rng.choice(("gelu_new", "gelu")),
        "layer_norm_epsilon": rng.choice((1e-5, 1e-3)),
        "attn_pdrop": rng.choice((0.0, 0.1)),
        "resid_pdrop": rng.choice((0.0, 0.2)),
        "embd_pdrop": rng.choice((0.0, 0.3)),
        "tie_word_embeddings": config["tie_word_embeddings"],
        "pad_token_id": config["pad_token_id"],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def codegen(rng: random.Random):
    config = gptj(rng)
    # The class takes multiples of four heads.
    config["n_embd"] *= 4
    config["n_head"] *= 4
    return config | {"n_ctx": rng.choice((64, 2048))}


ROWS = (
    Row("gpt_neox", gpt_neox, seeds=8, heads=("base", "token_classification", "question_answering")),
    Row("gptj", gptj, backends=("eager",), seeds=6, heads=("base", "question_answering")),
    Row("codegen", codegen, backends=("eager",), seeds=6, heads=("base",)),
    Row("phi", phi, seeds=8, heads=("base", "token_classification")),
    Row(
        "falcon",
        falcon,
        seeds=12,
        backends=falcon_backends,
        heads=("base", "token_classification", "question_answering"),
    ),
    Row("stablelm", stablelm, seeds=8, heads=("base", "token_classification")),
    Row("persimmon", persimmon, heads=("base", "token_classification")),
    Row("jais2", jais2, heads=("base",)),
)
