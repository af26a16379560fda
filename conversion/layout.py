"""How transformers reads and writes the tensors of a checkpoint: their names, which it passes over, which it makes up."""

import copy
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import logging

from .config_map import UNBUILDABLE
from .errors import ConversionError
from .rules import some
from .skeleton import empty_model, stored_tensors
from .tensor_files import FLOATS, StoredSource, TensorSource, Unread


logger = logging.get_logger(__name__)

NO_PLACE = "transformers has no place for it"
# A module of a list, by its number.
_IN_A_LIST = re.compile(r"(.*?)\.(\d+)\.")


class Weights(Protocol):
    """Stored tensors by name, their shapes and dtypes as tensors without values, and what copies need of them."""

    def names(self) -> list[str]: ...

    def header(self, name: str) -> torch.Tensor: ...

    def stored(self, name: str) -> torch.Tensor | Unread: ...

    def __call__(self, name: str) -> torch.Tensor: ...


@dataclass
class Layout:
    """
    A checkpoint's tensors under the names that its class gives them today.

    Attributes:
        names: what the checkpoint fills, tied copies included.
        load, header: a tensor by such a name, and its shape and dtype without values.
        stored: a tensor by such a name for whoever only copies it, unread where it lies in a file as it is.
        passed_over: stored tensors that transformers does not load either, with the reason.
        apart: their names as for this class, with the stored ones; they can be loaded, for other classes.
    """

    names: list[str]
    load: TensorSource
    header: TensorSource
    stored: StoredSource
    passed_over: dict[str, str] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)

    def dtypes(self) -> set[torch.dtype]:
        """Of the weights, as they are stored."""
        dtypes = {self.header(name).dtype for name in self.names}
        return {dtype for dtype in dtypes if dtype.is_floating_point}

    def passed_over_but(self, taken: Iterable[str]) -> dict[str, str]:
        """What is passed over where some of the tensors of other classes are taken along."""
        stored = {self.apart[name] for name in taken}
        return {name: reason for name, reason in self.passed_over.items() if name not in stored}


class _Names:
    """What transformers' loader makes of stored names for one class."""

    def __init__(self, model: PreTrainedModel):
        self.expected = model.state_dict()
        self.prefix = model.base_model_prefix
        transforms = get_model_conversion_mapping(model)
        self.renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self.converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]

    def __call__(self, stored: str) -> tuple[str, str | None]:
        """The name today, and the pattern of the converter that makes tensors of this one and others together."""
        name, pattern = rename_source_key(stored, self.renamings, self.converters, self.prefix, self.expected)
        if name not in self.expected and stored in self.expected:
            name, pattern = rename_source_key(stored, [], [], self.prefix, self.expected)
        return name, pattern

    def converter(self, pattern: str) -> WeightConverter:
        return next(converter for converter in self.converters if pattern in converter.source_patterns)


def as_transformers_reads(model: PreTrainedModel, weights: Weights) -> Layout:
    """
    The tensors that transformers' loader would put into a model.

    Args:
        model: of the class that the checkpoint is for; no memory is needed for its weights.

    Raises:
        ConversionError: naming layers that the config does not have, what stands before every name, or weights that are no
            floating-point numbers.
    """
    rename = _Names(model)
    converted: dict[str, _Converted] = {}
    copies: dict[str, str] = {}
    passed_over: dict[str, str] = {}
    unexpected: dict[str, str] = {}
    # In transformers' order: of two tensors for one place, it takes the first.
    for stored in sorted(weights.names(), key=dot_natural_key):
        name, pattern = rename(stored)
        if name not in rename.expected:
            unexpected[stored] = name
        elif pattern is not None:
            group = converted.setdefault(name, _Converted(model, name, rename.converter(pattern), weights))
            group.stored.append((stored, pattern))
        elif name in copies:
            passed_over[stored] = f"transformers takes {copies[name]} for the same tensor"
        else:
            copies[name] = stored
    if not copies and not converted:
        _refuse_wrapped(rename, unexpected)
    passed_over |= _reasons(model, unexpected)
    sources = {name: group for group in converted.values() for name in group.names()}
    refuse_other_numbers(model, copies, weights)

    def read(name: str, values: bool) -> torch.Tensor:
        if name in copies:
            return weights(copies[name]) if values else weights.header(copies[name])
        return sources[name].tensor(name, values)

    def stored_as_it_is(name: str) -> torch.Tensor | Unread:
        name = standing_in.get(name, name)
        return weights.stored(copies[name]) if name in copies else sources[name].tensor(name, values=True)

    apart = {name: stored for stored, name in unexpected.items()}
    names = [*copies, *sources]
    copies |= apart
    standing_in = _standing_in(model, names)
    return Layout(
        [name for name in names if name not in standing_in.values()] + list(standing_in),
        lambda name: read(standing_in.get(name, name), values=True),
        lambda name: read(standing_in.get(name, name), values=False),
        stored_as_it_is,
        passed_over,
        apart,
    )


class _Converted:
    """Tensors that transformers makes together of stored ones: a fused projection taken apart, say."""

    def __init__(self, model: PreTrainedModel, name: str, converter: WeightConverter, weights: Weights):
        self.model, self.name, self.converter, self.weights = model, name, converter, weights
        self.stored: list[tuple[str, str]] = []
        self._made: dict[str, torch.Tensor] = {}

    def _make(self, load: TensorSource) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(self.converter)
        for stored, pattern in self.stored:
            converter.add_tensor(self.name, stored, pattern, load(stored))
        made = converter.convert(self.name, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def names(self) -> list[str]:
        return list(self._make(self.weights.header))

    def tensor(self, name: str, values: bool) -> torch.Tensor:
        if not values:
            return self._make(self.weights.header)[name]
        # Each is asked for once.
        if name not in self._made:
            self._made = self._make(self.weights)
        return self._made.pop(name)


def _standing_in(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Names of tensors that the checkpoint lacks -> the tied copy that it has instead, as transformers swaps them."""
    present = set(names)
    found: dict[str, str] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if source not in present and target in present:
            found.setdefault(source, target)
    return found


def refuse_other_numbers(model: PreTrainedModel, copies: Mapping[str, str], weights: Weights) -> None:
    """
    `ConversionError` for weights that are no floats: those of 8 bits and fewer need scales, complex ones have no meaning.

    Args:
        copies: names of the model's tensors, with those under which they are stored.
    """
    expected = model.state_dict()
    for name, stored in copies.items():
        dtype = weights.header(stored).dtype
        if dtype not in FLOATS and expected[name].is_floating_point():
            packed = dtype.itemsize == 1 and dtype is not torch.bool
            raise ConversionError(
                f"{stored} is {str(dtype).removeprefix('torch.')}"
                + (", so the checkpoint is quantised. " if packed else ", and weights are floating-point numbers. ")
                + "Convert the model in float32, bfloat16 or float16."
            )


def _refuse_wrapped(rename: _Names, unexpected: Iterable[str]) -> None:
    """A module around the model was saved: transformers would find none of its weights, and start afresh with a warning."""
    for stored in unexpected:
        parts = stored.split(".")
        for depth in range(1, len(parts)):
            if rename(".".join(parts[depth:]))[0] in rename.expected:
                wrapper = ".".join(parts[:depth]) + "."
                raise ConversionError(
                    f"The checkpoint has the model's tensors under {wrapper!r}, as {stored}: it was saved from a module "
                    "around the model (torch.compile, DataParallel, a trainer's), and transformers would load none of "
                    f"them. Save the model inside, or remove {wrapper!r} from the names."
                )


def _refuse_more_layers(expected: Iterable[str], unexpected: Mapping[str, str]) -> None:
    """transformers would leave them out, and compute another function; that is damage, and no old layout."""
    sizes: dict[str, int] = {}
    for name in expected:
        if match := _IN_A_LIST.match(name):
            sizes[match.group(1)] = max(sizes.get(match.group(1), 0), int(match.group(2)) + 1)
    beyond: dict[str, list[str]] = {}
    for stored, name in unexpected.items():
        match = _IN_A_LIST.match(name)
        if match is not None and int(match.group(2)) >= sizes.get(match.group(1), sys.maxsize):
            beyond.setdefault(match.group(1), []).append(stored)
    for modules, names in beyond.items():
        raise ConversionError(
            f"The config makes {sizes[modules]} of {modules}, and the checkpoint has more: {some(names)}. "
            "Correct the number of layers in config.json if it is wrong, or remove these tensors from the checkpoint."
        )


def checked_names(model: PreTrainedModel, weights: Weights) -> list[str]:
    """
    The names of the tensors that a checkpoint of one of our models consists of: each once, and of tied ones the source.

    Args:
        model: no memory is needed for its weights.
        weights: in the checkpoint; only tied copies are read.

    Raises:
        ConversionError: naming tensors that are missing, nobody's, of another shape or no floating-point numbers.
    """
    tied, expected, present = model.all_tied_weights_keys, stored_tensors(model), set(weights.names())
    names = []
    for name in weights.names():
        if name not in tied or tied[name] not in present:
            names.append(name)
        elif not torch.equal(weights(name), weights(tied[name])):
            raise ConversionError(
                f"The config ties {name} to {tied[name]} (`tie_word_embeddings`), but the checkpoint has different values "
                "for them. Set `tie_word_embeddings` to false in its config.json if they are meant to differ."
            )
    wrong = [f"{name} is missing" for name in expected if name not in names]
    wrong += [f"{name} is not the model's" for name in names if name not in expected]
    if wrong:
        raise _other_weights(wrong)
    refuse_other_shapes(model, weights)
    refuse_other_numbers(model, {name: name for name in names}, weights)
    return names


def refuse_other_shapes(model: PreTrainedModel, weights: Weights) -> None:
    """`ConversionError` for stored tensors of one of our models that have another shape than its config gives them."""
    expected = model.state_dict()
    shapes = {name: weights.header(name).shape for name in weights.names() if name in expected}
    wrong = [
        f"{name} has the shape {list(shape)} instead of {list(expected[name].shape)}"
        for name, shape in shapes.items()
        if shape != expected[name].shape
    ]
    if wrong:
        raise _other_weights(wrong)


def _other_weights(wrong: list[str]) -> ConversionError:
    return ConversionError(
        f"The weights are not those that config.json describes: {'; '.join(wrong[:5])}. Load the checkpoint with the code "
        "that wrote it, and save it again."
    )


def _reasons(model: PreTrainedModel, unexpected: Mapping[str, str]) -> dict[str, str]:
    """Why transformers passes over each stored tensor that has no place; what nobody knows is said aloud."""
    if not unexpected:
        return {}
    loaded = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unexpected.values()))
    model._adjust_missing_and_unexpected_keys(loaded)
    buffers = {name for name, _ in model.named_non_persistent_buffers()}
    reasons = {
        stored: "the class ignores it" if name not in loaded.unexpected_keys else "the model computes it"
        for stored, name in unexpected.items()
        if name not in loaded.unexpected_keys or name in buffers
    }
    _refuse_more_layers(model.state_dict(), {s: name for s, name in unexpected.items() if s not in reasons})
    reasons |= _of_other_classes(model, [stored for stored in unexpected if stored not in reasons])
    if unknown := [stored for stored in unexpected if stored not in reasons]:
        logger.warning(
            f"The config has no place for these tensors, which are left out, as transformers leaves them out: "
            f"{some(unknown)}."
        )
    return reasons | dict.fromkeys(unknown, NO_PLACE)


def _of_other_classes(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Tensors that another class of the same type has: a head left from pretraining, a pooler that this one lacks."""
    left, excuses = list(names), {}
    module = sys.modules[type(model).__module__]
    for other in vars(module).values():
        if not left:
            break
        if not (isinstance(other, type) and issubclass(other, PreTrainedModel)) or isinstance(model, other):
            continue
        if other.config_class is not type(model.config) or other.__module__ != module.__name__:
            continue
        try:
            rename = _Names(empty_model(other, model.config))
        except (AttributeError, ImportError, *UNBUILDABLE):  # such a class has none of the tensors
            continue
        found = [stored for stored in left if rename(stored)[0] in rename.expected]
        excuses |= dict.fromkeys(found, f"{other.__name__} reads it, and this class does not")
        left = [stored for stored in left if stored not in found]
    return excuses


class Stored:
    """
    The tensors of a model as transformers writes them: some names are older than the class, some tensors are fused.

    Args:
        model: of the class that is written; no memory is needed for its weights.
        headers: shape and dtype of every tensor under the class's names.
        recomputed: whether a tensor, by its name, has the values that the class computes where a checkpoint lacks it.

    Attributes:
        headers: the same of every tensor under the names in the file.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        headers: Mapping[str, torch.Tensor],
        recomputed: Callable[[str], bool] = lambda name: False,
    ):
        self.model = copy.copy(model)
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        # As for a model that was not loaded: it is unknown whether a prefix was there.
        conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
        unsaved = set(model._keys_to_ignore_on_save or ())
        headers = {name: header for name, header in headers.items() if name not in unsaved or not recomputed(name)}
        self.model._weight_conversions = conversions or None
        # Class name -> all class names that are written together with it.
        self._together: dict[str, list[str]] = {}
        # Class name -> all names in the file that it has a part in.
        self._files: dict[str, frozenset[str]] = {}
        # Class name -> name in the file, where that is all that changes.
        self._renamed: dict[str, str] = {}
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, header in headers.items():
            groups.setdefault(tuple(self._written({name: header})), []).append(name)
        self.headers: dict[str, torch.Tensor] = {}
        for names in groups.values():
            self._together |= dict.fromkeys(names, names)
            written = self._written({name: headers[name] for name in names})
            self.headers |= written
            self._files |= {name: frozenset(written) for name in names}
            if len(names) == len(written) == 1 and next(iter(written.values())) is headers[names[0]]:
                self._renamed[names[0]] = next(iter(written))

    def _written(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return revert_weight_conversion(self.model, tensors) if self.model._weight_conversions else tensors

    def made_of_all(self, written: Set[str]) -> set[str]:
        """Of tensors in the file, by their names there, the class names that nothing else is made of."""
        return {name for name, files in self._files.items() if written >= files}

    def __call__(
        self, tensors: Iterable[tuple[str, torch.Tensor | Unread]]
    ) -> Iterator[tuple[str, torch.Tensor | Unread]]:
        """The tensors as they go into the file; few wait for others."""
        waiting: dict[str, torch.Tensor] = {}
        for name, tensor in tensors:
            if name not in self._together:
                continue
            if name in self._renamed:
                yield self._renamed[name], tensor
                continue
            waiting[name] = tensor.load() if isinstance(tensor, Unread) else tensor
            names = self._together[name]
            if all(other in waiting for other in names):
                yield from self._written({other: waiting.pop(other) for other in names}).items()


def output_embedding(model: PreTrainedModel) -> str | None:
    """The name of the weight of the LM head, if there is one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        return None
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)
