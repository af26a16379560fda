"""Reversible weight rules: where every native tensor goes, and how, in both directions from one description.

A rule joins native names and ours through an operation. Names are templates: `{layer}` stands for a number, `{leaf}`
for `weight` or `bias`, and `{head*}` for all numbers at once, in order. An operation maps a list of tensors to a list
of tensors and knows its inverse; chains of operations are inverted by inverting the links in reverse order.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .errors import ConversionError


Tensors = list[torch.Tensor]


class Op:
    """A reversible operation on a list of tensors; `config` is the layer's resolved `VariantConfig`."""

    def forward(self, tensors: Tensors, config: Any) -> Tensors:
        raise NotImplementedError

    def backward(self, tensors: Tensors, config: Any) -> Tensors:
        raise NotImplementedError


class Identity(Op):
    """The same tensors under other names."""

    def forward(self, tensors, config):
        return tensors

    backward = forward


class Transpose(Op):
    """Swaps the two dimensions of matrices (GPT-2's Conv1D); vectors pass through. Its own inverse."""

    def forward(self, tensors, config):
        return [tensor.transpose(0, 1) if tensor.ndim == 2 else tensor for tensor in tensors]

    backward = forward


class Split(Op):
    """One tensor into several along the first dimension; the inverse concatenates."""

    def __init__(self, sizes: Callable[[Any], list[int]]):
        self.sizes = sizes

    def forward(self, tensors, config):
        (tensor,) = tensors
        return list(tensor.split(self.sizes(config), dim=0))

    def backward(self, tensors, config):
        return [torch.cat(tensors, dim=0)]


class Permute(Op):
    """Reorders rows: row `index[i]` becomes row i; the inverse puts them back."""

    def __init__(self, index: Callable[[Any], torch.Tensor]):
        self.index = index

    def forward(self, tensors, config):
        index = self.index(config)
        return [tensor[index] for tensor in tensors]

    def backward(self, tensors, config):
        inverse = torch.argsort(self.index(config))
        return [tensor[inverse] for tensor in tensors]


class Stack(Op):
    """Several tensors into one with a new first dimension; the inverse takes them apart."""

    def forward(self, tensors, config):
        return [torch.stack(tensors)]

    def backward(self, tensors, config):
        (tensor,) = tensors
        return list(tensor.unbind(0))


class Chain(Op):
    """Operations one after the other; the inverse runs their inverses backwards."""

    def __init__(self, *ops: Op):
        self.ops = ops

    def forward(self, tensors, config):
        for op in self.ops:
            tensors = op.forward(tensors, config)
        return tensors

    def backward(self, tensors, config):
        for op in reversed(self.ops):
            tensors = op.backward(tensors, config)
        return tensors


def _as_tuple(templates: str | tuple[str, ...]) -> tuple[str, ...]:
    return (templates,) if isinstance(templates, str) else templates


@dataclass(frozen=True)
class Rule:
    """
    Native tensors <-> ours. Exactly these names on both sides, or none of them.

    Args:
        native, ours: templates of the names.
        op: what makes ours of the native tensors.
        absent: what the native class computes in place of its tensor where a checkpoint lacks it, or `None`.
    """

    native: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    op: Op = field(default_factory=Identity)
    absent: Callable[[Any], torch.Tensor] | None = None

    def native_names(self) -> tuple[str, ...]:
        return _as_tuple(self.native)

    def is_inside(self, ours: str, native: str) -> bool:
        """Whether it is about the bare model, by the prefixes of the names on either side."""
        return _as_tuple(self.ours)[0].startswith(ours)

    def without_prefixes(self, native: str, ours: str) -> "Rule":
        """The same rule for the bare models, whose names lack the prefix of the model inside a head."""
        return replace(
            self,
            native=tuple(name.removeprefix(native) for name in _as_tuple(self.native)),
            ours=tuple(name.removeprefix(ours) for name in _as_tuple(self.ours)),
        )

    def with_prefixes(self, native: str, ours: str) -> "Rule":
        """The same rule for the bare model inside a head, whose names have these prefixes then."""
        return replace(
            self,
            native=tuple(native + name for name in _as_tuple(self.native)),
            ours=tuple(ours + name for name in _as_tuple(self.ours)),
        )

    def with_native_prefix(self, old: str, new: str) -> "Rule":
        """The same rule for a native class that gives the model inside another name."""
        return replace(self, native=tuple(new + name.removeprefix(old) for name in _as_tuple(self.native)))


_PLACEHOLDERS = {"layer": r"\d+", "head": r"\d+", "leaf": "weight|bias"}


def _pattern(template: str) -> re.Pattern[str]:
    """An anchored regular expression with a group per placeholder."""
    parts = re.split(r"(\{\w+\*?\})", template)
    body = "".join(
        f"(?P<{part.strip('{*}')}>{_PLACEHOLDERS[part.strip('{*}')]})" if part.startswith("{") else re.escape(part)
        for part in parts
    )
    return re.compile(body + r"\Z")


def _fill(template: str, bindings: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\*?\}", lambda match: bindings[match.group(1)], template)


@dataclass
class Step:
    """One application of a rule: these source tensors give these target tensors."""

    rule: Rule
    bindings: dict[str, str]
    sources: list[str]
    targets: list[str]

    @property
    def layer(self) -> int | None:
        return int(self.bindings["layer"]) if "layer" in self.bindings else None


def plan(
    rules: Iterable[Rule], source_names: Iterable[str], target_names: Iterable[str], to_native: bool = False
) -> list[Step]:
    """
    Assign every source tensor to exactly one rule and every target tensor to exactly one source.

    Args:
        rules: of one family.
        source_names, target_names: the tensors that exist, and those that must be made.
        to_native: run the rules backwards.

    Raises:
        ConversionError: naming tensors that no rule, or more than one, knows; that are missing; or that are left over.
    """
    rules = list(rules)
    patterns = []
    for rule in rules:
        for position, template in enumerate(_as_tuple(rule.ours if to_native else rule.native)):
            patterns.append((rule, position, _pattern(template)))

    target_names = set(target_names)
    groups: dict[tuple, dict[tuple[int, int], str]] = {}
    unknown = []
    for name in source_names:
        matches = [(rule, position, match) for rule, position, p in patterns if (match := p.match(name))]
        if len(matches) > 1:
            # A norm before or after its branch, say: of several places the config builds one.
            matches = [
                found for found in matches if _has_place(found[0], found[2].groupdict(), target_names, to_native)
            ]
            # A rule gives way to one that takes other tensors along.
            most = max((_claim(found[0]) for found in matches), default=0)
            matches = [found for found in matches if _claim(found[0]) == most]
        if len(matches) > 1:
            raise ConversionError(f"Two rules claim the tensor {name}. The family's rules must not overlap.")
        if not matches:
            unknown.append(name)
            continue
        rule, position, match = matches[0]
        collected = _collected(rule)
        bindings = {key: value for key, value in match.groupdict().items() if key not in collected}
        order = int(match.groupdict().get("head") or 0) if collected else 0
        groups.setdefault((id(rule), tuple(sorted(bindings.items()))), {})[position, order] = name
    if unknown:
        raise ConversionError(
            f"The checkpoint has tensors that the architecture does not know: {some(unknown)}. "
            "Check that the config belongs to these weights."
        )

    by_id = {id(rule): rule for rule in rules}
    targets_left = set(target_names)
    steps, made_twice = [], []
    for (rule_id, bindings_items), members in groups.items():
        rule, bindings = by_id[rule_id], dict(bindings_items)
        sources = [members[key] for key in sorted(members)]
        expected = _as_tuple(rule.ours if to_native else rule.native)
        if not _collected(rule) and len(sources) != len(expected):
            missing = [_fill(template, bindings) for template in expected]
            raise ConversionError(
                f"Tensors are missing: {some([name for name in missing if name not in sources])}. "
                "The checkpoint is incomplete."
            )
        targets = _target_names(rule, bindings, targets_left, to_native)
        made_twice += [name for name in targets if name not in targets_left]
        targets_left -= set(targets)
        steps.append(Step(rule, bindings, sources, targets))
    if made_twice:
        raise ConversionError(
            f"The checkpoint has tensors that the config has no place for: {some(made_twice)}. "
            "Check that the config belongs to these weights."
        )
    if not to_native:
        steps += _steps_without_sources(rules, targets_left)
        targets_left -= {name for step in steps for name in step.targets}
    if targets_left:
        raise ConversionError(
            f"The checkpoint lacks what these tensors are made of: {some(sorted(targets_left))}. "
            "It is incomplete, or the config does not belong to these weights."
        )
    return steps


def _steps_without_sources(rules: Iterable[Rule], targets_left: Iterable[str]) -> list[Step]:
    """Steps for tensors that the native class computes where a checkpoint lacks them."""
    computed = [(rule, _pattern(_as_tuple(rule.ours)[0])) for rule in rules if rule.absent]
    return [
        Step(rule, match.groupdict(), [], [name])
        for name in sorted(targets_left)
        for rule, pattern in computed
        if (match := pattern.match(name))
    ]


def renamed(rules: Iterable[Rule], names: Iterable[str], to_native: bool = False) -> dict[str, str]:
    """Of these source tensors those that one rule moves alone, unchanged, with the target's names."""
    moves = [rule for rule in rules if isinstance(rule.op, Identity)]
    pairs = [(_as_tuple(rule.native), _as_tuple(rule.ours)) for rule in moves]
    found = {}
    for native, ours in pairs:
        source, target = (ours, native) if to_native else (native, ours)
        pattern = _pattern(source[0])
        found |= {n: _fill(target[0], match.groupdict()) for n in names if (match := pattern.match(n))}
    return found


def _collected(rule: Rule) -> set[str]:
    """Placeholders that gather all their values, marked with a star."""
    templates = _as_tuple(rule.native) + _as_tuple(rule.ours)
    return {name for template in templates for name in re.findall(r"\{(\w+)\*\}", template)}


def _claim(rule: Rule) -> int:
    """How many tensors it takes together."""
    return len(_as_tuple(rule.native))


def _has_place(rule: Rule, bindings: dict[str, str], target_names: set[str], to_native: bool) -> bool:
    """Whether what this rule makes exists in the target."""
    templates = _as_tuple(rule.native if to_native else rule.ours)
    return all(_fill(template, bindings) in target_names for template in templates)


def _target_names(rule: Rule, bindings: dict[str, str], targets_left: set[str], to_native: bool) -> list[str]:
    names = []
    for template in _as_tuple(rule.native if to_native else rule.ours):
        starred = re.findall(r"\{(\w+)\*\}", template)
        if not starred:
            names.append(_fill(template, bindings))
            continue
        index = 0
        while (name := _fill(template, {**bindings, starred[0]: str(index)})) in targets_left:
            names.append(name)
            index += 1
    return names


def single(rule: Rule, name: str, to_native: bool) -> Step | None:
    """A rule's step for one tensor that it renames, or `None` if it has another name or the rule takes more of them."""
    sources, targets = (
        _as_tuple(side) for side in ((rule.ours, rule.native) if to_native else (rule.native, rule.ours))
    )
    match = _pattern(sources[0]).match(name) if len(sources) == len(targets) == 1 and not _collected(rule) else None
    return match and Step(rule, match.groupdict(), [name], [_fill(targets[0], match.groupdict())])


def without(steps: Iterable[Step], targets: Set[str]) -> list[Step]:
    """The steps that make anything else than these tensors."""
    return [step for step in steps if not targets >= set(step.targets)]


def by_name(steps: Iterable[Step], made_by: Callable[[list[Step]], Iterable[tuple[str, Any]]]) -> Callable[[str], Any]:
    """A target tensor by name, in any order; what a step makes together is kept until another step is asked for."""
    step_of = {name: step for step in steps for name in step.targets}
    made: dict[str, Any] = {}

    def one(name: str) -> Any:
        if name not in made:
            made.clear()
            made.update(made_by([step_of[name]]))
        return made[name]

    return one


def some(names: list[str], limit: int = 6) -> str:
    """The first of these names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def resolved(config: Any, step: Step, to_native: bool) -> Any:
    """The config that a step's operation reads: of its stack and of its layer."""
    stack = (step.sources if to_native else step.targets)[0].removeprefix("model.").partition(".")[0]
    if config.is_encoder_decoder and stack in ("encoder", "decoder"):
        config = getattr(config, stack)
    return config if step.layer is None or config.is_encoder_decoder else config.per_layer_config[step.layer]


def run(
    steps: Iterable[Step],
    source: Callable[[str], torch.Tensor],
    config: Any,
    target_shapes: Mapping[str, torch.Size],
    to_native: bool = False,
    unread: Callable[[str], Any] | None = None,
) -> Iterator[tuple[str, Any]]:
    """
    Carry out planned steps one by one, so that only a step's tensors need be in memory.

    Args:
        source: loads a source tensor by name.
        unread: gives what stands for it where a step only changes its name, and then comes out.
        config: the `VariantConfig`, whichever the direction.
        target_shapes: shape of every target tensor.

    Yields:
        name and tensor, which may be a view of the source's memory.
    """
    for step in steps:
        layer = resolved(config, step, to_native)
        op = step.rule.op
        load = unread if unread is not None and isinstance(op, Identity) else source
        tensors = [load(name) for name in step.sources]
        if not tensors:
            made = [step.rule.absent(layer)]
        else:
            try:
                made = op.backward(tensors, layer) if to_native else op.forward(tensors, layer)
            except RuntimeError as error:
                raise ConversionError(
                    f"{some(step.sources)} of shape {tuple(tensors[0].shape)} cannot be taken apart as the config wants "
                    f"({' '.join(str(error).split())}). The config does not belong to these weights."
                ) from error
        if len(made) != len(step.targets):
            raise ConversionError(
                f"{some(step.sources)} gives {len(made)} tensors for {len(step.targets)} places. "
                "The config does not belong to these weights."
            )
        for name, tensor in zip(step.targets, made):
            if tensor.shape != target_shapes[name]:
                raise ConversionError(
                    f"{some(step.sources)} has shape {tuple(tensors[0].shape)}, which makes {tuple(tensor.shape)} of "
                    f"{name} where the config wants {tuple(target_shapes[name])}. "
                    "The config does not belong to these weights."
                )
            yield name, tensor
