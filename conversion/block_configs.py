"""
`block_configs`: what single layers have of their own in models that NVIDIA's searches found, as `per_layer_config`.

An entry per layer, each with an `attention` and an `ffn` (DeciLM, Nemotron-NAS, Puzzletron). The rest of such a model is a
stock type whose layers are alike, and its tensors have that type's names.
"""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel

from . import rules
from .errors import ConversionError
from .skeleton import empty_model, stored_tensors


if TYPE_CHECKING:
    from .family import Family


KEY = "block_configs"
# Of DeciLM, before there were the others: key/value heads alone, as a list.
HEADS_KEY = "num_key_value_heads_per_layer"
KEYS = (KEY, HEADS_KEY)
# Types of their own code that are a stock type but for this.
STOCK_TYPES = {"nemotron-nas": "llama", "deci": "llama"}

QUERIES, HEADS, WIDTH = "num_attention_heads", "num_key_value_heads", "intermediate_size"
# A part of an entry -> our name of the sublayer, and the keys that are read of it.
PARTS = {
    "attention": ("self_attn", {"no_op", QUERIES, HEADS, "n_heads_in_group"}),
    "ffn": ("mlp", {"no_op", WIDTH, "ffn_mult", "hidden_act"}),
}
SIZES_OF_PARTS = {"attention": ("self_attn", (QUERIES, HEADS)), "ffn": ("mlp", (WIDTH,))}
# What says that something usual is there.
USUAL = {"gated": True}


def describes(values: Mapping[str, Any]) -> bool:
    """Whether a config gives layers something of their own in this way."""
    return any(values.get(key) is not None for key in KEYS)


def even(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    The values of a config.json as a stock type's, with the size that most layers have where it gives none for all.

    Raises:
        ConversionError: naming the layer and the key that no dense layer has.
    """
    made = dict(values)
    layers = _layers(values)
    for size in (QUERIES, HEADS, WIDTH):
        given = Counter(layer[size] for layer in layers if size in layer)
        if made.get(size) is None and given:
            made[size] = given.most_common(1)[0][0]
    made["model_type"] = STOCK_TYPES.get(str(values.get("model_type")), values.get("model_type"))
    return made


def overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """What layers have of their own: number -> fields, as `per_layer_config` has them."""
    values = config.to_dict()
    if not describes(values):
        return {}
    own = {
        number: {name: value for name, value in layer.items() if values.get(name) != value}
        for number, layer in enumerate(_layers(values))
    }
    return {number: fields for number, fields in own.items() if fields}


def entries_of(layers: Sequence[Any]) -> list[dict[str, Any]]:
    """The way back: the entries of layers with our names of fields, every size written out."""
    return [
        {
            part: {"no_op": True}
            if sublayer in getattr(layer, "skip", ())
            else {size: getattr(layer, size) for size in sizes}
            for part, (sublayer, sizes) in SIZES_OF_PARTS.items()
        }
        for layer in layers
    ]


def without(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the same model with layers that are alike."""
    made = type(config).from_dict({name: value for name, value in config.to_dict().items() if name not in KEYS})
    made.name_or_path = config.name_or_path
    return made


def native_skeleton(family: "Family", head: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The native model without memory for its weights, and with the tensors that its layers have."""
    own = overrides(config)
    if not own:
        return empty_model(family.native_class(head), config)
    alike = without(config)
    native = empty_model(family.native_class(head), alike)
    variant = empty_model(family.variant_class(head), family.config_map.to_variant(alike, (), head))
    steps = rules.plan(family.rules_for(head), stored_tensors(native), stored_tensors(variant))
    sized: dict[tuple, PreTrainedModel] = {}
    for number, fields in own.items():
        sizes = tuple((size, fields[size]) for size in (QUERIES, HEADS, WIDTH) if size in fields)
        if sizes not in sized:
            other_config = copy.deepcopy(alike)
            for size, value in sizes:
                # On construction, classes want heads that fill the width together.
                setattr(other_config, size, value)
            sized[sizes] = empty_model(family.native_class(head), other_config)
        other = sized[sizes]
        for step in steps:
            if step.layer != number:
                continue
            inside = [target.partition(f"layers.{number}.")[2] for target in step.targets]
            gone = (
                all(name.startswith(tuple(fields.get("skip", ()))) for name in inside) if "skip" in fields else False
            )
            for name in step.sources:
                owner, _, leaf = name.rpartition(".")
                module = native.get_submodule(owner)
                setattr(module, leaf, None if gone else other.get_parameter(name))
    return native


def _layers(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every layer the fields that its entry decides, whether or not all layers have them so."""
    depth, entries, heads = values.get("num_hidden_layers"), values.get(KEY), values.get(HEADS_KEY)
    for key, found in ((KEY, entries), (HEADS_KEY, heads)):
        if found is not None and (not isinstance(found, list) or len(found) != depth):
            raise ConversionError(
                f"`{key}` is no list of {depth} entries, one for each layer (`num_hidden_layers`). Correct it."
            )
    layers: list[dict[str, Any]] = [{} for _ in range(int(depth or 0))]
    for number, count in enumerate(heads or ()):
        layers[number][HEADS] = _whole(count, f"{HEADS_KEY}[{number}]")
    for number, entry in enumerate(entries or ()):
        where = f"{KEY}[{number}]"
        if not isinstance(entry, dict):
            raise ConversionError(f"`{where}` is {entry!r}, no map of `attention` and `ffn`. Correct it.")
        _refuse_others(entry, set(PARTS), where)
        for part, (sublayer, read) in PARTS.items():
            found = entry.get(part) or {}
            if not isinstance(found, dict):
                raise ConversionError(f"`{where}.{part}` is {found!r}, no map. Correct it.")
            _refuse_others(found, read, f"{where}.{part}")
            if found.get("no_op"):
                layers[number].setdefault("skip", []).append(sublayer)
            elif part == "attention":
                layers[number] |= _heads(found, values, f"{where}.{part}")
            else:
                layers[number] |= _width(found, values, f"{where}.{part}")
        if len(layers[number].get("skip", ())) == len(PARTS):
            raise ConversionError(
                f"`{where}` leaves out attention and feed-forward network (`no_op`), so that layer {number} does nothing. "
                "Remove the layer from config and weights, and number those behind it anew."
            )
    return layers


def _refuse_others(found: Mapping[str, Any], read: set[str], where: str) -> None:
    others = {
        key: value for key, value in found.items() if key not in read and value not in (None, False, USUAL.get(key))
    }
    for key, value in others.items():
        raise ConversionError(
            f"`{where}.{key}` is {value!r}, which is neither attention nor a feed-forward network that a layer can have "
            "here. Use the code that belongs to the checkpoint."
        )


def _heads(found: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, int]:
    own = {size: _whole(found[size], f"{where}.{size}") for size in (QUERIES, HEADS) if found.get(size) is not None}
    if HEADS in own or (group := found.get("n_heads_in_group")) is None:
        return own
    queries, group = own.get(QUERIES, values.get(QUERIES)), _whole(group, f"{where}.n_heads_in_group")
    if not isinstance(queries, int) or queries % group:
        raise ConversionError(
            f"`{where}.n_heads_in_group` is {group}, which does not divide the {queries} heads (`num_attention_heads`). "
            "Correct it."
        )
    return own | {HEADS: queries // group}


def _width(found: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    own = {} if found.get("hidden_act") is None else {"hidden_act": found["hidden_act"]}
    if (width := found.get(WIDTH)) is not None:
        return own | {WIDTH: _whole(width, f"{where}.{WIDTH}")}
    if (factor := found.get("ffn_mult")) is None:
        return own
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 < factor < math.inf:
        raise ConversionError(f"`{where}.ffn_mult` is {factor!r}, no positive number. Correct it.")
    # As DeciLM's code rounds it.
    return own | {WIDTH: -(-int(2 * factor * values["hidden_size"] / 3) // 256) * 256}


def _whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConversionError(f"`{where}` is {value!r}, no positive whole number. Correct it.")
    return value
