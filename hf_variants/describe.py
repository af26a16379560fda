"""What architecture a config stands for, as a table for people."""

import itertools
from pathlib import Path
from typing import Any

import hf_variants

from .conversion.errors import reading
from .conversion.gguf_source import config_of_gguf, is_gguf
from .conversion.json_files import read_config_values
from .cost.parameters import count_parameters, structure
from .model.axis import ROUNDING, Axis, nobody_chose, own_fields
from .model.configuration_variant import AXES


# What other fields' defaults are derived from.
DEFINING = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "norm_type", "ffn_type",
)  # fmt: skip
# Any other field is shown only where it differs from what a plain stack with the same defining fields has.
ALWAYS_SHOWN = frozenset(
    {
        *DEFINING, "intermediate_size", "num_key_value_heads", "norm_placement", "hidden_act", "attention_bias",
        "qk_norm", "is_causal", "layer_types", "position_embedding_type", "tie_word_embeddings",
    }
)  # fmt: skip
# What a native config or class said beside its architecture.
NEVER_SHOWN = frozenset({"native_leftovers", "argument_order"})


def load_config(name: str) -> "hf_variants.VariantConfig | hf_variants.VariantSeq2SeqConfig":
    """The config in a `config.json`, in a folder that holds one, in a GGUF file, or of a preset."""
    path = Path(name)
    if is_gguf(name):
        return config_of_gguf(path)
    if not path.exists():
        presets = sorted(hf_variants.presets())
        if name in presets:
            return hf_variants.VariantConfig.from_preset(name)
        raise ValueError(
            f"{name} is neither a file, nor a folder, nor a preset. Give the path of a config.json, or one of: "
            f"{', '.join(presets)}."
        )
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(
            f"{path} holds no config.json. Give the folder of a saved model; a checkpoint of another code base has to be "
            "converted first."
        )
    values = read_config_values(file)
    model_type = values.get("model_type")
    kinds = {kind.model_type: kind for kind in (hf_variants.VariantConfig, hf_variants.VariantSeq2SeqConfig)}
    if not isinstance(model_type, str) or model_type not in kinds:
        raise ValueError(
            f"{file} has model_type {model_type!r}, and only {' and '.join(map(repr, kinds))} can be described. "
            "Convert the model first."
        )
    with reading(file):
        config = kinds[model_type].from_dict(values)
    config.name_or_path = str(path)
    return config


def describe(config: "hf_variants.VariantConfig | hf_variants.VariantSeq2SeqConfig") -> str:
    """One line per field that says something, under the axis it belongs to, and the number of parameters."""
    if config.is_encoder_decoder:
        stacks = "\n\n".join(f"{name}\n\n{_axes(getattr(config, name))}" for name in ("encoder", "decoder"))
        return f"{stacks}\n\n{_parameters(config):,} parameters as an encoder-decoder"
    kind = "causal" if config.is_causal else "masked"
    return f"{_axes(config)}\n\n{_parameters(config):,} parameters as a {kind} language model"


def _axes(config: "hf_variants.VariantConfig") -> str:
    """The fields of one stack, as columns."""
    rows = axes(config)
    width = max(len(name) for _, name, _ in rows)
    lines = []
    previous = ""
    for axis, name, shown in rows:
        lines.append(f"{'' if axis == previous else axis:<20}{name:<{width}}  {shown}")
        previous = axis
    return "\n".join(lines)


def axes(config: "hf_variants.VariantConfig") -> list[tuple[str, str, str]]:
    """
    The fields of one stack that say something, as rows of axis, field and value. Those that only say how a stock class
    rounds have no axis and come last.
    """
    values = config.to_dict()
    with nobody_chose():
        # Positions aside, since rotary ones would restrict the sizes.
        defining = {name: values[name] for name in DEFINING}
        plain = type(config)(**defining, position_embedding_type="none").to_dict()
    rows: list[tuple[str, str, str]] = []
    rounding: list[tuple[str, str, str]] = []
    rooms: tuple[type[Axis], ...] = (*AXES, type(config))
    for room in rooms:
        for name, entry in own_fields(room).items():
            differs = values.get(name) != plain.get(name) and name not in NEVER_SHOWN
            if name in ALWAYS_SHOWN or differs:
                axis, group = ("rounding", rounding) if ROUNDING in entry.metadata else (room.title, rows)
                group.append((axis, name, one_line(values[name])))
    for layer, overrides in values.get("per_layer_config", {}).items():
        rows.append(
            ("exceptions", f"layer {layer}", ", ".join(f"{name} {value}" for name, value in overrides.items()))
        )
    return rows + rounding


def one_line(value: Any) -> str:
    """A value on one line; a list with one entry per layer as its repeated pattern."""
    if not isinstance(value, list):
        return str(value)
    period = next(n for n in range(1, len(value) + 1) if value == value[:n] * (len(value) // n))
    unit = ", ".join(
        f"{entry} x {count}" if count > 1 else str(entry)
        for entry, count in ((entry, len(list(run))) for entry, run in itertools.groupby(value[:period]))
    )
    repeats = len(value) // period
    if repeats == 1:
        return unit
    return f"{unit} x {repeats}" if period == 1 else f"({unit}) x {repeats}"


def _parameters(config: Any) -> int:
    return count_parameters(structure(config)).total
