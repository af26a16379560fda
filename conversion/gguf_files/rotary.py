"""How a GGUF file says RoPE: base, scaling keys, and tensors of divisors."""

import math
from typing import Any

import torch

from ..errors import ConversionError
from .metadata import Metadata


# llama.cpp multiplies the angles' scale in other orders than transformers, all in float32.
ROUNDING = 2.0**-19
# Llama 3's parameters as published: (low_freq_factor, high_freq_factor); the context is found by trying.
LLAMA3_BANDS = (1.0, 4.0)
LLAMA3_CONTEXT = 8192


def rope_parameters(metadata: Metadata, head_dim: int, says_partial: bool = False) -> dict[str, Any]:
    """
    transformers' `rope_parameters` of a file.

    Args:
        metadata: of the file; everything about RoPE is read from it, and its tensors of divisors.
        head_dim: channels per head.
        says_partial: name the rotated part also where it is the whole head.

    Raises:
        ConversionError: for a scaling that transformers does not compute.
    """
    base = float(metadata.get("rope.freq_base", 10000.0))
    rotated = metadata.get("rope.dimension_count", head_dim)
    if not 0 < rotated <= head_dim or rotated % 2:
        raise ConversionError(
            f"`{metadata.name('rope.dimension_count')}` is {rotated}, and heads of {head_dim} channels rotate an even "
            "number of them. The file is damaged."
        )
    parameters = {"rope_type": "default", "rope_theta": base, **_scaling(metadata)}
    divisors = _divisors(metadata, rotated // 2)
    if divisors:
        if parameters["rope_type"] not in ("default", "longrope"):
            raise ConversionError(
                f"The file scales RoPE twice, by `rope.scaling.type` {parameters['rope_type']!r} and by a tensor of "
                "divisors. transformers computes one or the other."
            )
        parameters |= _from_divisors(metadata, divisors, base, rotated)
    elif parameters["rope_type"] == "longrope":
        raise ConversionError("The file has a long RoPE without the tensors of its factors. It is incomplete.")
    if rotated != head_dim or says_partial:
        parameters["partial_rotary_factor"] = rotated / head_dim
    return parameters


def _scaling(metadata: Metadata) -> dict[str, Any]:
    kind = metadata.get("rope.scaling.type")
    factor = metadata.get("rope.scaling.factor") or metadata.get("rope.scale_linear") or 1.0
    if kind is None:
        # What llama.cpp takes it for.
        kind = "linear"
    if kind in ("none", "linear"):
        # Of a scaling that there is not.
        metadata.get("rope.scaling.original_context_length")
        return {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1.0 else {}
    if kind == "yarn":
        return _yarn(metadata, factor)
    if kind == "longrope":
        return {"rope_type": "longrope"}
    raise ConversionError(
        f"`{metadata.name('rope.scaling.type')}` is {kind!r}, which is none of 'none', 'linear', 'yarn' and 'longrope'."
    )


def _yarn(metadata: Metadata, factor: float) -> dict[str, Any]:
    extrapolation = metadata.get("rope.scaling.yarn_ext_factor", 1.0)
    if extrapolation != 1.0:
        raise ConversionError(
            f"`{metadata.name('rope.scaling.yarn_ext_factor')}` is {extrapolation}, and transformers' YaRN computes 1 "
            "alone."
        )
    original = metadata.get("rope.scaling.original_context_length")
    parameters = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if original is None:
        parameters["original_max_position_embeddings"] = metadata.need("context_length")
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if (value := metadata.get(f"rope.scaling.{theirs}")) is not None:
            parameters[ours] = value
    if (attention := metadata.get("rope.scaling.yarn_attn_factor")) is not None:
        parameters["attention_factor"] = attention
    # `mscale_all_dim`; 0 stands for none.
    if all_dims := metadata.get("rope.scaling.yarn_log_multiplier"):
        parameters |= {"mscale": 1.0, "mscale_all_dim": all_dims}
    if (times := metadata.get("rope.scaling.attn_factor", 1.0)) != 1.0:
        scale = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        parameters["attention_factor"] = times * parameters.get("attention_factor", scale)
    return parameters


def _divisors(metadata: Metadata, count: int) -> dict[str, list[float]]:
    """Of the frequencies, by the tensors' names."""
    found = {}
    for name in ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"):
        if (values := metadata.tensor(name)) is None:
            continue
        if values.shape != (count,):
            raise ConversionError(
                f"{name} has the shape {tuple(values.shape)}, and {count} frequencies are rotated. The file is damaged."
            )
        # The shortest decimals that are these numbers in float32.
        found[name.removeprefix("rope_").removesuffix(".weight")] = [float(str(number)) for number in values.numpy()]
    return found


def _from_divisors(metadata: Metadata, divisors: dict[str, list[float]], base: float, rotated: int) -> dict[str, Any]:
    context = metadata.need("context_length")
    original = metadata.get("rope.scaling.original_context_length")
    if "freqs" in divisors:
        freqs = divisors["freqs"]
        return {} if set(freqs) == {1.0} else _llama3(freqs, base, rotated, original, context) or _same(freqs, context)
    if set(divisors) != {"factors_long", "factors_short"}:
        raise ConversionError(
            "The file has rope_factors_long.weight or rope_factors_short.weight, and not both. It is incomplete."
        )
    original = original or context
    parameters = {
        "rope_type": "longrope",
        "short_factor": divisors["factors_short"],
        "long_factor": divisors["factors_long"],
        "original_max_position_embeddings": original,
        "factor": context / original,
    }
    scale = context / original
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    stated = metadata.get("rope.scaling.attn_factor", 1.0)
    if not math.isclose(stated, usual, rel_tol=1e-6):
        parameters["attention_factor"] = stated
    return parameters


def _llama3(
    freqs: list[float], base: float, rotated: int, original: int | None, context: int
) -> dict[str, Any] | None:
    """Llama 3's parameters that give these divisors, or `None`."""
    frequencies = 1.0 / (base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated))
    wavelengths = 2 * math.pi / frequencies.double()
    expected = torch.tensor(freqs, dtype=torch.float64)
    low, high = LLAMA3_BANDS
    factor = max(freqs)
    contexts = [original, LLAMA3_CONTEXT, context, round(context / factor), *(2**power for power in range(4, 22))]
    for length in dict.fromkeys(filter(None, contexts)):
        smooth = ((length / wavelengths - low) / (high - low)).clamp(0, 1)
        made = 1 / ((1 - smooth) / factor + smooth)
        if ((made - expected).abs() <= ROUNDING * expected).all():
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }  # fmt: skip
    return None


def _same(freqs: list[float], context: int) -> dict[str, Any]:
    """Any divisors, at every length: a long RoPE whose two sets of factors are one, and which scales nothing else."""
    return {
        "rope_type": "longrope", "short_factor": freqs, "long_factor": freqs, "factor": 1.0, "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }  # fmt: skip
