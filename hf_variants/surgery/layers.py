"""Depth: layers kept, dropped, repeated and reordered, and new ones that begin as the identity."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..conversion.folds import is_zero_centered
from ..model.axis import LIST_OF_LAYERS
from ..model.block import Block, LearnedScaleResidual
from ..model.configuration_variant import FIELDS, VariantConfig
from ..model.normalization import unchanged
from .operation import Operation
from .subject import APPROXIMATE, SAME_BITS, Outcome, Subject, SurgeryError, edited, fields_by_layer, with_stacks


SUBLAYERS = ("self_attn", "cross_attn", "mlp")
# What a sublayer ends with.
OUTPUTS = ("o_proj", "down_proj")


def parse_layers(text: str) -> tuple[int, ...]:
    """
    Layers by number from 0, ranges with both ends: `"0-4,2-6"` -> (0, 1, 2, 3, 4, 2, 3, 4, 5, 6); `"6-4"` counts down.

    Raises:
        SurgeryError: for anything else.
    """
    layers: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise SurgeryError(f"{text!r} is no list of layers. Write numbers from 0 and ranges, such as 0-4,2-6.")
        first, last = int(match[1]), int(match[2] or match[1])
        layers += range(first, last + 1) if first <= last else range(first, last - 1, -1)
    return tuple(layers)


@dataclass(frozen=True)
class SelectLayers(Operation):
    """
    The layers of a stack from these of its old ones, in this order, which may leave out, repeat and reorder.

    Args:
        layers: numbers of old layers, from 0; or as `parse_layers` reads them.
        stack: `"encoder"` or `"decoder"` of an encoder-decoder.
        deepnorm: of a stack whose norm placement is deepnorm, whether its constants are kept (`"keep"`) or derived from
            the new depth (`"derive"`).
    """

    layers: Sequence[int] | str
    stack: str = ""
    deepnorm: str = "keep"

    def apply(self, subject: Subject) -> Subject:
        layers = parse_layers(self.layers) if isinstance(self.layers, str) else tuple(self.layers)
        stack = subject.stack(self.stack)
        depth = _in_range(subject.stacks[stack], layers)
        if not layers:
            raise SurgeryError("No layer is left. Keep at least one.")
        if layers == tuple(range(depth)):
            return subject.changed(Outcome(f"all {depth} layers kept", SAME_BITS))
        what = f"layers {_written(layers)} of {depth}{f' of the {stack}' if stack else ''}"
        return _rearranged(subject, stack, layers, frozenset(), what, APPROXIMATE, self.deepnorm)


@dataclass(frozen=True)
class DropLayers(Operation):
    """A stack without some of its layers; arguments as of `SelectLayers`."""

    layers: Sequence[int] | str
    stack: str = ""
    deepnorm: str = "keep"

    def apply(self, subject: Subject) -> Subject:
        dropped = parse_layers(self.layers) if isinstance(self.layers, str) else tuple(self.layers)
        depth = _in_range(subject.stacks[subject.stack(self.stack)], dropped)
        kept = tuple(layer for layer in range(depth) if layer not in dropped)
        return SelectLayers(kept, self.stack, self.deepnorm).apply(subject)


@dataclass(frozen=True)
class GrowLayers(Operation):
    """
    A new layer behind each of these, a copy of it that begins as the identity (https://arxiv.org/abs/2401.02415).

    What each branch of a new layer ends with is set to zero: its learned scale, or the norm on the branch, or its output
    projection. The model computes the same bits until it is trained.

    Args:
        after: numbers of layers, from 0; or as `parse_layers` reads them. One that stands there twice gets two.
        stack: `"encoder"` or `"decoder"` of an encoder-decoder.
    """

    after: Sequence[int] | str
    stack: str = ""

    def apply(self, subject: Subject) -> Subject:
        after = parse_layers(self.after) if isinstance(self.after, str) else tuple(self.after)
        stack = subject.stack(self.stack)
        depth = _in_range(subject.stacks[stack], after)
        for layer in sorted(set(after)):
            _refuse_other_than_identity(subject.blocks(stack)[layer], layer)
        layers: list[int] = []
        fresh: set[int] = set()
        for layer in range(depth):
            layers.append(layer)
            for _ in range(after.count(layer)):
                fresh.add(len(layers))
                layers.append(layer)
        where = _written(sorted(after)) + (f" of the {stack}" if stack else "")
        what = f"{len(fresh)} new layers behind {where}, as the identity"
        return _rearranged(subject, stack, tuple(layers), frozenset(fresh), what, SAME_BITS, "keep")


def _in_range(config: VariantConfig, layers: Sequence[int]) -> int:
    """The depth of a stack that has all of these layers."""
    depth = config.num_hidden_layers
    if beyond := sorted({layer for layer in layers if not 0 <= layer < depth}):
        raise SurgeryError(
            f"There is no layer {', '.join(map(str, beyond))}: the stack has {depth}. Name layers from 0 to {depth - 1}."
        )
    return depth


def _written(layers: Sequence[int]) -> str:
    """(0, 1, 2, 5) -> "0-2,5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _rearranged(
    subject: Subject,
    stack: str,
    layers: tuple[int, ...],
    fresh: frozenset[int],
    what: str,
    exactness: str,
    deepnorm: str,
) -> Subject:
    """The subject with these old layers in this order, of which those in `fresh` begin as the identity."""
    config = subject.stacks[stack]
    notes: list[str] = []
    changes = {stack: _fields_by_layer(config, layers, notes)}
    for name, fields in _deepnorm(subject.stacks, stack, deepnorm, notes).items():
        changes[name] = changes.get(name, {}) | fields
    leftovers = _leftovers(subject.config.native_leftovers, config.num_hidden_layers, len(layers), stack, notes)
    changed = with_stacks(subject.config, changes)
    changed = edited(changed, native_leftovers=leftovers)
    prefix = re.escape(subject.prefix(stack))
    in_layer = re.compile(rf"({prefix}layers\.)(\d+)\.(.+)")
    in_table = re.compile(rf"({prefix}position_bias\.tables\.)(\d+)(\..+)")
    has_tables = config.position_embedding_type == "relative_bias" and config.relative_attention_per_layer
    zeros = {place: outputs_of(subject.blocks(stack)[layers[place]]) for place in fresh}

    def tensor(name: str, before: Subject) -> torch.Tensor:
        if match := in_layer.fullmatch(name):
            place, rest = int(match[2]), match[3]
            old = before.load(f"{match[1]}{layers[place]}.{rest}")
            return torch.full_like(old, zeros[place][rest]) if rest in zeros.get(place, ()) else old
        if has_tables and (match := in_table.fullmatch(name)):
            return before.load(f"{match[1]}{layers[int(match[2])]}{match[3]}")
        return before.load(name)

    return subject.changed(Outcome(what, exactness, tuple(notes)), tensor, config=changed)


def _fields_by_layer(config: VariantConfig, layers: tuple[int, ...], notes: list[str]) -> dict[str, Any]:
    """The fields of a stack that speak of single layers, after a rearrangement."""
    changes: dict[str, Any] = {"num_hidden_layers": len(layers)}
    for name, field in FIELDS.items():
        if LIST_OF_LAYERS in field.metadata and (values := getattr(config, name)) is not None:
            changes[name] = [values[layer] for layer in layers]
    old = fields_by_layer(config)
    overrides = {place: dict(old[layer]) for place, layer in enumerate(layers) if layer in old}
    if not config.first_layer_pre_norm:
        changes["first_layer_pre_norm"] = layers[0] != 0
        if 0 in layers[1:]:
            raise SurgeryError(
                "Layer 0 has no norm before its attention (`first_layer_pre_norm`), which no other place of a stack can "
                "do without. Leave it first and alone."
            )
        if layers[0] != 0:
            notes.append("`first_layer_pre_norm` is on: the layer that is first now has its norm")
    if config.scale_attn_by_inverse_layer_idx and layers != tuple(range(len(layers))):
        # As the builder computes it for the old place.
        changes["scale_attn_by_inverse_layer_idx"] = False
        for place, layer in enumerate(layers):
            one = config.per_layer_config[layer]
            scaling = one.head_dim**-0.5 if one.attention_scaling is None else one.attention_scaling
            overrides.setdefault(place, {})["attention_scaling"] = scaling / (layer + 1)
        notes.append("`scale_attn_by_inverse_layer_idx`: every layer keeps the scale of its old number")
    changes["per_layer_config"] = overrides or None
    return changes


def _deepnorm(
    stacks: dict[str, VariantConfig], changed: str, choice: str, notes: list[str]
) -> dict[str, dict[str, Any]]:
    """DeepNorm's constants, which are derived from the depth; in an encoder-decoder from both."""
    if choice not in ("keep", "derive"):
        raise SurgeryError(f"`deepnorm` is {choice!r}. Give keep or derive.")
    layers = {stack: list(config.per_layer_config) for stack, config in stacks.items()}
    scaled = [stack for stack in stacks if any(layer.norm_placement == "deepnorm" for layer in layers[stack])]
    if choice == "derive" and scaled:
        notes.append("`deepnorm_alpha` and `deepnorm_beta` are derived from the new depth")
        return {name: {"deepnorm_alpha": None, "deepnorm_beta": None} for name in scaled}
    if changed in scaled:
        notes.append("`deepnorm_alpha` and `deepnorm_beta` are kept as they were derived from the old depth")
    return {}


def _leftovers(
    leftovers: dict[str, Any] | None, before: int, after: int, stack: str, notes: list[str]
) -> dict[str, Any] | None:
    """
    What is kept of a native config, without what speaks of the old layers: the way back would tell engines something
    untrue. A number that is the depth becomes the new one.
    """
    kept: dict[str, Any] = {}
    for name, value in (leftovers or {}).items():
        speaks = re.search(r"layer|pattern|interval|depth|every_n", name) or (
            isinstance(value, list) and len(value) == before
        )
        if not speaks:
            kept[name] = value
        elif type(value) is int and value == before and "layer" in name:
            kept[name] = after
        elif value is not None:
            notes.append(f"`{name}` of the native config speaks of the old layers and is dropped")
    return kept if leftovers is not None else None


def outputs_of(block: Block) -> dict[str, float]:
    """The parameters of a block that end its branches, and the values with which the branches are zero."""
    found: dict[str, float] = {}
    for name in SUBLAYERS:
        sublayer = getattr(block, name, None)
        if sublayer is None:
            continue
        residual, norm = getattr(block, f"{name}_residual"), getattr(block, f"{name}_branch_norm")
        if isinstance(residual, LearnedScaleResidual):
            found[f"{name}_residual.scale"] = 0.0
            continue
        if isinstance(norm, nn.Module) and getattr(norm, "weight", None) is not None:
            # What is added to a stored weight before it is applied, if anything.
            offset = 1.0 if is_zero_centered(norm) else 0.0
            parameters = norm.named_parameters()
            found |= {f"{name}_branch_norm.{leaf}": -offset if leaf == "weight" else 0.0 for leaf, _ in parameters}
            continue
        output = next(output for output in OUTPUTS if hasattr(sublayer, output))
        found |= {f"{name}.{output}.{leaf}": 0.0 for leaf, _ in getattr(sublayer, output).named_parameters()}
    return found


def _refuse_other_than_identity(block: Block, layer: int) -> None:
    """Refuse a copy of a block that is not the identity when its branches are zero."""
    for name in SUBLAYERS:
        if getattr(block, name, None) is None:
            continue
        if getattr(block, f"{name}_post_norm") is not unchanged:
            raise SurgeryError(
                f"Layer {layer} normalises the sum of residual and branch (`norm_placement` post or deepnorm), so that no "
                "copy of it is the identity. Repeat layers with `--layers` instead, which is approximate."
            )
    if block.residual_from_norm:
        raise SurgeryError(
            f"Layer {layer} adds its branch to the normalised input (`residual_from_norm`), so that no copy of it is the "
            "identity. Repeat layers with `--layers` instead, which is approximate."
        )
