"""OLMo 1 to 3."""

import random

import transformers
from packaging.version import parse

from tests.native_rows.granite import undeclared_head_dim
from tests.native_rows.llama import rope, sizes
from tests.parity import Row


# The stock class of older versions crashes at the second input past the original context.
BROKEN_BY_TYPE = () if parse(transformers.__version__) >= parse("5.23") else ("longrope",)


def shared(rng: random.Random):
    """Sizes and options of all three, and the width of a head."""
    config = sizes(rng)
    head_dim = undeclared_head_dim(rng, config)
    config["attention_bias"] = rng.random() < 0.5
    config["hidden_act"] = rng.choice(("silu", "gelu"))
    return config, head_dim


def olmo(rng: random.Random):
    config, head_dim = shared(rng)
    return config | {"rope_parameters": rope(rng, head_dim), "clip_qkv": rng.choice((None, 0.8, 2.0))}


def olmo2(rng: random.Random):
    config, head_dim = shared(rng)
    return config | {"rope_parameters": rope(rng, head_dim), "rms_norm_eps": rng.choice((1e-5, 1e-3))}


def olmo3(rng: random.Random):
    config, head_dim = shared(rng)
    config |= {"sliding_window": rng.choice((3, 7)), "rms_norm_eps": rng.choice((1e-5, 1e-3))}
    if rng.random() < 0.7:
        config["layer_types"] = [rng.choice(("full_attention", "sliding_attention")) for _ in range(3)]
    if rng.random() < 0.8:
        kinds = ("full_attention", "sliding_attention")
        parameters = {kind: rope(rng, head_dim) for kind in kinds if rng.random() < 0.8}
        config["rope_parameters"] = {kind: p for kind, p in parameters.items() if p["rope_type"] not in BROKEN_BY_TYPE}
    return config


ROWS = (Row("olmo", olmo, seeds=8), Row("olmo2", olmo2, seeds=8), Row("olmo3", olmo3, seeds=8))
