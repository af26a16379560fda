"""Which of llama.cpp's architectures a config is: the one whose file our reader understands as the same config."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ....model.axis import ROUNDING, TRAINING
from ....model.configuration_variant import FIELDS, VariantConfig
from ....model.configuration_variant_seq2seq import VariantSeq2SeqConfig
from ....model.heads import HeadAxis
from ... import block_configs
from ...config_map import differing_fields
from ...errors import ConversionError, NotRepresentable, Refusal
from ...family import Family, family_of
from ...gguf_files.architectures import ARCHITECTURES, ROBERTA_PADDING, Architecture, keys_of
from ...gguf_files.checkpoint import ACTIVATION_PARAMETERS, GGUFCheckpoint, native_model, rows_of, understand
from ...gguf_files.container import gguf_package
from ...gguf_files.layouts import AS_IT_IS, Heads, Layout
from ...gguf_source import variant_of_gguf
from ...layout import Stored
from ...native_target import WIDELY_KNOWN
from ...skeleton import stored_tensors
from ..tokens import first_id
from .keys import divisors, keys_for, tables_of
from .outline import Outline
from .runtime import unread


Config = VariantConfig | VariantSeq2SeqConfig
# A file has token ids with its tokenizer, and without any it has none; they enter no arithmetic.
OF_THE_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")
# Of an encoder they stay behind; the projection is its stack's.
OF_THE_HEAD = {"tie_word_embeddings", *HeadAxis.__dataclass_fields__} - {"output_projection"}
# The tokenizer that tells these types apart, which are one architecture.
TOKENIZERS = {"roberta": "gpt2", "xlm-roberta": "t5"}
# Rows of the table of positions that no token reads, which a file leaves out.
PADDED_ROWS = dict.fromkeys(TOKENIZERS, ROBERTA_PADDING + 1)


@dataclass
class Part:
    """
    A tensor of the file.

    Attributes:
        native: names of the native tensors that it is made of.
        layout, heads: how it lies in the file.
        rows: of the native tensor that it is, or `None` for all.
        stacked: whether the native tensors are its rows.
    """

    native: list[str]
    layout: Layout
    heads: Heads
    rows: slice | None = None
    stacked: bool = False

    def make(self, load: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The tensor as it lies in the file, from the native ones."""
        if self.stacked:
            return torch.stack([load(name) for name in self.native])
        tensor = load(self.native[0])
        return self.layout.to_gguf(tensor if self.rows is None else tensor[self.rows], self.heads)


@dataclass
class Target:
    """
    The architecture of a variant.

    Attributes:
        architecture: as llama.cpp calls it.
        family, native, model: the native type, its config, and its model without memory for its weights.
        config: ours, as it is compared: of an encoder without what stays behind.
        keys: of the architecture, by full names.
        settings: tensors of settings.
        parts: name in the file -> what the tensor is made of.
        opened: the file, as our reader understands what is going to be written.
        notes: what the file says otherwise.
    """

    architecture: str
    family: Family
    native: PreTrainedConfig
    model: PreTrainedModel
    config: Config
    keys: dict[str, Any]
    settings: dict[str, torch.Tensor]
    parts: dict[str, Part]
    opened: GGUFCheckpoint
    notes: list[str]


def head_of(config: Config) -> str:
    """What a file holds: a language model, or an encoder without its head."""
    if not isinstance(config, VariantConfig):
        return "seq2seq_lm"
    return "causal_lm" if config.is_causal else "base"


def without_head(config: Config) -> Config:
    """An encoder as a file holds it, without its pooler."""
    if not isinstance(config, VariantConfig) or config.is_causal or not config.pooler:
        return config
    return type(config).from_dict({**config.to_dict(), "pooler": False})


def target_of(config: Config) -> Target:
    """
    The first architecture that expresses a config: the one that it came from, then those that most know.

    Raises:
        NotRepresentable: naming the fields in the way of the nearest one.
    """
    config = without_head(config)
    origin = (config.native_leftovers or {}).get("model_type")
    order = (origin, *WIDELY_KNOWN)
    ranks = {model_type: rank for rank, model_type in reversed(list(enumerate(order)))}
    pairs = [(name, model_type) for name, entry in ARCHITECTURES.items() for model_type in entry.native_types]
    nearest: NotRepresentable | None = None
    own_layers = isinstance(config, VariantConfig) and config.is_heterogeneous

    def place(pair: tuple[str, str]) -> tuple[bool, int]:
        # What refuses layers that differ says less of them than what takes some.
        return ARCHITECTURES[pair[0]].layers_differ is not own_layers, ranks.get(pair[1], len(order))

    for name, model_type in sorted(pairs, key=place):
        try:
            return _as_architecture(config, name, model_type)
        except NotRepresentable as error:
            strange = {"model_type", "config"} & error.fields.keys()
            if not strange and (nearest is None or len(error.fields) < len(nearest.fields)):
                nearest = error
    if nearest is None:
        why = Refusal("no architecture of its that is known here comes near")
        raise NotRepresentable("llama.cpp", {"config": ("this variant", why)}, ADVICE)
    raise NotRepresentable(nearest.model_type, nearest.fields, f"It comes nearest. {ADVICE}")


ADVICE = "Change those fields, or run the variant with transformers."


def _as_architecture(config: Config, name: str, model_type: str) -> Target:
    """
    Raises:
        NotRepresentable: naming every field that a file of this architecture cannot say, or that llama.cpp does not read
            there.
    """
    family, entry, head = family_of(model_type), ARCHITECTURES[name], head_of(config)
    if (entry.head or family.primary) != head or family.native_class(head) is None:
        raise NotRepresentable(name, {"config": (config.model_type, Refusal("it holds another kind of model"))})
    own = _own_sizes(config, name) if entry.layers_differ else {}
    if entry.layers_differ and not own:
        raise NotRepresentable(name, {"config": (config.model_type, Refusal("it is for layers that differ"))})
    native, config = _native(family, _with_layers(config, {}) if own else config, name, head)
    if own:
        config = _with_layers(config, own)
        native.block_configs = block_configs.entries_of(config.per_layer_config)
    if lost := unread(config, name):
        raise NotRepresentable(name, lost)
    model = native_model(family, head, native)
    if not config.tie_word_embeddings:
        model.all_tied_weights_keys.pop(family.loosely_tied, None)
    stack = config if isinstance(config, VariantConfig) else config.encoder
    each = [Heads(layer.num_attention_heads, layer.num_key_value_heads) for layer in stack.per_layer_config]
    heads = Heads(each[0].queries, each[0].keys, dict(enumerate(each)))
    padded_rows = PADDED_ROWS.get(model_type, 0)
    stored = as_stored(model).headers if entry.stored_names else stored_tensors(model)
    parts = _parts(stored, name, entry, heads, layers_of(native), padded_rows)
    shapes = {theirs: tuple(part.make(stored.__getitem__).shape) for theirs, part in parts.items()}
    tensors = divisors(config)
    stated = {f"{name}.{key}": value for key, value in keys_of(entry.options, native).items()}
    offered = {**keys_for(config, name), **stated, **_activations(model), **_tokenizer(config, model_type)}
    pattern = gguf_package().Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=name)
    try:
        # Older releases of the runtime take the pattern for a number, and the usual one needs no key.
        keys, opened, notes = _read_back(config, {**offered, pattern: None}, shapes, tensors, name, head)
    except NotRepresentable:
        if offered.get(pattern) is None:
            raise
        keys, opened, notes = _read_back(config, offered, shapes, tensors, name, head)
    return Target(name, family, native, model, config, keys, tensors, parts, opened, notes)


def _own_sizes(config: Config, name: str) -> dict[int, dict[str, Any]]:
    """
    Of layers that differ, what they have of their own.

    Raises:
        NotRepresentable: if that is more than their sizes.
    """
    overrides = {int(layer): own for layer, own in (config.to_dict().get("per_layer_config") or {}).items()}
    sizes = {"skip", block_configs.QUERIES, block_configs.HEADS, block_configs.WIDTH}
    if others := sorted({field for own in overrides.values() for field in own} - sizes):
        why = Refusal(f"its layers differ in their sizes alone, and not in {', '.join(others)}")
        raise NotRepresentable(name, {"per_layer_config": (overrides, why)})
    return overrides


def _with_layers(config: Config, own: Mapping[int, dict[str, Any]]) -> Config:
    """A config whose layers have this of their own."""
    values = {name: value for name, value in config.to_dict().items() if name != "per_layer_config"}
    return type(config).from_dict({**values, **({"per_layer_config": dict(own)} if own else {})})


def _native(family: Family, config: Config, name: str, head: str) -> tuple[PreTrainedConfig, Config]:
    """
    The native config, and ours with the native type's order of rounding and training settings, of which a file knows
    nothing.
    """
    try:
        return family.config_map.to_native(config, head), config
    except NotRepresentable as error:
        fields = _without_tokens(error.fields)
        beside = {field: theirs for field, (_, theirs) in fields.items() if _of_no_file(field)}
        if lost := {field: ways for field, ways in fields.items() if field not in beside}:
            raise NotRepresentable(name, lost) from error
        settled = {field: theirs for field, theirs in beside.items() if not isinstance(theirs, Refusal)}
        settled |= {field: FIELDS[field].default for field in beside.keys() - settled.keys() if field in FIELDS}
        try:
            config = type(config).from_dict({**config.to_dict(), **settled})
            return family.config_map.to_native(config, head), config
        except (NotRepresentable, ValueError, StrictDataclassError):
            raise NotRepresentable(name, fields) from error


def _of_no_file(field: str) -> bool:
    """Whether a field, of one stack, changes the rounding or the training alone."""
    return field in FIELDS and not {ROUNDING, TRAINING}.isdisjoint(FIELDS[field].metadata)


def _read_back(
    config: Config,
    offered: Mapping[str, Any],
    shapes: dict[str, tuple[int, ...]],
    tensors: dict[str, torch.Tensor],
    name: str,
    head: str,
) -> tuple[dict[str, Any], GGUFCheckpoint, list[str]]:
    """
    The keys that our reader takes of those that are offered, the file as it understands it, and notes.

    Raises:
        NotRepresentable: naming the fields that come out of such a file otherwise.
    """
    offered = {key: value for key, value in offered.items() if value is not None}
    for key, value in offered.items():
        if type(value) is int and not 0 <= value < 2**32:
            field = next((field for field, own in config.to_dict().items() if own == value), key)
            raise NotRepresentable(
                name, {field: (value, Refusal("its files hold whole numbers of 32 bits, from 0 on"))}
            )
    opened = _read(offered, shapes, tensors, name)
    read = opened.metadata.consumed
    keys = {key: value for key, value in offered.items() if key in read or not key.startswith(f"{name}.")}
    if set(tensors) - opened.metadata.consumed_tensors:
        raise NotRepresentable(name, {"rope_parameters": (config.rope_parameters, Refusal("it has no such tensors"))})
    try:
        other = variant_of_gguf(opened)
    except ConversionError as error:
        raise NotRepresentable(name, {"config": ("this variant", Refusal(_unread(error)))}) from error
    if opened.family.loosely_tied and opened.metadata.has("output.weight"):
        # As transformers, which goes by the weights there.
        other.tie_word_embeddings = False
    return keys, opened, compare_configs(config, other, name, head)


def _unread(error: ConversionError) -> str:
    return f"a file that says so is not read: {error}"


def _without_tokens(fields: Mapping[str, tuple]) -> dict[str, tuple]:
    return {name: ways for name, ways in fields.items() if name not in OF_THE_TOKENIZER} or dict(fields)


def layers_of(native: PreTrainedConfig) -> int:
    return max(native.num_hidden_layers, getattr(native, "num_decoder_layers", None) or 0)


def as_stored(model: PreTrainedModel) -> Stored:
    """The tensors of a native model as its checkpoints have them, without what llama.cpp's encoders lack."""
    return Stored(model, {name: header for name, header in stored_tensors(model).items() if "pooler" not in name})


def _parts(
    stored: Mapping[str, torch.Tensor],
    architecture: str,
    entry: Architecture,
    heads: Heads,
    layers: int,
    padded_rows: int,
) -> dict[str, Part]:
    """
    By the names in the file, what each of its tensors is made of.

    Args:
        stored: the native tensors without values, under the names that the architecture knows them by.
    """
    package = gguf_package()
    number = next(number for number, name in package.MODEL_ARCH_NAMES.items() if name == architecture)
    known = package.get_tensor_name_map(number, layers)
    parts: dict[str, Part] = {}
    for name in stored:
        stem, _, leaf = name.rpartition(".")
        if stem.endswith(".act_fn") and leaf in ACTIVATION_PARAMETERS:
            continue
        if stem.endswith("W_pack"):
            rows = stored[name].shape[0]
            for part in "qkv":
                theirs = f"blk.{stem.split('.')[2]}.attn_{part}.{leaf}"
                own = heads.of(theirs)
                parts[theirs] = Part([name], entry.layout(theirs) or AS_IT_IS, own, rows_of(rows, own, part))
            continue
        if ".norms." in stem:
            *_, layer, _, norm, _, _ = stem.split(".")
            theirs = f"blk.{layer}.attn_{norm[0]}_norm.{leaf}"
            parts.setdefault(theirs, Part([], AS_IT_IS, heads, stacked=True)).native.append(name)
            continue
        found = known.get_name(stem) or known.get_name(stem.removeprefix("transformer."))
        if found is None:
            raise NotRepresentable(architecture, {"config": (name, Refusal("its files have no name for this tensor"))})
        theirs = f"{found}.{leaf}"
        rows = slice(padded_rows, None) if name.endswith("position_embeddings.weight") and padded_rows else None
        parts[theirs] = Part([name], entry.layout(theirs) or AS_IT_IS, heads.of(theirs), rows)
    return parts


def _activations(model: PreTrainedModel) -> dict[str, list[float]]:
    """Keys of learned activations, whose values are filled in once there are weights."""
    found: dict[str, list[float]] = {}
    for name in stored_tensors(model):
        stem, _, leaf = name.rpartition(".")
        if stem.endswith(".act_fn") and leaf in ACTIVATION_PARAMETERS:
            found.setdefault(f"xielu.{leaf}", []).append(0.0)
    return found


def _tokenizer(config: Config, model_type: str) -> dict[str, Any]:
    """What the type is told by, and the ids that enter the config."""
    ids = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    found = {f"tokenizer.ggml.{theirs}_token_id": first_id(getattr(config, ours)) for theirs, ours in ids.items()}
    found = {key: value for key, value in found.items() if value is not None}
    return found | ({"tokenizer.ggml.model": TOKENIZERS[model_type]} if model_type in TOKENIZERS else {})


def _read(
    offered: Mapping[str, Any], shapes: dict[str, tuple[int, ...]], settings: dict[str, torch.Tensor], name: str
) -> GGUFCheckpoint:
    """The file with all of these keys, as our reader understands it."""
    outline = Outline({"general.architecture": name, **offered}, shapes, settings)
    try:
        return understand(outline, [key for key in offered if key.startswith(f"{name}.")])
    except ConversionError as error:
        raise NotRepresentable(name, {"config": ("this variant", Refusal(_unread(error)))}) from error


def compare_configs(config: Config, other: Config, name: str, head: str) -> list[str]:
    """
    Notes on values that the file says in fewer digits.

    Raises:
        NotRepresentable: naming the fields that come out of the file otherwise.
    """
    different = differing_fields(config, other, head)
    lost, rounded = {}, []
    for field, (ours, theirs) in different.items():
        own = field.rpartition(".")[2]
        if own == "decoder_start_token_id" and ours is None:
            continue
        if own in OF_THE_TOKENIZER or (head == "base" and own in OF_THE_HEAD):
            continue
        if own in FIELDS and ROUNDING in FIELDS[own].metadata:
            continue
        if own == "rope_parameters" and _rotates_alike(config, other):
            continue
        if _nearly(ours, theirs):
            rounded.append(field)
        else:
            lost[field] = (ours, Refusal(f"a file has no key that says so, and is read as {theirs!r:.80}"))
    if lost:
        raise NotRepresentable(name, lost)
    return [f"Rounded to float32, as files have numbers: {', '.join(rounded)}"] if rounded else []


def _nearly(a: Any, b: Any) -> bool:
    """Whether two values are the same in float32."""
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(a, bool)
    return numbers and math.isclose(a, b, rel_tol=2.0**-23)


def _rotates_alike(config: Config, other: Config) -> bool:
    """Whether all layers rotate by the same frequencies, whatever the parameters that give them are called."""
    if not isinstance(config, VariantConfig) or config.num_hidden_layers != other.num_hidden_layers:
        return False
    for layer in range(config.num_hidden_layers):
        ours, theirs = (tables_of(each, layer) for each in (config, other))
        if (ours is None) != (theirs is None):
            return False
        if ours is not None and not all(
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=0) and math.isclose(x, y, rel_tol=1e-6)
            for (a, x), (b, y) in zip(ours, theirs)
        ):
            return False
    return True
