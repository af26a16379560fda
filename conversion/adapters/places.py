"""Where every row and column of a weight comes from.

Where weights go is said by the family's rules (`rules`). Each only moves values, so a table of which row and column of
which native weight every row and column of ours is can be read off the operation itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import rules
from ..errors import ConversionError
from .files import WAY_OUT
from .pair import Pair


@dataclass(frozen=True)
class Place:
    """
    Where a module's weight comes from.

    Attributes:
        sources: modules of the other side.
        which, rows: for every output of the module, its number in `sources` and its output there; `None`: all outputs of
            the one source in their order.
        columns: for every input of the module, the input of its sources; `None`: the same.
    """

    sources: tuple[str, ...]
    which: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    @property
    def is_rename(self) -> bool:
        return self.rows is None and self.columns is None


def _place(step: rules.Step, index: int, code: torch.Tensor, sides: tuple[int, int], swapped: bool) -> Place:
    """
    Args:
        code: for every value of the target's weight, which source's value it is.
        sides: the largest of the sources' first and second dimensions, which `code` is made of.
        swapped: whether the target's dimensions are (in, out).
    """
    sources = tuple(name.rpartition(".")[0] for name in step.sources)
    which, first, second = code // (sides[0] * sides[1]), code // sides[1] % sides[0], code % sides[1]
    if swapped:
        which, first, second = which.T, first.T, second.T
    # (out, in): outputs of the source are its first dimension or its second (Conv1D).
    for rows, columns in ((first, second), (second, first)):
        if (rows == rows[:, :1]).all() and (columns == columns[:1]).all() and (which == which[:, :1]).all():
            return Place(sources, which[:, 0], rows[:, 0], columns[0])
    raise ConversionError(f"{step.targets[index]} is no rearrangement of rows and columns. {WAY_OUT}")


def places_of(pair: Pair, steps: Iterable[rules.Step], to_native: bool, wanted: set[str]) -> dict[str, Place]:
    """For every module of the target that has to do with `wanted` modules of the source, where its weight is from."""
    source, target = (pair.variant, pair.native) if to_native else (pair.native, pair.variant)
    shapes, made = source.state_dict(), target.state_dict()
    found: dict[str, Place] = {}
    for step in steps:
        modules = [name.rpartition(".")[0] for name in step.sources]
        if wanted.isdisjoint(modules) or not step.sources[0].endswith(".weight"):
            continue
        op = step.rule.op
        if type(op) is rules.Identity:
            found |= {t.rpartition(".")[0]: Place((m,)) for m, t in zip(modules, step.targets)}
            continue
        first = max(shapes[name].shape[0] for name in step.sources)
        second = max(shapes[name].shape[-1] for name in step.sources)
        codes = []
        for number, name in enumerate(step.sources):
            shape = shapes[name].shape
            if len(shape) != 2:
                raise ConversionError(f"An adapter on {modules[number]} cannot be translated. {WAY_OUT}")
            rows = (torch.arange(shape[0]) + number * first)[:, None]
            codes.append((rows * second + torch.arange(shape[1])).contiguous())
        config = rules.resolved(pair.config, step, to_native)
        moved = op.backward(codes, config) if to_native else op.forward(codes, config)
        for index, (name, code) in enumerate(zip(step.targets, moved)):
            module = name.rpartition(".")[0]
            swapped = isinstance(target.get_submodule(module), Conv1D)
            if code.shape != made[name].shape:
                raise ConversionError(f"{name} has another shape than what it is made of. {WAY_OUT}")
            place = _place(step, index, code, (first, second), swapped)
            found[module] = _simplified(place, [source.get_submodule(m) for m in modules])
    return found


def _simplified(place: Place, layers: list[nn.Module]) -> Place:
    """The same with only the sources that have a part in it, and without tables that change nothing."""
    used = sorted(set(place.which.tolist()))
    number = torch.zeros(len(place.sources), dtype=torch.long)
    number[used] = torch.arange(len(used))
    outs, ins = sizes_of(layers[used[0]])
    columns = None if torch.equal(place.columns, torch.arange(ins)) else place.columns
    sources = tuple(place.sources[i] for i in used)
    if len(used) == 1 and torch.equal(place.rows, torch.arange(outs)):
        return Place(sources, None, None, columns)
    return Place(sources, number[place.which], place.rows, columns)


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def gathered(tensors: list[torch.Tensor], place: Place, dim: int) -> torch.Tensor:
    """Slices of the sources' tensors along `dim`, as the rows of the weight are."""
    stacked = [tensor.movedim(dim, 0) for tensor in tensors]
    made = stacked[0].new_empty((len(place.rows), *stacked[0].shape[1:]))
    for number, tensor in enumerate(stacked):
        mine = place.which == number
        made[mine] = tensor[place.rows[mine]]
    return made.movedim(0, dim).contiguous()
