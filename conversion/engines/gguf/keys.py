"""Every key of a GGUF file that a config has something to say for, under the names of the package `gguf`."""

import math
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ....model.configuration_variant import VariantConfig
from ....model.configuration_variant_seq2seq import VariantSeq2SeqConfig
from ....model.positions import RotaryEmbedding
from ...gguf_files.container import gguf_package
from ..frequencies import frequency_factors


def keys_for(config: VariantConfig | VariantSeq2SeqConfig, architecture: str) -> dict[str, Any]:
    """
    By full names, the keys that a config gives a value for; an architecture reads a part of them.

    Args:
        config: ours; of an encoder-decoder the encoder speaks for both stacks where there is one key.
        architecture: as llama.cpp calls it.
    """
    names = gguf_package().Keys
    is_pair = not isinstance(config, VariantConfig)
    stack = config.encoder if is_pair else config
    found = {
        **_sizes(names, stack),
        **_attention(names, stack, is_pair),
        **_scales(names, stack),
        **_rope(names, stack),
    }
    if is_pair:
        found[names.LLM.DECODER_BLOCK_COUNT] = config.decoder.num_hidden_layers
        found[names.LLM.DECODER_START_TOKEN_ID] = config.decoder_start_token_id
    elif not config.is_causal:
        # BERT's loader wants it, also where there is no table of types.
        found[names.Tokenizer.TOKEN_TYPE_COUNT] = max(config.type_vocab_size, 1)
    named = {name.format(arch=architecture): value for name, value in found.items()}
    return {name: value for name, value in named.items() if value is not None}


# What counts of what; a layer without it has none.
SUBLAYER = {"num_attention_heads": "self_attn", "num_key_value_heads": "self_attn", "intermediate_size": "mlp"}


def _each(config: VariantConfig, field: str) -> Any:
    """The value of a field, or one for every layer where they differ."""
    values = [
        0 if SUBLAYER[field] in getattr(layer, "skip", ()) else getattr(layer, field)
        for layer in config.per_layer_config
    ]
    return values[0] if len(set(values)) == 1 else values


def _sizes(names: Any, config: VariantConfig) -> dict[str, Any]:
    rms = config.norm_type == "rmsnorm"
    return {
        names.LLM.VOCAB_SIZE: config.vocab_size,
        names.LLM.CONTEXT_LENGTH: config.max_position_embeddings,
        names.LLM.EMBEDDING_LENGTH: config.hidden_size,
        names.LLM.BLOCK_COUNT: config.num_hidden_layers,
        names.LLM.FEED_FORWARD_LENGTH: _each(config, "intermediate_size"),
        names.LLM.USE_PARALLEL_RESIDUAL: config.parallel_block != "none",
        names.Attention.HEAD_COUNT: _each(config, "num_attention_heads"),
        names.Attention.HEAD_COUNT_KV: _each(config, "num_key_value_heads"),
        names.Attention.KEY_LENGTH: config.head_dim,
        names.Attention.VALUE_LENGTH: config.head_dim,
        names.Attention.LAYERNORM_RMS_EPS if rms else names.Attention.LAYERNORM_EPS: float(config.norm_eps),
    }


def _attention(names: Any, config: VariantConfig, is_pair: bool) -> dict[str, Any]:
    found = {
        # Decoders, and encoders that have one, are what every reader takes a file for.
        names.Attention.CAUSAL: None if config.is_causal or is_pair else False,
        names.Attention.CLAMP_KQV: config.clip_qkv,
        names.LLM.ATTN_LOGIT_SOFTCAPPING: config.attn_logit_softcapping,
    }
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    if any(slides):
        found[names.Attention.SLIDING_WINDOW] = config.sliding_window
        found[names.Attention.SLIDING_WINDOW_PATTERN] = slides
    if config.position_embedding_type == "alibi":
        found[names.Attention.MAX_ALIBI_BIAS] = float(config.alibi_bias_max)
    if config.position_embedding_type == "relative_bias":
        found[names.Attention.REL_BUCKETS_COUNT] = config.relative_attention_num_buckets
    return found


def _scales(names: Any, config: VariantConfig) -> dict[str, Any]:
    usual = config.head_dim**-0.5
    scaling = config.attention_scaling
    return {
        names.Attention.SCALE: None if scaling is None or math.isclose(scaling, usual) else scaling,
        names.LLM.EMBEDDING_SCALE: config.embedding_multiplier,
        names.LLM.RESIDUAL_SCALE: config.residual_multiplier,
        names.LLM.LOGIT_SCALE: config.logit_scale,
        names.LLM.FINAL_LOGIT_SOFTCAPPING: config.final_logit_softcapping,
    }


# Rotation


def rotations(config: VariantConfig) -> dict[str, dict[str, Any]]:
    """The RoPE parameters of each kind of layer, from the first layer of that kind which rotates."""
    found: dict[str, dict[str, Any]] = {}
    for layer, kind in enumerate(config.layer_types):
        parameters = config.rope_parameters_of(layer)
        if parameters is not None:
            found.setdefault(kind, parameters)
    return found


def table(config: VariantConfig, layer: int) -> tuple[torch.Tensor, float] | None:
    """
    What a layer rotates by: its inverse frequencies, float32 (rotary_dim / 2,), and the factor on cosines and sines;
    `None` where it does not.
    """
    parameters = config.rope_parameters_of(layer)
    if parameters is None:
        return None
    made = RotaryEmbedding(config.per_layer_config[layer], parameters, reversed=config.rope_reversed)
    return made.sign * made.inv_freq, made.attention_scaling


def tables_of(config: VariantConfig, layer: int) -> list[tuple[torch.Tensor, float]] | None:
    """Every table that a layer may rotate by; a long RoPE has one for short texts and one for long ones."""
    parameters, usual = config.rope_parameters_of(layer), table(config, layer)
    if parameters is None or usual is None:
        return None
    if parameters["rope_type"] != "longrope":
        return [usual]
    resolved = config.per_layer_config[layer]
    made = []
    for length in (1, parameters["original_max_position_embeddings"] + 1):
        rotary = RotaryEmbedding(resolved, parameters, reversed=config.rope_reversed)
        inverse, scaling = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, seq_len=length)
        made.append((rotary.sign * inverse, scaling))
    return made


def _rope(names: Any, config: VariantConfig) -> dict[str, Any]:
    kinds = rotations(config)
    if not kinds:
        return {}
    main = kinds.get("full_attention", next(iter(kinds.values())))
    found = {
        names.Rope.FREQ_BASE: _base(config, main),
        names.Rope.DIMENSION_COUNT: int(config.head_dim * (main.get("partial_rotary_factor") or 1.0)),
        # Read by `ministral3` alone.
        names.Attention.TEMPERATURE_SCALE: main.get("llama_4_scaling_beta"),
        **_scaling(names, config, main),
    }
    if "sliding_attention" in kinds:
        found[names.Rope.FREQ_BASE_SWA] = float(kinds["sliding_attention"]["rope_theta"])
    return found


def _base(config: VariantConfig, parameters: dict[str, Any]) -> float:
    """The base that gives the frequencies; a fixed alpha stretches it (HunYuan)."""
    base = float(parameters["rope_theta"])
    if parameters["rope_type"] != "dynamic" or not parameters.get("alpha"):
        return base
    return base * parameters["alpha"] ** (config.head_dim / (config.head_dim - 2))


def _scaling(names: Any, config: VariantConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    kind, factor = parameters["rope_type"], parameters.get("factor")
    if kind == "linear":
        return {names.Rope.SCALING_TYPE: kind, names.Rope.SCALING_FACTOR: float(factor)}
    original = parameters.get("original_max_position_embeddings")
    if kind == "longrope":
        return {
            names.Rope.SCALING_TYPE: kind,
            names.Rope.SCALING_ORIG_CTX_LEN: original,
            names.Rope.SCALING_ATTN_FACTOR: _main_table(config)[1],
        }
    if kind != "yarn":
        return {}
    found = {
        names.Rope.SCALING_TYPE: kind,
        names.Rope.SCALING_FACTOR: float(factor),
        names.Rope.SCALING_ORIG_CTX_LEN: original or config.max_position_embeddings,
    }
    for ours, theirs in (
        ("beta_fast", names.Rope.SCALING_YARN_BETA_FAST), ("beta_slow", names.Rope.SCALING_YARN_BETA_SLOW),
    ):  # fmt: skip
        if parameters.get(ours) is not None:
            found[theirs] = float(parameters[ours])
    # Of which llama.cpp takes the usual one by itself.
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    times = _main_table(config)[1] / usual
    if not math.isclose(times, 1.0):
        found[names.Rope.SCALING_ATTN_FACTOR] = times
    return found


def _main_table(config: VariantConfig) -> tuple[torch.Tensor, float]:
    kinds = list(config.layer_types)
    rotated = [layer for layer in range(len(kinds)) if config.rope_parameters_of(layer) is not None]
    full = [layer for layer in rotated if kinds[layer] == "full_attention"]
    return table(config, (full or rotated)[0])


def divisors(config: VariantConfig) -> dict[str, torch.Tensor]:
    """
    The tensors of a file that divide the frequencies of its base, float32 (rotary_dim / 2,): none for plain ones, and
    where keys say it all.
    """
    if not isinstance(config, VariantConfig) or not (kinds := rotations(config)):
        return {}
    package = gguf_package()
    tensor, names = package.MODEL_TENSOR, package.TENSOR_NAMES
    main = kinds.get("full_attention", next(iter(kinds.values())))
    if main["rope_type"] == "longrope":
        return {
            f"{names[tensor.ROPE_FACTORS_LONG]}.weight": torch.tensor(main["long_factor"], dtype=torch.float32),
            f"{names[tensor.ROPE_FACTORS_SHORT]}.weight": torch.tensor(main["short_factor"], dtype=torch.float32),
        }
    if main["rope_type"] in ("default", "linear", "yarn", "dynamic"):
        return {}
    factors = frequency_factors(_main_table(config)[0], main["rope_theta"])
    if factors is None:
        return {}
    return {f"{names[tensor.ROPE_FREQS]}.weight": torch.tensor(factors, dtype=torch.float32)}
