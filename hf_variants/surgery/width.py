"""Widths: the feed-forward network down to its strongest channels, or up by channels that do nothing."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .observed import mean_squares
from .operation import Operation
from .subject import (
    APPROXIMATE,
    SAME_BITS,
    SAME_FUNCTION,
    Outcome,
    Subject,
    SurgeryError,
    fields_by_layer,
    with_stacks,
)


@dataclass(frozen=True)
class FeedForwardWidth(Operation):
    """
    The inner width of every feed-forward network. Fewer channels are those that matter most: on a text, by the size of
    what they add to the stream; without one, by the product of the norms of their weights. More are zeros, which keep the
    function.

    Args:
        width: of every layer.
        stack: `"encoder"` or `"decoder"`; by default every stack.
        text: the text, or the path of a file with it.
    """

    width: int
    stack: str = ""
    text: str | Path | None = None

    def apply(self, subject: Subject) -> Subject:
        if self.width < 1:
            raise SurgeryError(f"A feed-forward network cannot be {self.width} wide. Give at least 1.")
        stacks = [subject.stack(self.stack)] if self.stack else list(subject.stacks)
        changes: dict[str, dict[str, Any]] = {}
        # The name of a network -> its channels in their order, of the old ones.
        kept: dict[str, torch.Tensor] = {}
        widths: set[int] = set()
        inner_squares = self._observed(subject, stacks)
        for stack in stacks:
            config = subject.stacks[stack]
            changes[stack] = {
                "intermediate_size": self.width,
                "per_layer_config": fields_by_layer(config, but="intermediate_size") or None,
            }
            for number, layer in enumerate(config.per_layer_config):
                if "mlp" in getattr(layer, "skip", ()):
                    continue
                widths.add(layer.intermediate_size)
                name = f"{subject.prefix(stack)}layers.{number}.mlp."
                if layer.intermediate_size > self.width:
                    kept[name] = self._strongest(subject, name, inner_squares.get(name))
                if layer.intermediate_size < self.width and layer.ffn_sub_norm:
                    raise SurgeryError(
                        f"Layer {number} normalises its inner channels (`ffn_sub_norm`), so that new ones would change the "
                        "others. Make it narrower, or leave it."
                    )
        before = sorted(widths)
        if not before or before == [self.width]:
            exactness, how = SAME_BITS, "as before"
        elif before[-1] > self.width:
            exactness, how = (
                APPROXIMATE,
                f"the channels of the largest {'weights' if self.text is None else 'effect on the text'}",
            )
        else:
            exactness, how = SAME_FUNCTION, "new channels are zeros"
        what = f"feed-forward networks of {self.width} channels from {', '.join(map(str, before))}: {how}"
        inner = re.compile(r"(.*layers\.\d+\.mlp\.)(up_proj|gate_proj|down_proj|sub_norm)\.(weight|bias)")

        def tensor(name: str, before: Subject) -> torch.Tensor:
            old = before.load(name)
            match = inner.fullmatch(name)
            if match is None or old.shape == after.stored[name].shape:
                return old
            axis = 1 if match[2] == "down_proj" else 0
            if match[1] in kept:
                return old.index_select(axis, kept[match[1]].to(old.device))
            made = old.new_zeros(after.stored[name].shape)
            made.narrow(axis, 0, old.shape[axis]).copy_(old)
            return made

        after = subject.changed(Outcome(what, exactness), tensor, config=with_stacks(subject.config, changes))
        return after

    def _observed(self, subject: Subject, stacks: list[str]) -> dict[str, torch.Tensor]:
        """Name of a network that gets narrower -> mean squares of its inner channels on the text."""
        if self.text is None:
            return {}
        prefix = body_prefix(subject)
        names = [
            f"{subject.prefix(stack)}layers.{number}.mlp."
            for stack in stacks
            for number, layer in enumerate(subject.stacks[stack].per_layer_config)
            if "mlp" not in getattr(layer, "skip", ()) and layer.intermediate_size > self.width
        ]
        watched = {f"{name}down_proj".removeprefix(prefix): "input" for name in names}
        squares = mean_squares(subject, self.text, watched) if watched else {}
        return {name: squares[f"{name}down_proj".removeprefix(prefix)] for name in names}

    def _strongest(self, subject: Subject, name: str, squares: torch.Tensor | None) -> torch.Tensor:
        """The channels that matter most, in their old order."""
        score = subject.load(f"{name}down_proj.weight").double().norm(dim=0)
        if squares is not None:
            return (score * squares.sqrt()).topk(self.width).indices.sort().values
        for part in ("up_proj", "gate_proj"):
            if f"{name}{part}.weight" in subject.stored:
                score = score * subject.load(f"{name}{part}.weight").double().norm(dim=1)
        return score.topk(self.width).indices.sort().values


def body_prefix(subject: Subject) -> str:
    """What names inside a model with a head have before those of the model without it."""
    body = subject.skeleton.base_model
    return "" if body is subject.skeleton else f"{subject.skeleton.base_model_prefix}."
