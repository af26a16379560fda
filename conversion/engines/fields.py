"""Which fields of a config stand in an engine's way: those it lacks, and those that its loader does not know."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ...model.axis import ROUNDING, TRAINING, own_fields
from ...model.configuration_variant import FIELDS, VariantConfig
from ...model.configuration_variant_seq2seq import VariantSeq2SeqConfig
from ..errors import NotRepresentable, Refusal


class Lack(NamedTuple):
    """A row of what an engine lacks: whether a layer needs it, the field that says so, and why it cannot be had."""

    lacks: bool
    field: str
    why: str


# (the stack's config, one layer's resolved config) -> rows
Lacks = Callable[[VariantConfig, VariantConfig], Iterable[Lack]]

UNKNOWN = "its loader does not know the field"


def in_the_way(config: VariantConfig, lacks: Lacks, known: Iterable[str]) -> dict[str, tuple[Any, Refusal]]:
    """
    The fields of a stack that an engine does not compute, with their values and the reasons.

    Args:
        lacks: what the engine lacks.
        known: fields that its loader reads, or that are known to change nothing there. Any other that is off its
            default stands in the way, so that a new field is refused and not passed over.
    """
    rows = [(layer, row) for layer in config.per_layer_config for row in lacks(config, layer)]
    found = {row.field: (getattr(layer, row.field), Refusal(row.why)) for layer, row in reversed(rows) if row.lacks}
    known = {*known, *(row.field for _, row in rows)}
    idle = config.idle_fields()
    for layer in config.per_layer_config:
        for name in architectural_fields() - known - idle.keys():
            if (value := getattr(layer, name)) != FIELDS[name].default:
                found.setdefault(name, (value, Refusal(UNKNOWN)))
    return found


def others_in_the_way(config: VariantSeq2SeqConfig, known: Iterable[str]) -> dict[str, tuple[Any, Refusal]]:
    """The same for what an encoder-decoder has beside its stacks."""
    return {
        name: (getattr(config, name), Refusal(UNKNOWN))
        for name in pair_fields() - set(known)
        if getattr(config, name) != VariantSeq2SeqConfig.__dataclass_fields__[name].default
    }


def pair_fields() -> set[str]:
    """The fields that an encoder-decoder declares itself."""
    return set(own_fields(VariantSeq2SeqConfig))


def architectural_fields() -> set[str]:
    """The fields that change the function of a trained model."""
    return {
        name for name, entry in FIELDS.items() if TRAINING not in entry.metadata and ROUNDING not in entry.metadata
    }


def refuse(engine: str, stacks: Mapping[str, dict[str, tuple[Any, Refusal]]]) -> None:
    """
    Raises:
        NotRepresentable: naming every field in the way, with its stack where there are several.
    """
    found = {
        f"{stack}.{name}" if stack else name: ways for stack, fields in stacks.items() for name, ways in fields.items()
    }
    if found:
        raise NotRepresentable(engine, found, "Change those fields, or run the variant with transformers.")
