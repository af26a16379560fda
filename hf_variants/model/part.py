"""What is decided before anything is built: a tree of classes, their arguments and their names."""

from collections.abc import Callable, Iterator
from typing import Any


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

    def __repr__(self) -> str:
        return f"Part({self.cls.__name__}, {', '.join(f'{name}={value}' for name, value in self.arguments.items())})"

    def children(self) -> dict[str, "Part"]:
        """The parts that it is made of, by their names in it. A model's class says them itself, in `parts`."""
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
