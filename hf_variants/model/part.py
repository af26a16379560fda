"""What is decided before anything is built: a tree of classes, their arguments and their names, and what each costs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Call:
    """
    What a forward is given.

    Attributes:
        batch: number of sequences.
        length: tokens of each.
        past: tokens of each that a cache has already.
        source: tokens of what cross-attention reads; 0 without.
        source_is_cached: its keys and values are in the cache.
        logits: positions whose logits are computed; `None` for all.
        masked: count of attention's scores only those that the mask leaves, instead of all that a dense product has.
    """

    batch: int
    length: int
    past: int = 0
    source: int = 0
    source_is_cached: bool = False
    logits: int | None = None
    masked: bool = False

    def of_length(self, length: int) -> "Call":
        """The same for so many tokens without a past."""
        return replace(self, length=length, past=0)


# What each room says of its classes, beside them. The functions take a class's own arguments, by name:
# shapes of the parameters that it makes itself, by name
SHAPES: dict[Callable, Callable] = {}
# (call) -> multiplications and additions of its own matrix products in one forward; those of other operations count as
# none, as in torch's FlopCounterMode
FLOPS: dict[Callable, Callable] = {}
# (call, name of a child) -> the call that the child gets, where it is another
CALLS: dict[Callable, Callable] = {}


def states(table: dict[Callable, Callable], *classes: Callable) -> Callable:
    """Enter the decorated function for these classes, and those that inherit from them."""

    def enter(function: Callable) -> Callable:
        table.update(dict.fromkeys(classes, function))
        return function

    return enter


def _stated(table: dict[Callable, Callable], cls: Callable) -> Callable | None:
    return next((table[base] for base in getattr(cls, "__mro__", (cls,)) if base in table), None)


@states(SHAPES, nn.Linear)
def linear_shapes(in_features: int, out_features: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features)}
    return weight | {"bias": (out_features,)} if bias else weight


@states(FLOPS, nn.Linear)
def linear_flops(call: Call, in_features: int, out_features: int, bias: bool = True) -> int:
    return 2 * call.batch * call.length * in_features * out_features


@states(SHAPES, nn.Embedding)
def embedding_shapes(num_embeddings: int, embedding_dim: int, **_: Any) -> dict[str, tuple[int, ...]]:
    return {"weight": (num_embeddings, embedding_dim)}


class Part:
    """
    A module that is yet to be built. An argument that is a part is built first, and becomes the module's child of that
    name; so do the entries of a list or a dictionary of parts, for `nn.ModuleList` and `nn.ModuleDict`.

    Args:
        cls (`Callable`): the class.
        arguments: what it is given, by name.

    Attributes:
        attributes (`dict`): what is set on the module when it is built: the standard deviation of its weights, ...
    """

    def __init__(self, cls: Callable, **arguments: Any):
        self.cls = cls
        self.arguments = arguments
        self.attributes: dict[str, Any] = {}
        self._children: dict[str, Part] | None = None

    def __repr__(self) -> str:
        return f"Part({self.cls.__name__}, {', '.join(f'{name}={value}' for name, value in self.arguments.items())})"

    def is_a(self, cls: type) -> bool:
        """Whether it will be an instance of this class."""
        return isinstance(self.cls, type) and issubclass(self.cls, cls)

    def children(self) -> dict[str, "Part"]:
        """The parts that it is made of, by their names in it. A model's class says them itself, in `parts`."""
        if self._children is None:
            self._children = self._find_children()
        return self._children

    def _find_children(self) -> dict[str, "Part"]:
        if hasattr(self.cls, "parts"):
            return _parts_in(self.cls.parts(**self.arguments))
        named = _parts_in(self.arguments)
        for value in self.arguments.values():
            if isinstance(value, (list, dict)):
                named |= _parts_in(value if isinstance(value, dict) else dict(enumerate(value)))
        return named | _parts_in(self.attributes)

    def walk(self, path: str = "") -> Iterator[tuple[str, "Part"]]:
        """Itself and every part below it, with their paths, as `nn.Module.named_modules`."""
        yield path, self
        for name, child in self.children().items():
            yield from child.walk(f"{path}.{name}" if path else name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters that its class makes itself, by their names in it."""
        stated = _stated(SHAPES, self.cls)
        return stated(**self.arguments) if stated else {}

    def flops(self, call: Call) -> int:
        """Multiplications and additions of its class's own matrix products in one forward."""
        stated = _stated(FLOPS, self.cls)
        return stated(call, **self.arguments) if stated else 0

    def calls(self, call: Call, path: str = "") -> Iterator[tuple[str, "Part", Call]]:
        """As `walk`, with the call that every part gets when the whole gets this one."""
        yield path, self, call
        stated = _stated(CALLS, self.cls)
        for name, child in self.children().items():
            childs_call = stated(call, name, **self.arguments) if stated else call
            yield from child.calls(childs_call, f"{path}.{name}" if path else name)

    def build(self) -> Any:
        """The module."""
        module = self.cls(**built(self.arguments))
        for name, value in self.attributes.items():
            setattr(module, name, built(value))
        return module


def _parts_in(values: dict) -> dict[str, Part]:
    return {str(name): value for name, value in values.items() if isinstance(value, Part)}


def built(value: Any) -> Any:
    """A value with the parts in it built; one without stays what it is."""
    if isinstance(value, Part):
        return value.build()
    if isinstance(value, list):
        return [built(entry) for entry in value]
    return {name: built(entry) for name, entry in value.items()} if isinstance(value, dict) else value
