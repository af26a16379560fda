"""How many bytes the keys and values of a generation take."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from ..model.attention import Attention, CrossAttentionMixin
from ..model.part import Part


@dataclass(frozen=True)
class CacheBytes:
    """
    Bytes of the keys and values of a batch. Learned sinks take none: they are one logit per head.

    Attributes:
        theory: what later tokens can still see: a sliding layer's window, all of a full one's.
        dynamic: in transformers' `DynamicCache`, whose sliding layers keep one token less than the window.
        static: in its `StaticCache` of this length.
        paged: in blocks of `block_size` tokens, of which sliding layers keep those that the window touches, wherever it
            lies.
        per_token: what one more token adds while no window is full.
        per_source_token: what one more token adds that cross-attention reads.
    """

    theory: int
    dynamic: int
    static: int
    paged: int
    per_token: int
    per_source_token: int


@lru_cache(maxsize=8)
def attentions(model: Part) -> tuple[Part, ...]:
    """The attention modules of a model."""
    return tuple(part for _, part in model.walk() if part.is_a(Attention))


def cache_bytes(
    model: Part, length: int, *, batch: int = 1, source: int = 0, value_bytes: int = 2, block_size: int = 16
) -> CacheBytes | None:
    """
    Of a decoder after `length` tokens; `None` for an encoder.

    Args:
        length: tokens of every sequence.
        batch: number of sequences.
        source: tokens of an encoder-decoder's source.
        value_bytes: of one value.
        block_size: tokens in a block of a paged engine.
    """

    def blocks(tokens: int) -> int:
        return -(-tokens // block_size) * block_size

    kept: dict[str, Callable[[int], int]] = {
        "theory": lambda window: min(length, window),
        "dynamic": lambda window: min(length, window - 1),
        "static": lambda window: min(length, window),
        # What a window of so many tokens can touch, begun anywhere in a block.
        "paged": lambda window: min(blocks(length), blocks(window - 1) + block_size),
    }
    sizes = dict.fromkeys(kept, 0)
    per_token = per_source_token = 0
    is_decoder = False
    for part in attentions(model):
        given = part.arguments
        width = 2 * given["num_key_value_heads"] * given["head_dim"] * value_bytes
        is_cross = part.is_a(CrossAttentionMixin)
        if is_cross:
            per_source_token += width
            for name in kept:
                sizes[name] += width * (blocks(source) if name == "paged" else source)
        elif given["is_causal"]:
            is_decoder = True
            per_token += width
            for name, tokens in kept.items():
                whole = blocks(length) if name == "paged" else length
                sizes[name] += width * (whole if given["sliding_window"] is None else tokens(given["sliding_window"]))
    if not is_decoder:
        return None
    return CacheBytes(**{name: size * batch for name, size in sizes.items()}, per_token=per_token * batch,
                      per_source_token=per_source_token * batch)  # fmt: skip
