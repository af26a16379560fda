"""Mistral, Qwen, Gemma, Phi 3, StarCoder 2 and GPT-2."""

import random

import transformers
from packaging.version import Version

from tests.native_rows.llama import rope, sizes
from tests.parity import Row


# Stock classes of 5.17 fail on a second long input where each layer type has a long RoPE, and Phi-3 forgets its prompt
# when it drops the cache in the middle of generation; 5.23 does neither.
LONGROPE_WORKS = Version(transformers.__version__) >= Version("5.23")


def windows(rng: random.Random, layers: int):
    """A window shorter than the row's long input, in a random choice of layers."""
    return {
        "sliding_window": rng.choice((3, 7, 16)),
        "layer_types": [rng.choice(("full_attention", "sliding_attention")) for _ in range(layers)],
    }


def mistral(rng: random.Random):
    config = sizes(rng)
    return config | {
        "rope_parameters": rope(rng, config["head_dim"]),
        "rms_norm_eps": rng.choice((1e-6, 1e-3)),
        "hidden_act": rng.choice(("silu", "gelu", "relu")),
        "sliding_window": rng.choice((None, 2, 3, 7, 64)),
        "attention_dropout": rng.choice((0, 0.1)),
    }


def qwen_window(rng: random.Random):
    """What decides which layers slide: the switch and a number of layers, or a list."""
    config = {"use_sliding_window": rng.random() < 0.7, "sliding_window": rng.choice((None, 3, 7, 64))}
    if config["use_sliding_window"] and config["sliding_window"] is not None and rng.random() < 0.5:
        return config | {"layer_types": windows(rng, 3)["layer_types"]}
    return config | {"max_window_layers": rng.choice((0, 1, 2, 28))}


def qwen2(rng: random.Random):
    config = sizes(rng)
    if rng.random() < 0.5:
        del config["head_dim"]
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return (
        config
        | {
            "rope_parameters": rope(rng, head_dim),
            "rms_norm_eps": rng.choice((1e-6, 1e-3)),
            "hidden_act": rng.choice(("silu", "gelu")),
        }
        | qwen_window(rng)
    )


def qwen3(rng: random.Random):
    config = sizes(rng)
    return (
        config
        | {
            "rope_parameters": rope(rng, config["head_dim"]),
            "rms_norm_eps": rng.choice((1e-6, 1e-3)),
            "hidden_act": rng.choice(("silu", "gelu")),
            "attention_bias": rng.random() < 0.5,
        }
        | qwen_window(rng)
    )


def gemma(rng: random.Random):
    config = sizes(rng)
    return config | {
        "rope_parameters": rope(rng, config["head_dim"]),
        "rms_norm_eps": rng.choice((1e-6, 1e-3)),
        "hidden_act": rng.choice(("gelu_pytorch_tanh", "gelu", "silu")),
        "attention_bias": rng.random() < 0.5,
        "use_bidirectional_attention": rng.choice((None, False)),
    }


def vaultgemma(rng: random.Random):
    config = sizes(rng)
    options = {
        "rope_parameters": rope(rng, config["head_dim"]),
        "rms_norm_eps": rng.choice((1e-6, 1e-3)),
        "hidden_activation": rng.choice(("gelu_pytorch_tanh", "gelu", "silu")),
        "attention_bias": rng.random() < 0.5,
        "query_pre_attn_scalar": rng.choice((8, 11, 144)),
        "attn_logit_softcapping": rng.choice((None, 2.0, 50.0)),
        "final_logit_softcapping": rng.choice((None, 3.0, 30.0)),
        "sliding_window": 5,
    }
    return config | options | (windows(rng, 3) if rng.random() < 0.7 else {})


def gemma2(rng: random.Random):
    return vaultgemma(rng) | {"use_bidirectional_attention": rng.choice((None, False))}


def gemma3(rng: random.Random):
    config = gemma2(rng)
    if "layer_types" not in config and rng.random() < 0.5:
        config["sliding_window_pattern"] = rng.choice((2, 3))
    nested = {kind: rope(rng, config["head_dim"]) for kind in ("full_attention", "sliding_attention")}
    if not LONGROPE_WORKS:
        nested = {
            kind: {"rope_type": "default", "rope_theta": 331.0} if entry["rope_type"] == "longrope" else entry
            for kind, entry in nested.items()
        }
    return config | {"rope_parameters": nested}


def gpt2(rng: random.Random):
    heads = rng.choice((1, 2, 3, 4))
    width = heads * rng.choice((7, 8, 12))
    return {
        "vocab_size": rng.choice((71, 72)),
        "n_positions": 64,
        "n_embd": width,
        "n_layer": 3,
        "n_head": heads,
        "n_inner": rng.choice((None, 4 * width, 40, 55)),
        "activation_function": rng.choice(("gelu_new", "gelu", "relu", "silu", "tanh", "gelu_pytorch_tanh")),
        "layer_norm_epsilon": rng.choice((1e-5, 1e-2)),
        "scale_attn_weights": rng.random() < 0.6,
        "scale_attn_by_inverse_layer_idx": rng.random() < 0.5,
        "reorder_and_upcast_attn": rng.random() < 0.5,
        "tie_word_embeddings": rng.random() < 0.6,
        "attn_pdrop": rng.choice((0.0, 0.1)),
        "resid_pdrop": rng.choice((0.0, 0.2)),
        "embd_pdrop": rng.choice((0, 0.3)),
        "summary_type": rng.choice(("cls_index", "last")),
        "pad_token_id": rng.choice((None, 0, 5)),
        "bos_token_id": 1,
        "eos_token_id": rng.choice((2, [2, 3])),
    }


def phi3(rng: random.Random):
    config = sizes(rng, hidden_size=rng.choice((32, 48, 64)), rms_norm_eps=rng.choice((1e-5, 1e-3)))
    del config["head_dim"]
    partial = rng.choice((0.5, 0.75, 1.0))
    pairs = int(config["hidden_size"] // config["num_attention_heads"] * partial) // 2
    rope_parameters = {"rope_type": "default", "rope_theta": rng.choice((10000.0, 331.0))}
    if rng.random() < 0.6:
        rope_parameters |= {
            # The class takes every other name for a long RoPE.
            "rope_type": rng.choice(("longrope", "longrope", "yarn")),
            "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
            "long_factor": [2.0 + 0.3 * i for i in range(pairs)],
        } | rng.choice(({}, {"factor": 3.0}, {"attention_factor": 1.3}))
    if partial != 1.0 or rng.random() < 0.5:
        rope_parameters["partial_rotary_factor"] = partial
    return config | {
        "rope_parameters": rope_parameters,
        # Passed in the middle of generation, by the long input alone, or never.
        "original_max_position_embeddings": rng.choice((16, 30, 4096) if LONGROPE_WORKS else (30, 4096)),
        "hidden_act": rng.choice(("silu", "gelu")),
        "sliding_window": rng.choice((None, 3, 7, 64)),
        "resid_pdrop": rng.choice((0.0, 0.2)),
        "embd_pdrop": rng.choice((0.0, 0.2)),
    }


def starcoder2(rng: random.Random):
    config = sizes(rng)
    if rng.random() < 0.5:
        del config["head_dim"]
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config | {
        "rope_parameters": rope(rng, head_dim),
        "norm_epsilon": rng.choice((1e-5, 1e-2)),
        "hidden_act": rng.choice(("gelu_pytorch_tanh", "gelu", "relu")),
        "use_bias": rng.random() < 0.6,
        "sliding_window": rng.choice((None, 3, 7, 64)),
        "residual_dropout": rng.choice((0.0, 0.2)),
        "embedding_dropout": rng.choice((0.0, 0.2)),
    }


ROWS = (
    Row("mistral", mistral, seeds=6),
    Row("qwen2", qwen2, seeds=8),
    Row("qwen3", qwen3, seeds=8),
    Row("gpt2", gpt2, seeds=8),
    Row("gemma", gemma, seeds=6),
    Row("gemma2", gemma2, seeds=8, backends=("eager",)),
    Row("gemma3_text", gemma3, seeds=8),
    Row("phi3", phi3, seeds=8),
    Row("starcoder2", starcoder2, seeds=6),
    Row("vaultgemma", vaultgemma, seeds=6, backends=("eager",)),
)
