"""
What a forward keeps for the backward. Every forward says so itself: it runs on tensors without memory, and what autograd
saves is counted, each storage once, weights aside.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.part import Call, Part
from .stand_in import StandIn


@dataclass(frozen=True)
class Activations:
    """
    Bytes that are kept between forward and backward.

    Attributes:
        total: of the whole model.
        checkpointed: where layers keep their input alone and are computed again, at the moment when most is kept: in the
            backward of one layer.
        per_layer: of the layer that keeps most.
        outside: of embeddings, masks, head and loss.
    """

    total: int
    checkpointed: int
    per_layer: int
    outside: int


def activations(model: Part, call: Call, *, dtype: str = "bfloat16", fused: bool = True) -> Activations:
    """
    Of a training step without padding, with a loss on every position where the model has one.

    Args:
        call: its batch, length and source count.
        dtype: of the weights.
        fused: attention keeps queries, keys, values, its output and a number per query, as FlashAttention does
            (https://arxiv.org/abs/2307.08691); or all weights of attention, as eager attention does.
    """
    stand_in = StandIn.of(model, dtype)
    kept = Kept(stand_in.model)
    layers: list[tuple[int, int, int]] = []
    watched = [_watch(layer, count, kept, layers) for layer, count in stand_in.layers()]
    with kept.watching():
        stand_in.forward(call, fused)
    for handle in itertools.chain.from_iterable(watched):
        handle.remove()
    inside = sum(own for _, own, _ in layers)
    outside = kept.total - inside
    largest = max((own for _, own, _ in layers), default=0)
    total = outside + sum(count * own for count, own, _ in layers)
    # Beside its input, a layer that is computed again holds what it reads: tables, masks and biases.
    held = kept.total_of(tensor for key, tensor in kept.shared.items() if key not in kept.seen)
    checkpointed = outside + held + sum(count * entering for count, _, entering in layers) + largest
    return Activations(total, checkpointed, largest, outside)


class Kept:
    """Storages that autograd has saved so far, each counted once, and none of the model's own."""

    def __init__(self, model: nn.Module):
        self.seen = {tensor.untyped_storage()._cdata: tensor for tensor in (*model.parameters(), *model.buffers())}
        self.shared: dict[int, torch.Tensor] = {}
        self.total = self.own = 0

    def watching(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            # Held, so that no later storage takes its place.
            self.seen[storage._cdata] = tensor
            self.total += storage.nbytes()
            if storage._cdata not in self.shared:
                self.own += storage.nbytes()
        return tensor

    @staticmethod
    def total_of(tensors: Iterable[torch.Tensor]) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def share(self, *values: Any) -> None:
        """Note tensors that several layers read."""
        for value in values:
            if isinstance(value, (tuple, list)):
                self.share(*value)
            elif torch.is_tensor(value):
                self.shared[value.untyped_storage()._cdata] = value


def _watch(layer: nn.Module, count: int, kept: Kept, layers: list[tuple[int, int, int]]) -> list[Any]:
    """Note for a layer how many are like it, what it keeps, and the bytes of its input. Returns the hooks."""
    before = 0

    def enter(module: nn.Module, arguments: tuple, options: dict) -> None:
        nonlocal before
        kept.share(*arguments[1:], *options.values())
        before = kept.own

    def leave(module: nn.Module, arguments: tuple, output: Any) -> None:
        layers.append((count, kept.own - before, arguments[0].nbytes))

    return [layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave)]
