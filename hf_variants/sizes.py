"""How large a variant is: parameters, weights, and the cache of keys and values."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .conversion.checkpoint import Weights
from .cost.cache import cache_bytes
from .cost.parameters import structure


# Of one key or value in the cache; bfloat16 and float16 alike.
CACHE_BYTES = 2


@dataclass(frozen=True)
class Sizes:
    """
    Attributes:
        parameters: each tied one counted once.
        embeddings: how many of them are looked up: of tokens, which a tied head uses as well, of positions and of types.
        weights: bytes on disk by dtype.
    """

    parameters: int
    embeddings: int
    weights: dict[str, int]


@dataclass(frozen=True)
class CacheSizes:
    """
    Attributes:
        per_token: bytes that one more token adds while no sliding window is full.
        context: the number of tokens it was trained for.
        at_context: bytes of that many tokens, of which a sliding layer keeps no more than its window.
        per_source_token: bytes that one token of an encoder-decoder's source adds.
    """

    per_token: int
    context: int
    at_context: int
    per_source_token: int


def sizes_in(folder: Path, model: PreTrainedModel) -> Sizes:
    """
    Of the weights that lie in a folder, or of the model where there are none (a distributed checkpoint, a config alone).

    Args:
        model: of the folder's config. It tells what the tensors are; its own may be parts of them, as under FSDP, or
            have no memory.
    """
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    # FSDP puts modules of its own in between, of which a checkpoint knows nothing.
    looked_up = {f"{name}.weight".replace("_fsdp_wrapped_module.", "") for name in embeddings}
    buffers = {name for name, _ in model.named_buffers()}
    tensors = _stored(folder) or dict(model.named_parameters())
    counts = {name: tensor.numel() for name, tensor in tensors.items() if name not in buffers}
    weights: Counter[str] = Counter()
    for tensor in tensors.values():
        weights[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    # Quantised, several values lie in one, and their scales beside them: the model knows how many there are.
    is_quantised = getattr(model.config, "quantization_config", None) is not None
    return Sizes(
        model.num_parameters() if is_quantised else sum(counts.values()),
        sum(count for name, count in counts.items() if name in looked_up),
        dict(weights),
    )


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, without values."""
    try:
        reader = Weights(folder)
    except FileNotFoundError:
        return {}
    return {name: reader.header(name) for name in reader.names()}


def cache_sizes(config: Any) -> CacheSizes | None:
    """
    Of the cache that `generate` fills, in 16 bits a value; `None` for an encoder, which has none.

    Args:
        config: a `VariantConfig` or `VariantSeq2SeqConfig`.
    """
    decoder = config.decoder if config.is_encoder_decoder else config
    if not decoder.is_causal:
        return None
    context = decoder.max_position_embeddings
    cache = cache_bytes(structure(config), context, value_bytes=CACHE_BYTES)
    return CacheSizes(cache.per_token, context, cache.theory, cache.per_source_token)


def readable(count: int) -> str:
    """Bytes in the largest unit that leaves at least one: 1,500,000 -> 1.5 MB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
