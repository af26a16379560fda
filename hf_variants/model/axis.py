"""What an axis of the config is made of: fields, documentation, derived defaults and checks, beside what they decide."""

import contextlib
import difflib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import Field, dataclass, field, fields
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers.activations import ACT2FN


# What can be said of a field beside its type and default; `setting` takes them.
# The same function in exact arithmetic: how a stock class orders, rounds or stores what it computes.
ROUNDING = "rounding"
# Layers may differ in it (`per_layer_config`): the builder reads it from a layer's own config.
PER_LAYER = "per_layer"
# Without effect on the outputs of a model that is trained, at least above float16.
TRAINING = "training"
# A list with one entry per layer.
LIST_OF_LAYERS = "list_of_layers"


def setting(default: Any, *kinds: str) -> Any:
    """A field of an axis with its default, of one or more of the kinds above; one of no kind needs no `setting`."""
    return field(default=default, metadata=dict.fromkeys(kinds, True))


class Check(NamedTuple):
    """A row of an axis's checks: whether it is broken, and one sentence each on what is wrong and what to do."""

    broken: bool
    wrong: str
    remedy: str


class Idle(NamedTuple):
    """A row of an axis's idle fields: whether these fields have no effect, and why, in words that follow "because"."""

    idle: bool
    fields: list[str]
    because: str


class VariantConfigError(StrictDataclassClassValidationError, ValueError):
    """A config that cannot be built; the message has every problem with its remedy."""

    def __init__(self, message: str):
        Exception.__init__(self, message)


def refuse(checks: list[Check]) -> None:
    """Raise one `VariantConfigError` with every broken check, each said once."""
    sentences = dict.fromkeys(f"{wrong} {remedy}" for broken, wrong, remedy in checks if broken)
    if sentences:
        raise VariantConfigError("This config cannot be built. " + " ".join(sentences))


def activation_check(field: str, name: str) -> Check:
    """That transformers has the activation which a field names."""
    like = difflib.get_close_matches(name, ACT2FN) or ("silu", "gelu")
    return Check(
        name not in ACT2FN,
        f"`{field}` {name} is not an activation that transformers has.",
        f"Choose a key of its ACT2FN, such as {' or '.join(like)}.",
    )


def quote(names: list[str]) -> str:
    """Names of fields, as messages show them."""
    return ", ".join(f"`{name}`" for name in names)


class Axis:
    """
    One axis of the architecture, a base of `VariantConfig`. Its methods read the fields of all axes from `self`.

    The axis stands in the file that it decides about, and has fields as annotations with defaults, which its docstring
    explains; those that only say how a stock class rounds are `ROUNDING`, and stand last in both.
    """

    title = ""

    def derive(self) -> None:
        """Fill in the fields that were left at `None`."""

    def checks(self) -> list[Check]:
        """What can be wrong, for a stack or one layer's resolved config; the rows are the same for every config."""
        return []

    def idle(self) -> list[Idle]:
        """Which of the axis's fields have no effect under the rest of the config."""
        return []

    @classmethod
    def named(cls, prefix: str) -> list[str]:
        """Fields of an axis whose names begin so."""
        return [name for name in cls.__dataclass_fields__ if name.startswith(prefix)]


# As transformers' configs are, but without methods that would stand before theirs.
axis = dataclass(init=False, repr=False, eq=False)


def own_fields(room: type) -> dict[str, Field]:
    """The fields that a class declares itself, in their order."""
    return {entry.name: entry for entry in fields(room) if entry.name in room.__annotations__}


_warns = ContextVar("_warns", default=True)


@contextlib.contextmanager
def nobody_chose() -> Iterator[None]:
    """Around the construction of configs whose values no user set: idle ones are no mistake of anybody's."""
    token = _warns.set(False)
    try:
        yield
    finally:
        _warns.reset(token)


def somebody_chose() -> bool:
    """Whether a user set the values of the config under construction."""
    return _warns.get()
