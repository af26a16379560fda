"""Widths: the feed-forward network down to its strongest channels, or up by channels that do nothing."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from .operation import Operation
from .subject import APPROXIMATE, SAME_BITS, SAME_FUNCTION, Outcome, Subject, SurgeryError, with_stacks


@dataclass(frozen=True)
class FeedForwardWidth(Operation):
    """
    The inner width of every feed-forward network. Fewer channels are those whose weights have the largest product of norms;
    more are zeros, which keep the function.

    Args:
        width: of every layer.
        stack: `"encoder"` or `"decoder"`; by default every stack.
    """

    width: int
    stack: str = ""

    def apply(self, subject: Subject) -> Subject:
        if self.width < 1:
            raise SurgeryError(f"A feed-forward network cannot be {self.width} wide. Give at least 1.")
        stacks = [subject.stack(self.stack)] if self.stack else list(subject.stacks)
        changes: dict[str, dict[str, Any]] = {}
        # The name of a network -> its channels in their order, of the old ones.
        kept: dict[str, torch.Tensor] = {}
        widths: set[int] = set()
        for stack in stacks:
            config = subject.stacks[stack]
            own = {
                layer: {name: value for name, value in fields.items() if name != "intermediate_size"}
                for layer, fields in (config.to_dict().get("per_layer_config") or {}).items()
            }
            changes[stack] = {
                "intermediate_size": self.width,
                "per_layer_config": {layer: fields for layer, fields in own.items() if fields} or None,
            }
            for number, layer in enumerate(config.per_layer_config):
                if "mlp" in getattr(layer, "skip", ()):
                    continue
                widths.add(layer.intermediate_size)
                name = f"{subject.prefix(stack)}layers.{number}.mlp."
                if layer.intermediate_size > self.width:
                    kept[name] = self._strongest(subject, name)
                if layer.intermediate_size < self.width and layer.ffn_sub_norm:
                    raise SurgeryError(
                        f"Layer {number} normalises its inner channels (`ffn_sub_norm`), so that new ones would change the "
                        "others. Make it narrower, or leave it."
                    )
        before = sorted(widths)
        if not before or before == [self.width]:
            exactness, how = SAME_BITS, "as before"
        elif before[-1] > self.width:
            exactness, how = APPROXIMATE, "the channels of the largest weights"
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

    def _strongest(self, subject: Subject, name: str) -> torch.Tensor:
        """The channels of the largest product of norms of what goes in and what comes out, in their old order."""
        score = subject.load(f"{name}down_proj.weight").float().norm(dim=0)
        for part in ("up_proj", "gate_proj"):
            if f"{name}{part}.weight" in subject.stored:
                score = score * subject.load(f"{name}{part}.weight").float().norm(dim=1)
        return score.topk(self.width).indices.sort().values
