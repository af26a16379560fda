"""Table 1 of "Attention Is All You Need" (https://arxiv.org/abs/1706.03762) at a config's own width and length."""

import math
from dataclasses import dataclass
from typing import Any

from ..model.part import Part
from .cache import attentions


# Width of the convolution that is compared with.
KERNEL = 3


@dataclass(frozen=True)
class LayerKind:
    """
    Attributes:
        name: of the kind of layer.
        complexity: as the paper writes it, n tokens of width d.
        operations: multiplications that it stands for.
        sequential: steps that have to wait for one another.
        path: layers of this kind between the two tokens that are furthest apart.
    """

    name: str
    complexity: str
    operations: int
    sequential: int
    path: int


def layer_kinds(config: Any, length: int) -> list[LayerKind]:
    """
    A layer of self-attention, of windows where the config has them, of recurrence and of convolution.

    Args:
        config: of one stack.
        length: of the input.
    """
    n, d = length, config.hidden_size
    kinds = [LayerKind("self-attention", "n² · d", n * n * d, 1, 1)]
    if config.sliding_window is not None and config.sliding_window < n:
        reach = config.sliding_window - 1 if config.is_causal else config.sliding_window
        seen = config.sliding_window if config.is_causal else 2 * reach + 1
        kinds.append(
            LayerKind(
                f"attention in windows, r = {seen:,}", "r · n · d", seen * n * d, 1, -(-(n - 1) // max(reach, 1))
            )
        )
    dilated = max(1, math.ceil(math.log(n, KERNEL)))
    return [
        *kinds,
        LayerKind("recurrence", "n · d²", n * d * d, n, n),
        LayerKind(f"convolution, k = {KERNEL}, dilated", "k · n · d²", KERNEL * n * d * d, 1, dilated),
    ]


def path_length(model: Part, length: int) -> int | None:
    """Layers between the two tokens of an input that are furthest apart; `None` if the stack does not join them."""
    reaches = []
    for part in attentions(model):
        window = part.arguments["sliding_window"]
        if window is None:
            return 1
        # It has the token itself and, in an encoder, one of its sides.
        reaches.append(window - 1)
    distance, layers = length - 1, 0
    for reach in sorted(reaches, reverse=True):
        if distance <= 0:
            break
        distance, layers = distance - reach, layers + 1
    return layers if distance <= 0 else None
