"""The size of heads, in whole pairs of a rotation whose frequencies stay."""

from dataclasses import dataclass
from typing import Any

import torch

from ..conversion.folds import is_zero_centered
from ..model.configuration_variant import VariantConfig
from .operation import Operation
from .sizes import ATTENTIONS, NEW, OF_ATTENTION
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


# Whose frequency of a pair depends on its place in a head, and on nothing else that the size decides.
FREQUENCIES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class HeadSize(Operation):
    """
    The size of every head. The frequency of a pair follows from its place, so that a rotation leaves every second pair, or
    every third, or puts new ones of zeros between; what is not rotated is chosen by its weights.

    Args:
        size: of a head; with a rotation, a multiple of the old one or a divisor.
        stack: `"encoder"` or `"decoder"`; by default every stack.
    """

    size: int
    stack: str = ""

    def apply(self, subject: Subject) -> Subject:
        stacks = [subject.stack(self.stack)] if self.stack else list(subject.stacks)
        changes: dict[str, dict[str, Any]] = {}
        before: set[int] = set()
        # Name of an attention -> its layer's config, the old channels of queries and keys, and for every key/value head
        # those of its values.
        chosen: dict[str, tuple[VariantConfig, list[int], list[list[int]]]] = {}
        for stack in stacks:
            config, prefix = subject.stacks[stack], subject.prefix(stack)
            for number, layer in enumerate(config.per_layer_config):
                before.add(layer.head_dim)
                rotated = self._rotated(config, layer, number)
                for kind in ATTENTIONS:
                    name = f"{prefix}layers.{number}.{kind}"
                    if f"{name}.q_proj.weight" in subject.stored:
                        turned = rotated if kind == "self_attn" else 0
                        interleaved = config.rope_interleaved
                        chosen[name] = (layer, *self._channels(subject, name, layer, turned, interleaved))
            if config.attention_scaling is None and config.qk_norm != "none" and not config.qk_norm_affine:
                # No weight behind the norm could take the change of scale.
                changes[stack] = {"attention_scaling": config.per_layer_config[0].head_dim ** -0.5}
            changes[stack] = changes.get(stack, {}) | {
                "head_dim": self.size,
                "per_layer_config": fields_by_layer(config, but="head_dim") or None,
            }
        exactness = SAME_BITS if before == {self.size} else SAME_FUNCTION
        if max(before) > self.size:
            exactness = APPROXIMATE
        how = {SAME_BITS: "as before", SAME_FUNCTION: "new channels are zeros", APPROXIMATE: "the strongest channels"}
        what = f"heads of {self.size} channels from {', '.join(map(str, sorted(before)))}: {how[exactness]}"
        return subject.changed(
            Outcome(what, exactness),
            lambda name, source: self._tensor(name, source, chosen),
            config=with_stacks(subject.config, changes),
        )

    def _rotated(self, config: VariantConfig, layer: VariantConfig, number: int) -> int:
        """How many channels of a head are rotated; refused where none of the new size would be as they were."""
        old = layer.head_dim
        if self.size < 1 or self.size == old:
            if self.size < 1:
                raise SurgeryError(f"A head cannot have {self.size} channels. Give at least 1.")
            return 0
        if self.size > old and (layer.attention_sub_norm or layer.qk_norm != "none"):
            exact = layer.qk_norm == "none" or (layer.qk_norm_type == "rmsnorm" and layer.qk_norm_affine)
            if layer.attention_sub_norm or not exact:
                field = "attention_sub_norm" if layer.attention_sub_norm else "qk_norm_type"
                raise SurgeryError(
                    f"A norm would see the new channels (`{field}`). Choose a smaller size, or leave it."
                )
        parameters = config.rope_parameters_of(number)
        if parameters is None:
            return 0
        if config.rope_table_in_checkpoint or config.rope_turns_values:
            field = "rope_table_in_checkpoint" if config.rope_table_in_checkpoint else "rope_turns_values"
            raise SurgeryError(f"The rotation is bound to the size of a head (`{field}`). Leave `--head-size` out.")
        rotated = int(old * (parameters.get("partial_rotary_factor") or 1.0))
        becomes = int(self.size * (parameters.get("partial_rotary_factor") or 1.0))
        if parameters.get("rope_type", "default") not in FREQUENCIES:
            raise SurgeryError(
                f"The frequencies of the rotation (`rope_type` {parameters['rope_type']}) depend on the size of a head. "
                "Leave `--head-size` out."
            )
        if (self.size % old and old % self.size) or rotated % 2 or becomes % 2 or rotated * self.size != becomes * old:
            raise SurgeryError(
                f"Heads of {self.size} channels have none of the frequencies that those of {old} have (`rope_parameters`). "
                "Give a multiple or a divisor whose rotated part is whole pairs."
            )
        return rotated

    def _channels(
        self, subject: Subject, name: str, layer: VariantConfig, rotated: int, interleaved: bool
    ) -> tuple[list[int], list[list[int]]]:
        old, shared = layer.head_dim, layer.num_key_value_heads
        rows = {
            part: subject.load(f"{name}.{part}_proj.weight").double().square().sum(1).view(-1, old)
            for part in ("q", "k", "v")
        }
        columns = subject.load(f"{name}.o_proj.weight").double().square().sum(0).view(shared, -1, old).sum(1)
        keys = rows["q"].sum(0) * rows["k"].sum(0)
        becomes = rotated * self.size // old
        pairs = [pair * old // self.size if pair * old % self.size == 0 else NEW for pair in range(becomes // 2)]
        if interleaved:
            turned = [NEW if pair == NEW else 2 * pair + side for pair in pairs for side in (0, 1)]
        else:
            turned = [NEW if pair == NEW else pair + side for side in (0, rotated // 2) for pair in pairs]
        rest = _strongest(keys[rotated:], self.size - becomes)
        chosen = turned + [NEW if channel == NEW else rotated + channel for channel in rest]
        return chosen, [_strongest(score, self.size) for score in rows["v"] * columns]

    def _tensor(self, name: str, source: Subject, chosen: dict[str, tuple]) -> torch.Tensor:
        old = source.load(name)
        match = OF_ATTENTION.fullmatch(name)
        if match is None or match[1] not in chosen:
            return old
        (layer, keys, values), part, leaf = chosen[match[1]], match[3], match[4]
        size, heads, shared = layer.head_dim, layer.num_attention_heads, layer.num_key_value_heads
        ratio = (self.size / size) ** 0.5
        # Scores are scaled by the new size, where the config does not say by what.
        scale = ratio if layer.attention_scaling is None else 1.0
        # A norm's mean of squares is over more channels, of which the new ones are zeros.
        grown = ratio if self.size > size and layer.qk_norm != "none" else 1.0
        if part in ("q_proj", "k_proj"):
            made = _in_heads(old, 0, [keys] * (heads if part == "q_proj" else shared), size)
            factor = grown * (scale if part == "q_proj" and layer.qk_norm == "none" else 1.0)
            return made if factor == 1.0 else (made.double() * factor).to(old.dtype)
        if part == "v_proj":
            return _in_heads(old, 0, values, size)
        if part == "o_proj" and leaf == "weight":
            return _in_heads(old, 1, [one for one in values for _ in range(heads // shared)], size)
        if part == "g_proj" and old.shape[0] == heads * size and layer.attention_gate == "elementwise":
            return _in_heads(old, 0, [one for one in values for _ in range(heads // shared)], size)
        if part in ("q_norm", "k_norm"):
            count = old.numel() // size
            is_weight = leaf == "weight"
            offset = float(is_weight and is_zero_centered(source.skeleton.get_submodule(f"{match[1]}.{part}")))
            made = _in_heads(old.flatten(), 0, [keys] * count, size, fill=is_weight - offset)
            factor = (scale if part == "q_norm" else 1.0) / grown
            if factor != 1.0:
                made = ((made.double() + offset) * factor - offset).to(old.dtype)
            return made.view(-1, self.size) if old.dim() == 2 else made
        if part == "sub_norm":
            return _in_heads(old, 0, [one for one in values for _ in range(heads // shared)], size)
        return old


def _strongest(score: torch.Tensor, count: int) -> list[int]:
    """So many channels: the largest in their old order, or all and new ones behind them."""
    if count >= len(score):
        return [*range(len(score)), *[NEW] * (count - len(score))]
    return sorted(score.topk(count).indices.tolist())


def _in_heads(tensor: torch.Tensor, dim: int, channels: list[list[int]], size: int, fill: float = 0.0) -> torch.Tensor:
    """Other channels of every head along a dimension; new ones have one value."""
    index = torch.tensor([head * size + max(one, 0) for head, own in enumerate(channels) for one in own])
    made = tensor.index_select(dim, index.to(tensor.device))
    new = torch.tensor([one == NEW for own in channels for one in own]).nonzero()[:, 0]
    return made.clone().index_fill(dim, new.to(tensor.device), fill) if len(new) else made
