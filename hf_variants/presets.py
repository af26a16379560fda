"""Named variants: the axes of published architectures, independent of size.

A preset holds what the architecture fixes and nothing else. Sizes are yours (key/value heads too, unless having one is
part of the architecture), and so is what a training recipe decides: dropout, z-loss, initialisation, special tokens.
Where transformers has the family, a preset agrees with the defaults of its config class; Granite's are all neutral
there, so its multipliers are those of the released models.
"""

import copy
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .model.configuration_variant import VariantConfig


@dataclass(frozen=True)
class Preset:
    """
    One published architecture.

    Args:
        description (`str`): what sets it apart, in one line.
        source (`str`): transformers' model type and the paper, as far as there are such.
        axes (`dict`): fields of `VariantConfig`. A function stands for a value that depends on the sizes: it gets
            a dictionary of all fields, with defaults where neither the preset nor the user sets one.
    """

    description: str
    source: str
    axes: dict[str, Any]


def _root_of_width(fields: dict[str, Any]) -> float:
    return fields["hidden_size"] ** 0.5


def _every_fourth_without_rotation(fields: dict[str, Any]) -> list[int]:
    return [int((layer_idx + 1) % 4 != 0) for layer_idx in range(fields["num_hidden_layers"])]


def _head_dim(fields: dict[str, Any]) -> int:
    return fields["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"]


# Axes that several presets share.

_LAYERNORM = {"norm_type": "layernorm", "norm_eps": 1e-5}
_LAYERNORM_WITHOUT_BIAS = {**_LAYERNORM, "norm_bias": False}
_ALL_BIASES = {"attention_bias": True, "mlp_bias": True}
_VANILLA = {
    **_LAYERNORM,
    **_ALL_BIASES,
    "norm_placement": "post",
    "ffn_type": "mlp",
    "hidden_act": "relu",
    "position_embedding_type": "sinusoidal",
    "sinusoidal_layout": "interleaved",
    "embedding_multiplier": _root_of_width,
    "tie_word_embeddings": True,
}
_GEMMA = {
    "norm_unit_offset": True,
    "norm_casting_mode": "gemma",
    "hidden_act": "gelu_pytorch_tanh",
    "embedding_multiplier": _root_of_width,
    "embedding_multiplier_in_weight_dtype": True,
    "tie_word_embeddings": True,
}
_COHERE = {
    **_LAYERNORM_WITHOUT_BIAS,
    "norm_casting_mode": "gemma",
    "parallel_block": "shared_norm",
    "parallel_sum_order": "residual_first",
    "rope_interleaved": True,
    "rope_in_float32": True,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
}
_OLMO2 = {
    "norm_eps": 1e-5,
    "norm_casting_mode": "gemma",
    "norm_placement": "branch",
    "qk_norm": "full",
    "rope_in_float32": True,
    "rope_table_in_float32": True,
}


PRESETS: dict[str, Preset] = {
    "vanilla": Preset(
        "the 2017 Transformer's decoder: post-norm LayerNorm, ReLU, sinusoidal positions, embeddings times sqrt(d)",
        "https://arxiv.org/abs/1706.03762",
        _VANILLA,
    ),
    "deepnorm": Preset(
        "vanilla with DeepNorm: residuals scaled up and weights initialised smaller with depth",
        "https://arxiv.org/abs/2203.00555",
        {**_VANILLA, "norm_placement": "deepnorm"},
    ),
    "gpt2": Preset(
        "pre-norm LayerNorm, tanh GELU, learned positions, biases everywhere",
        "gpt2",
        {
            **_LAYERNORM,
            **_ALL_BIASES,
            "ffn_type": "mlp",
            "hidden_act": "gelu_new",
            "attention_softmax_in_float32": False,
            "position_embedding_type": "learned",
            "token_type_table": "tokens",
            "tie_word_embeddings": True,
        },
    ),
    "opt": Preset(
        "GPT-2's shape with ReLU, positions counted over real tokens and offset by 2",
        "opt, https://arxiv.org/abs/2205.01068",
        {
            **_LAYERNORM,
            **_ALL_BIASES,
            "ffn_type": "mlp",
            "hidden_act": "relu",
            "scale_query": True,
            "position_embedding_type": "learned",
            "position_offset": 2,
            "position_ids_source": "attention_mask",
            "tie_word_embeddings": True,
        },
    ),
    "bloom": Preset(
        "ALiBi counted over real tokens, LayerNorm on the embeddings, tanh GELU, biases everywhere",
        "bloom, https://arxiv.org/abs/2211.05100",
        {
            **_LAYERNORM,
            **_ALL_BIASES,
            "embedding_norm": True,
            "ffn_type": "mlp",
            # The tanh form as BLOOM writes it; `gelu_new` and `gelu_pytorch_tanh` round differently.
            "hidden_act": "gelu_fast",
            "position_embedding_type": "alibi",
            "alibi_form": "key_position",
            "attention_score_form": "biased",
            "tie_word_embeddings": True,
        },
    ),
    "mpt": Preset(
        "ALiBi, GELU, no bias anywhere, LayerNorm's included",
        "mpt",
        {
            **_LAYERNORM_WITHOUT_BIAS,
            "ffn_type": "mlp",
            "hidden_act": "gelu",
            "position_embedding_type": "alibi",
            "alibi_form": "key_offset",
            "alibi_slope_order": "mpt",
            "alibi_in_float32": True,
            "tie_word_embeddings": True,
        },
    ),
    "gpt-neox": Preset(
        "attention and FFN in parallel with a norm each, a quarter of each head rotated, biases everywhere",
        "gpt_neox, https://arxiv.org/abs/2204.06745",
        {
            **_LAYERNORM,
            **_ALL_BIASES,
            "parallel_block": "two_norms",
            "ffn_type": "mlp",
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    ),
    "gptj": Preset(
        "attention and FFN in parallel on one norm, interleaved RoPE on a quarter of each head, no attention biases",
        "gptj",
        {
            **_LAYERNORM,
            "parallel_block": "shared_norm",
            "ffn_type": "mlp",
            "hidden_act": "gelu_new",
            "mlp_bias": True,
            "heads_first_from": "scores",
            "attention_score_form": "divided",
            "attention_scores_in_float32": True,
            "token_type_table": "tokens",
            "rope_interleaved": True,
            "rope_table_stored": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            "lm_head_bias": True,
        },
    ),
    "palm": Preset(
        "attention and FFN in parallel on one norm, SwiGLU of width 4d, one key/value head, no biases",
        "https://arxiv.org/abs/2204.02311",
        {
            **_LAYERNORM_WITHOUT_BIAS,
            "parallel_block": "shared_norm",
            "num_key_value_heads": 1,
            "intermediate_size": lambda fields: 4 * fields["hidden_size"],
            "logit_scale": lambda fields: fields["hidden_size"] ** -0.5,
            "tie_word_embeddings": True,
        },
    ),
    "falcon": Preset(
        "attention and FFN in parallel on one norm, one key/value head, GELU, biases in the norms alone",
        "falcon, https://arxiv.org/abs/2311.16867",
        {
            **_LAYERNORM,
            "parallel_block": "shared_norm",
            "num_key_value_heads": 1,
            "ffn_type": "mlp",
            "hidden_act": "gelu",
            "attention_score_form": "divided",
            "attention_softmax_in_float32": False,
            "broadcast_key_value": True,
            "tie_word_embeddings": True,
        },
    ),
    "phi": Preset(
        "attention and FFN in parallel on one norm, half of each head rotated, biases everywhere, the head too",
        "phi, https://arxiv.org/abs/2309.05463",
        {
            **_LAYERNORM,
            **_ALL_BIASES,
            "parallel_block": "shared_norm",
            "ffn_type": "mlp",
            "hidden_act": "gelu_new",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "lm_head_bias": True,
        },
    ),
    "command-r": Preset(
        "attention and FFN in parallel on one LayerNorm without bias, SwiGLU, interleaved RoPE, scaled logits",
        "cohere",
        {**_COHERE, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "command-a": Preset(
        "command-r with three sliding layers with RoPE to each full layer without positions",
        "cohere2, https://arxiv.org/abs/2504.00698",
        {
            **_COHERE,
            "layer_types": "SSSF",
            "sliding_window": 4096,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": None,
            },
        },
    ),
    "llama": Preset(
        "pre-norm RMSNorm, SwiGLU, RoPE, no biases",
        "llama, https://arxiv.org/abs/2302.13971",
        {"norm_eps": 1e-6},
    ),
    "mistral": Preset(
        "llama with a sliding window in every layer",
        "mistral, https://arxiv.org/abs/2310.06825",
        {"layer_types": "S", "sliding_window": 4096},
    ),
    "qwen2": Preset(
        "llama with biases on queries, keys and values",
        "qwen2, https://arxiv.org/abs/2407.10671",
        {"attention_bias": True, "attention_output_bias": False},
    ),
    "qwen3": Preset(
        "llama with an RMSNorm on every query and key head",
        "qwen3, https://arxiv.org/abs/2505.09388",
        {"qk_norm": "head"},
    ),
    "smollm3": Preset(
        "llama without positions in every fourth layer, tied",
        "smollm3",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 2000000.0},
            "no_rope_layers": _every_fourth_without_rotation,
            "tie_word_embeddings": True,
        },
    ),
    "granite": Preset(
        "llama with multipliers on embeddings, residual branches, attention scores and logits (Granite 3)",
        "granite",
        {
            "norm_eps": 1e-5,
            "embedding_multiplier": 12.0,
            "embedding_multiplier_position": "stack",
            "residual_multiplier": 0.22,
            # The released 2B and 8B models: 1/64 and 1/128 of the scores, 1/8 and 1/16 of the logits.
            "attention_scaling": lambda fields: 1 / _head_dim(fields),
            "logit_scale": lambda fields: 256 / fields["hidden_size"],
            "logit_scale_by_division": True,
            "tie_word_embeddings": True,
        },
    ),
    "gemma": Preset(
        "RMSNorm with weight 1 + w, GeGLU, embeddings times sqrt(d), tied",
        "gemma, https://arxiv.org/abs/2403.08295",
        _GEMMA,
    ),
    "gemma2": Preset(
        "gemma with norms on both sides of every sublayer, soft-capped scores and logits, alternating windows",
        "gemma2, https://arxiv.org/abs/2408.00118",
        {
            **_GEMMA,
            "norm_placement": "sandwich",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "layer_types": "SF",
            "sliding_window": 4096,
        },
    ),
    "gemma3": Preset(
        "gemma2 with query and key norms for soft caps, five sliding layers to a full one, a RoPE base for each",
        "gemma3_text, https://arxiv.org/abs/2503.19786",
        {
            **_GEMMA,
            "norm_placement": "sandwich",
            "qk_norm": "head",
            "layer_types": "SSSSSF",
            "sliding_window": 4096,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            },
        },
    ),
    "olmo": Preset(
        "llama with a LayerNorm that learns nothing",
        "olmo, https://arxiv.org/abs/2402.00838",
        {
            "norm_type": "layernorm",
            "norm_eps": 1e-5,
            "norm_affine": False,
            "norm_casting_mode": "gemma",
            "rope_in_float32": True,
            "rope_table_in_float32": True,
        },
    ),
    "olmo2": Preset(
        "llama with norms after the sublayers, inside the residual branches, and over all query and key heads",
        "olmo2, https://arxiv.org/abs/2501.00656",
        _OLMO2,
    ),
    "olmo3": Preset(
        "olmo2 with three sliding layers to a full one",
        "olmo3",
        {
            **_OLMO2,
            "layer_types": "SSSF",
            "sliding_window": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "exaone4": Preset(
        "norms after the sublayers and on query and key heads; three sliding layers to a full one without positions",
        "exaone4, https://arxiv.org/abs/2507.11407",
        {
            "norm_eps": 1e-5,
            "norm_placement": "branch",
            "qk_norm": "head",
            "layer_types": "SSSF",
            "sliding_window": 4096,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": None,
            },
        },
    ),
    "glm4": Preset(
        "norms on both sides of every sublayer, interleaved RoPE on half of each head, biases on q, k and v",
        "glm4, https://arxiv.org/abs/2406.12793",
        {
            "norm_eps": 1.5625e-7,
            "norm_placement": "sandwich",
            "fused_gate_up": True,
            "attention_bias": True,
            "attention_output_bias": False,
            "rope_interleaved": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "nemotron": Preset(
        "LayerNorm with weight 1 + w, squared ReLU, half of each head rotated, no biases but the norms'",
        "nemotron, https://arxiv.org/abs/2402.16819",
        {
            **_LAYERNORM,
            "norm_unit_offset": True,
            "ffn_type": "mlp",
            "hidden_act": "relu2",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "starcoder2": Preset(
        "RoPE in GPT-2's shape: LayerNorm, ungated tanh GELU, biases everywhere",
        "starcoder2, https://arxiv.org/abs/2402.19173",
        {
            **_LAYERNORM,
            **_ALL_BIASES,
            "ffn_type": "mlp",
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
    ),
    "stablelm": Preset(
        "llama with LayerNorm and a quarter of each head rotated",
        "stablelm",
        {
            **_LAYERNORM,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    ),
    "nanochat": Preset(
        "weightless RMSNorm, on the embeddings too, and on queries and keys after RoPE; squared ReLU, capped logits",
        "nanochat",
        {
            "norm_affine": False,
            "embedding_norm": True,
            "ffn_type": "mlp",
            "hidden_act": "relu2",
            "qk_norm": "head",
            "qk_norm_after_rope": True,
            "rope_reversed": True,
            "final_logit_softcapping": 15.0,
        },
    ),
}


def presets() -> dict[str, str]:
    """Every preset's name with one line on what sets it apart and where it comes from."""
    return {name: f"{preset.description} ({preset.source})" for name, preset in PRESETS.items()}


def resolve_preset(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """
    The arguments of `VariantConfig` for a preset.

    Args:
        name (`str`): a key of `presets()`.
        overrides (`dict`): fields of `VariantConfig`; they win over the preset's, and values that depend on sizes
            are computed from them. `rope_theta` and `partial_rotary_factor` win inside the preset's RoPE parameters.

    Raises:
        ValueError: if there is no such preset.
    """
    if name not in PRESETS:
        similar = [known for known, line in presets().items() if name and name.lower() in line.lower()]
        similar = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.6) or similar[:3]
        hint = f"Did you mean {' or '.join(f'`{known}`' for known in similar)}? " if similar else ""
        raise ValueError(f"There is no preset `{name}`. {hint}`hf_variants.presets()` lists all {len(PRESETS)}.")
    axes = copy.deepcopy(PRESETS[name].axes)
    if "rope_parameters" not in overrides:
        _override_rope(axes.get("rope_parameters"), overrides)
    axes |= overrides
    defaults = {key: field.default for key, field in VariantConfig.__dataclass_fields__.items()}
    fields = defaults | axes
    return {key: value(fields) if isinstance(value, Callable) else value for key, value in axes.items()}


def _override_rope(rope_parameters: dict | None, overrides: dict[str, Any]) -> None:
    """Put the two legacy keywords where transformers reads them: it prefers what a dictionary already has."""
    if rope_parameters is None:
        return
    nested = [value for value in rope_parameters.values() if isinstance(value, dict)]
    for entry in nested or [rope_parameters]:
        entry.update({key: overrides[key] for key in ("rope_theta", "partial_rotary_factor") if key in overrides})


VariantConfig.resolve_preset = staticmethod(resolve_preset)
