"""
How much memory a training step takes at most. A step is run on tensors without memory, and what is alive is counted: of
the activations, what the backward has not freed yet, of the gradients, what there is already, and what is there for a moment
alone, as logits in float32, their gradient, and a second gradient of a table that the head is tied to.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..model.part import Call, Part
from .memory import OPTIMIZERS, Plan
from .parameters import DTYPE_BYTES, count_parameters
from .stand_in import StandIn


# Whose step is run, with states from an earlier one; of others, nothing is counted beside their states.
TORCH_OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
    "adamw": torch.optim.AdamW,
}


@dataclass(frozen=True)
class StepMemory:
    """
    Bytes of a training step on one device at the moment when it holds most, gradients having been set to `None` before it.

    Attributes:
        total: all of it.
        held: weights and the optimizer's states, which are there throughout.
        moment: what the step is at then: `"layers, forward"`, `"head and loss"` (their backward as well), `"layers,
            backward"`, `"embeddings"` (their backward) or `"optimizer"`.
    """

    total: int
    held: int
    moment: str


@dataclass
class _Span:
    """
    A stretch of the step.

    Attributes:
        moment: see `StepMemory`.
        most: bytes alive at most, beyond those at its begin.
        change: bytes that there are more at its end.
        layer: which layer of which stack's kinds, if it is one's.
    """

    moment: str
    most: int
    change: int
    layer: tuple[int, int] | None = None


def step_memory(model: Part, call: Call, plan: Plan, dtype: str, *, fused: bool = True) -> StepMemory:
    """
    Of a step without padding, with a loss on every position.

    Args:
        call: its batch, length and source count.
        plan: its optimizer and checkpointing; one device holds everything.
        dtype: of the weights.
        fused: see `StandIn.forward`.
    """
    stand_in = StandIn.of(model, dtype)
    spans = _spans(stand_in, call, plan, fused)
    counted = count_parameters(model)
    width = DTYPE_BYTES[dtype]
    per_copy, per_parameter = OPTIMIZERS[plan.optimizer]
    held = width * counted.total + (per_copy * width + per_parameter) * counted.trainable
    now = most = 0
    moment = ""
    for span in _of_every_layer(spans, stand_in):
        if now + span.most > most:
            most, moment = now + span.most, span.moment
        now += span.change
    return StepMemory(held + most, held, moment)


def _of_every_layer(spans: list[_Span], stand_in: StandIn) -> Iterator[_Span]:
    """The spans of the whole model: those of a layer once for each that it stands for, in the order in which these run."""
    done: set[tuple[str, int]] = set()
    for span in spans:
        if span.layer is None:
            yield span
            continue
        number, _ = span.layer
        if (span.moment, number) in done:
            continue
        done.add((span.moment, number))
        of_kind = {each.layer: each for each in spans if each.moment == span.moment}
        order = stand_in.stacks[number].order
        for kind in order if span.moment == "layers, forward" else reversed(order):
            yield of_kind[number, kind]


def _spans(stand_in: StandIn, call: Call, plan: Plan, fused: bool) -> list[_Span]:
    """One step of the stand-in, from the forward to the optimizer."""
    model = stand_in.model
    for parameter in model.parameters():
        parameter.grad = None
    alive = _Alive()
    handles = [
        handle
        for number, stack in enumerate(stand_in.stacks)
        for kind, layer in enumerate(stack.layers)
        for handle in _mark(layer, (number, kind), alive)
    ]
    if plan.checkpointing:
        _method(model, "checkpointing_enable")({"use_reentrant": False})
    try:
        with alive:
            alive.begin("embeddings")
            output = stand_in.forward(call, fused)
            alive.begin("head and loss")
            loss = output.loss if getattr(output, "loss", None) is not None else output[0].sum()
            # As Trainer lets go of the logits.
            del output
            alive.forward = False
            loss.backward()
            del loss
        step = _optimizer_step(model, plan)
        with alive:
            alive.begin("optimizer")
            step()
        _settle(alive.spans, stand_in)
    finally:
        for handle in handles:
            handle.remove()
        if plan.checkpointing:
            _method(model, "checkpointing_disable")()
        for parameter in model.parameters():
            parameter.grad = None
    return alive.spans


def _method(model: nn.Module, ending: str) -> Callable[..., Any]:
    """What transformers calls `activation_...` of late, and `gradient_...` before."""
    return getattr(model, f"activation_{ending}", None) or getattr(model, f"gradient_{ending}")


def _settle(spans: list[_Span], stand_in: StandIn) -> None:
    """
    Make every layer's backward free what its forward kept. Where either ends, something may be alive for a moment more,
    such as what is on its way to the caller: the less of the two is what is kept.
    """
    for forward in spans:
        if forward.layer is None or forward.moment != "layers, forward":
            continue
        number, kind = forward.layer
        (backward,) = (span for span in spans if span.layer == forward.layer and span is not forward)
        grads = (parameter.grad for parameter in stand_in.stacks[number].layers[kind].parameters())
        gradients = sum(gradient.nbytes for gradient in grads if gradient is not None)
        forward.change = min(forward.change, gradients - backward.change)
        backward.change = gradients - forward.change


def _optimizer_step(model: nn.Module, plan: Plan) -> Callable[[], Any]:
    make: Any = TORCH_OPTIMIZERS.get(plan.optimizer)
    if make is None:
        return lambda: None
    optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    # Its states are there from the first step on, and counted elsewhere.
    optimizer.step()
    return optimizer.step


def _mark(layer: nn.Module, name: tuple[int, int], alive: "_Alive") -> list[Any]:
    """Begin spans where a layer's forward and backward begin and end. Returns the hooks."""

    def enter(module: nn.Module, arguments: tuple) -> None:
        # Checkpointing runs it once more, inside the backward.
        if alive.forward:
            if name[1] == 0:
                # Of the others it is the output of the layer before.
                arguments[0].register_hook(lambda gradient: alive.begin("embeddings"))
            alive.begin("layers, forward", name)

    def leave(module: nn.Module, arguments: tuple, output: Any) -> None:
        if alive.forward:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(lambda gradient: alive.begin("layers, backward", name))
            alive.begin("head and loss")

    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]


class _Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that something still holds, span by span."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = True
        self.spans: list[_Span] = []
        self._now = self._start = 0
        self._seen: dict[int, Any] = {}

    def begin(self, moment: str, layer: tuple[int, int] | None = None) -> None:
        """End the span before, and begin another."""
        if self.spans:
            self.spans[-1].change = self._now - self._start
        self._start = self._now
        self.spans.append(_Span(moment, 0, 0, layer))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._seen:
                    self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen[key] = weakref.finalize(storage, self._remove, key, size)
        self._now += size
        if self.spans:
            self.spans[-1].most = max(self.spans[-1].most, self._now - self._start)

    def _remove(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self._now -= size
