"""Key and value heads: pooled into fewer, or repeated into more."""

import re
from dataclasses import dataclass
from typing import Any

import torch

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


# The tensors of an attention that have a part per key/value head, `full` and `per_head` norms among them.
OF_HEADS = re.compile(
    r"(.*)layers\.(\d+)\.(?:self_attn|cross_attn)\.(?:[kv]_proj\.(?:weight|bias)|k_norm\.(?:weight|bias))"
)


@dataclass(frozen=True)
class KeyValueHeads(Operation):
    """
    So many key/value heads in every layer: fewer are means of neighbours (https://arxiv.org/abs/2305.13245), more are
    repetitions, which keep the function.

    Args:
        count: of heads; it must divide, or be a multiple of, what a layer has, and divide its query heads.
        stack: `"encoder"` or `"decoder"`; by default every stack.
    """

    count: int
    stack: str = ""

    def apply(self, subject: Subject) -> Subject:
        stacks = [subject.stack(self.stack)] if self.stack else list(subject.stacks)
        changes: dict[str, dict[str, Any]] = {}
        # Prefix of a stack's tensors -> key/value heads of its layers.
        counts: dict[str, list[int]] = {}
        for stack in stacks:
            config = subject.stacks[stack]
            layers = list(config.per_layer_config)
            counts[subject.prefix(stack)] = [layer.num_key_value_heads for layer in layers]
            for number, layer in enumerate(layers):
                self._refuse(number, layer.num_attention_heads, layer.num_key_value_heads)
            changes[stack] = {
                "num_key_value_heads": self.count,
                "per_layer_config": fields_by_layer(config, but="num_key_value_heads") or None,
            }
            if self.count > 1:
                # Another kernel for one head, which there is no more.
                changes[stack]["broadcast_key_value"] = False
        before = sorted({count for of_stack in counts.values() for count in of_stack})
        exactness = SAME_BITS if before == [self.count] else APPROXIMATE if before[-1] > self.count else SAME_FUNCTION
        how = {SAME_BITS: "as before", APPROXIMATE: "means of neighbours", SAME_FUNCTION: "repeated"}[exactness]
        what = f"{self.count} key/value heads from {', '.join(map(str, before))}: {how}"

        def tensor(name: str, before: Subject) -> torch.Tensor:
            old = before.load(name)
            match = OF_HEADS.fullmatch(name)
            if match is None or match[1] not in counts:
                return old
            # A norm on heads of one kind has nothing per head.
            is_per_head = old.shape != after.stored[name].shape
            return _regrouped(old, counts[match[1]][int(match[2])], self.count) if is_per_head else old

        after = subject.changed(Outcome(what, exactness), tensor, config=with_stacks(subject.config, changes))
        return after

    def _refuse(self, layer: int, heads: int, before: int) -> None:
        if self.count < 1 or heads % self.count:
            raise SurgeryError(
                f"{self.count} key/value heads do not divide the {heads} heads of layer {layer} (`num_attention_heads`). "
                "Choose a divisor."
            )
        if before % self.count and self.count % before:
            raise SurgeryError(
                f"{self.count} key/value heads are neither a divisor nor a multiple of the {before} of layer {layer}. "
                "Go by way of one that is."
            )


def _regrouped(tensor: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """(before * size, ...) or (before, size) -> the same of `after` heads; means are taken in float64."""
    by_head = tensor.reshape(before, -1)
    if after > before:
        made = by_head.repeat_interleave(after // before, dim=0)
    else:
        made = by_head.reshape(after, before // after, -1).double().mean(1).to(tensor.dtype)
    return made.reshape(tensor.shape[0] * after // before, *tensor.shape[1:])
