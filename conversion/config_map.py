"""Translation of configs, written once per family and read in both directions.

A family lists entries; each consumes some native keys and sets some `VariantConfig` fields. The way back inverts the
entries one by one and then runs the forward direction on the result: what does not come out again is what the native
type cannot express, field by field. A native key that the stock class reads and no entry consumes is an error.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_variants.model.axis import TRAINING, nobody_chose
from hf_variants.model.configuration_variant import FIELDS, VariantConfig
from hf_variants.model.configuration_variant_seq2seq import VariantSeq2SeqConfig

from . import block_configs, config_keys
from .errors import ConversionError, NotRepresentable, Refusal


Fields = dict[str, Any]

AnyVariantConfig = VariantConfig | VariantSeq2SeqConfig

# Stands among the native values for the head of the checkpoint, which is no key of a config.
HEAD_KEY = "<head>"

STACKS = ("encoder", "decoder")


class Entry:
    """
    One translation.

    Attributes:
        keys: the native keys it consumes.
        kept: those of them that the fields do not fully determine; values that the way back would not give are kept
            in `native_leftovers` for it.
    """

    keys: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def forward(self, native: Mapping[str, Any]) -> Fields:
        """Native values -> `VariantConfig` fields."""
        raise NotImplementedError

    def backward(self, fields: Mapping[str, Any]) -> Fields:
        """`VariantConfig` fields -> native values."""
        raise NotImplementedError


class Same(Entry):
    """Keys with the same name and meaning on both sides."""

    def __init__(self, *names: str):
        self.keys = names

    def forward(self, native):
        return {name: native[name] for name in self.keys}

    def backward(self, fields):
        return {name: fields[name] for name in self.keys}


class Renamed(Entry):
    """A native key that has another name here."""

    def __init__(self, native: str, ours: str):
        self.keys = (native,)
        self.ours = ours

    def forward(self, native):
        return {self.ours: native[self.keys[0]]}

    def backward(self, fields):
        return {self.keys[0]: fields[self.ours]}


class Mapped(Entry):
    """A native key whose values translate one to one through a table."""

    def __init__(self, native: str, ours: str, table: Mapping[Any, Any]):
        self.keys = (native,)
        self.ours = ours
        self.table = table
        if len(set(table.values())) != len(table):
            raise ValueError(f"The table for `{native}` is not one to one. Use `Computed` instead.")

    def forward(self, native):
        key = self.keys[0]
        if native[key] not in self.table:
            raise ConversionError(
                f"`{key}` is {native[key]!r}, which is not one of {sorted(map(repr, self.table))}. "
                "This option of the native model is not supported."
            )
        return {self.ours: self.table[native[key]]}

    def backward(self, fields):
        # A value outside the table is found by the forward check; any native value will do here.
        inverse = {ours: native for native, ours in self.table.items()}
        return {self.keys[0]: inverse.get(fields[self.ours], next(iter(self.table)))}


class Fixed(Entry):
    """What is true of every model of the native type and no key of its config: fields with one value."""

    def __init__(self, **fields: Any):
        self.fields = fields

    def forward(self, native):
        return dict(self.fields)

    def backward(self, fields):
        return {}


class Offered(Fixed):
    """What calls of the native class can ask for beyond its config: a variant with a field's default does without."""


class Computed(Entry):
    """
    Fields computed from native keys, with the inverse beside it; the forward check catches an inexact inverse.

    Args:
        keys: native keys that are consumed.
        forward: native config values -> fields; it may read any native key.
        backward: all fields -> values of `keys`.
        kept: see `Entry`.
    """

    def __init__(
        self,
        keys: Iterable[str],
        forward: Callable[[Mapping[str, Any]], Fields],
        backward: Callable[[Mapping[str, Any]], Fields],
        kept: Iterable[str] = (),
    ):
        self.keys = tuple(keys)
        self.kept = tuple(kept)
        self._forward = forward
        self._backward = backward

    def forward(self, native):
        return self._forward(native)

    def backward(self, fields):
        return self._backward(fields)


class Irrelevant(Entry):
    """A native key that does not change what the model computes; its value is kept for the way back."""

    def __init__(self, key: str, reason: str):
        self.keys = self.kept = (key,)
        self.reason = reason

    def forward(self, native):
        return {}

    def backward(self, fields):
        return {}


class Required(Entry):
    """A native key of which only some values are supported."""

    def __init__(self, key: str, *values: Any, reason: str):
        self.keys = self.kept = (key,)
        self.values = values
        self.reason = reason

    def forward(self, native):
        if native[self.keys[0]] not in self.values:
            allowed = " or ".join(repr(value) for value in self.values)
            raise ConversionError(
                f"`{self.keys[0]}` is {native[self.keys[0]]!r}, and only {allowed} is supported: {self.reason}."
            )
        return {}

    def backward(self, fields):
        return {self.keys[0]: self.values[0]}


# Parameters beside transformers' standard ones, each read by few native classes.
OPTIONAL_ROPE_KEYS = ("llama_4_scaling_beta", "alpha")


class RopeParameters(Entry):
    """
    `rope_parameters`, the same standard dictionary on both sides, flat or per layer type.

    Args:
        partial: whether the native class rotates a part of every head where `partial_rotary_factor` says so.
        per_layer_type: whether it reads parameters per layer type.
        reads: the parameters that it reads beside transformers' standard ones.
    """

    keys = kept = ("rope_parameters",)

    def __init__(self, partial: bool = True, per_layer_type: bool = True, reads: tuple[str, ...] = ()):
        self.partial = partial
        self.per_layer_type = per_layer_type
        self.reads = reads

    def forward(self, native):
        parameters = native["rope_parameters"]
        nested = [entry for entry in parameters.values() if isinstance(entry, dict)]
        if nested and not self.per_layer_type:
            raise ConversionError(
                "`rope_parameters` has entries per layer type, but the native class rotates all layers alike. Give one "
                "set of parameters for all."
            )
        for entry in (parameters, *nested):
            ignored = [name for name in OPTIONAL_ROPE_KEYS if entry.get(name) and name not in self.reads]
            if ignored:
                raise ConversionError(
                    f"`rope_parameters` has {' and '.join(f'`{name}`' for name in ignored)}, which the native class does "
                    "not read. Remove the key."
                )
            if self.partial or entry.get("rope_type", "default") in ("default", "proportional"):
                continue
            if entry.get("partial_rotary_factor") not in (None, 1.0):
                raise ConversionError(
                    f"`rope_parameters` has `partial_rotary_factor` {entry['partial_rotary_factor']}, but the native "
                    "class rotates whole heads. Remove the key."
                )
        return {"rope_parameters": parameters if self.partial else _without_idle_factor(parameters)}

    def backward(self, fields):
        parameters = fields["rope_parameters"] or {}
        nested = [parameters[kind] for kind in fields["layer_types"] if parameters.get(kind) is not None]
        if not self.per_layer_type and nested and all(entry == nested[0] for entry in nested):
            parameters = nested[0]
        return {"rope_parameters": parameters}


def _without_idle_factor(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters without a `partial_rotary_factor` that a class which rotates whole heads does not look at."""
    is_default = parameters.get("rope_type", "default") == "default"
    return {
        key: _without_idle_factor(value) if isinstance(value, dict) else value
        for key, value in parameters.items()
        if not (is_default and key == "partial_rotary_factor")
    }


class NestedRopeParameters(RopeParameters):
    """`rope_parameters` of a native type that always has one dictionary per layer type, and ignores what is beside."""

    def __init__(self, *layer_types: str):
        super().__init__(partial=False)
        self.layer_types = layer_types

    def backward(self, fields):
        parameters = fields["rope_parameters"] or {}
        if set(parameters) & set(self.layer_types):
            return {"rope_parameters": parameters}
        return {"rope_parameters": dict.fromkeys(self.layer_types, parameters)}


class PartialRopeParameters(RopeParameters):
    """`rope_parameters` of a native type that rotates a part of every head where `partial_rotary_factor` is absent."""

    # transformers 5.17 keeps a copy of the factor beside the parameters, which no class reads.
    keys = ("rope_parameters", "partial_rotary_factor")
    kept = keys

    def __init__(self):
        super().__init__(per_layer_type=False)

    def backward(self, fields):
        return {"rope_parameters": {"partial_rotary_factor": 1.0, **super().backward(fields)["rope_parameters"]}}


class OnStack(Entry):
    """
    Entries of one stack of an encoder-decoder, for native configs that keep both stacks' keys side by side.

    Args:
        stack: `"encoder"` or `"decoder"`.
        entries: what they set is set on that stack.
    """

    def __init__(self, stack: str, *entries: Entry):
        self.stack = stack
        self.entries = entries
        self.keys = tuple(key for entry in entries for key in entry.keys)
        self.kept = tuple(key for entry in entries for key in entry.kept)

    def forward(self, native):
        fields: Fields = {}
        for entry in self.entries:
            fields |= entry.forward(native)
        return {f"{self.stack}.{name}": value for name, value in fields.items()}

    def backward(self, fields):
        values: Fields = {}
        for entry in self.entries:
            values |= entry.backward(_OfStack(fields, self.stack))
        return values


class _OfStack(Mapping):
    """The fields of one stack, by names without the stack's."""

    def __init__(self, fields: Mapping[str, Any], stack: str):
        self._fields = fields
        self._prefix = f"{stack}."

    def __getitem__(self, name):
        own = self._prefix + name
        return self._fields[own if own in self._fields else name]

    def __iter__(self):
        return (name.removeprefix(self._prefix) for name in self._fields if name.startswith(self._prefix))

    def __len__(self):
        return sum(1 for _ in self)


class OnBothStacks(Entry):
    """Entries that describe both stacks at once; the way back reads the decoder, and a difference is found out."""

    def __init__(self, *entries: Entry):
        self.stacks = (OnStack("encoder", *entries), OnStack("decoder", *entries))
        self.keys = self.stacks[0].keys
        self.kept = self.stacks[0].kept

    def forward(self, native):
        return self.stacks[0].forward(native) | self.stacks[1].forward(native)

    def backward(self, fields):
        return self.stacks[1].backward(fields)


class NestedStack(Entry):
    """
    A stack that the native config keeps as a config of its own under one key (T5Gemma).

    Args:
        key: the native key; `stack`: `"encoder"` or `"decoder"`.
        entries: read the keys of that config.
    """

    def __init__(self, key: str, stack: str, *entries: Entry):
        self.keys = self.kept = (key,)
        self.inner = OnStack(stack, *entries)

    def forward(self, native):
        return self.inner.forward(native[self.keys[0]])

    def backward(self, fields):
        return {self.keys[0]: self.inner.backward(fields)}


class OfDecoder(Entry):
    """
    What an entry of an encoder-decoder says of the decoder alone: fields of the encoder, and those that only the whole
    has, are left out. All its keys are kept, as other classes of the type read them.

    Args:
        entry: of the whole.
    """

    def __init__(self, entry: Entry):
        self.keys = self.kept = entry.keys
        self.entry = entry

    def forward(self, native):
        fields = {name.removeprefix("decoder."): value for name, value in self.entry.forward(native).items()}
        return {name: value for name, value in fields.items() if name in FIELDS}

    def backward(self, fields):
        return self.entry.backward(_OfWhole(fields))


class _OfWhole(Mapping):
    """The fields of a decoder as those of an encoder-decoder, whose own ones have their defaults."""

    def __init__(self, fields: Mapping[str, Any]):
        self._fields = fields

    def __getitem__(self, name):
        field = name.rpartition(".")[2]
        return self._fields[field] if field in self._fields else getattr(VariantSeq2SeqConfig, field)

    def __iter__(self):
        return iter(self._fields)

    def __len__(self):
        return len(self._fields)


class LayerTypes(Entry):
    """
    `layer_types` and `sliding_window`, the same on both sides; the window is kept also where no layer slides.

    Args:
        window: written where the variant has none, for native classes that need one even if no layer slides.
    """

    keys = ("layer_types", "sliding_window")

    def __init__(self, window: int | None = None):
        self.window = window
        self.kept = ("sliding_window",) if window else ()

    def forward(self, native):
        return {"layer_types": list(native["layer_types"]), "sliding_window": native["sliding_window"]}

    def backward(self, fields):
        window = self.window if fields["sliding_window"] is None else fields["sliding_window"]
        return {"layer_types": list(fields["layer_types"]), "sliding_window": window}


# What PreTrainedConfig itself declares means the same in every config.
SHARED_KEYS = (
    "id2label",
    "label2id",
    "problem_type",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
)

# Set by the framework on saving and loading, or by the classes themselves.
FRAMEWORK_KEYS = frozenset(
    {
        "architectures", "auto_map", "dtype", "is_encoder_decoder", "model_type", "num_labels", "torch_dtype",
        "transformers_version", "_name_or_path", "name_or_path", "tokenizer_class", "_attn_implementation",
        "attn_implementation", "experts_implementation", "_commit_hash", "transformers_weights",
    }
)  # fmt: skip

# Those of them that the way back keeps: an encoder alone may stand under its encoder-decoder's flag.
KEPT_FRAMEWORK_KEYS = ("is_encoder_decoder", "tokenizer_class")

# Common to most configs, with one meaning; translated where the native config has them.
COMMON_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache", "initializer_range")

# Before the head on every token most native classes have one of these, which few declare, or 0.1; before others none.
TOKEN_CLASSIFIER_DROPOUT = ("classifier_dropout", "hidden_dropout")


def _token_classifier_dropout(native: Mapping[str, Any]) -> Fields:
    given = (native.get(key) for key in TOKEN_CLASSIFIER_DROPOUT)
    return {"token_classifier_dropout": next((value for value in given if value is not None), 0.1)}


# Of the fields without effect on outputs, those that say nothing of how a model is trained either.
KEPT_FOR_THE_WAY_BACK = frozenset({"use_cache", "native_leftovers", "eager_by_default", "argument_order"})


def _of_head(config: VariantConfig, fields: Fields, head: str) -> Fields:
    """What the model with this head reads of the fields that describe poolers and classifiers."""
    roles = {
        "sequence_classification": "classifier",
        "next_sentence_prediction": "classifier",
        "multiple_choice": "choices",
    }
    role = roles.get(head, "base" if head == "base" else "other")
    on_tokens = head in ("token_classification", "question_answering")
    transform = head == "sequence_classification" or (on_tokens and config.classifier_transform_on_tokens)
    unread = {"pooler_scope", "classifier_transform_on_tokens"}
    if role != "classifier" or config.has_pooler(role):
        unread.add("classifier_pooling")
    if head not in ("sequence_classification", "multiple_choice"):
        unread.add("classifier_bias")
    if not transform:
        unread |= {name for name in fields if name.startswith("classifier_transform")}
    if role != "choices":
        unread |= {name for name in fields if name.startswith("choice_")}
    else:
        if config.has_pooler(role):
            unread.add("choice_pooling")
        if config.choice_transform:
            # What a variant's own classifier of choices shares with that of sequences.
            unread -= {"classifier_transform_bias", "classifier_transform_norm"}
    return {name: value for name, value in fields.items() if name not in unread} | {"pooler": config.has_pooler(role)}


def active_fields(config: VariantConfig, head: str = "") -> Fields:
    """
    The fields that change what this config's model computes, with derived values filled in and aliases unified.

    Args:
        head: of the model, where those of other heads do not count; by default all do.
    """
    values = config.to_dict()
    idle = config.idle_fields()
    # What a layer's own parameters show by now.
    shown = ("no_rope_layers", "layer_rope_theta", "rope_parameters")
    fields = {
        name: values.get(name)
        for name, entry in FIELDS.items()
        if TRAINING not in entry.metadata and name not in idle and name not in shown
    }
    if config.position_embedding_type == "rope":
        fields["rope_parameters"] = [
            _canonical_rope(config.rope_parameters_of(i)) for i in range(len(config.layer_types))
        ]
    if config.is_heterogeneous:
        fields["per_layer_config"] = values["per_layer_config"]
    elif fields["attention_scaling"] is None:
        fields["attention_scaling"] = config.head_dim**-0.5
    return _of_head(config, fields, head) if head else fields


def _canonical_rope(parameters: dict | None) -> dict | None:
    if parameters is None:
        return None
    kept = {key: value for key, value in parameters.items() if value is not None and key != "type"}
    if kept.get("partial_rotary_factor") == 1.0:
        del kept["partial_rotary_factor"]
    return kept


SEQ2SEQ_FIELDS = (
    "share_embeddings", "tie_word_embeddings", "unread_shared_embedding", "final_logits_bias", "label_shift",
    "decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip

# Of a stack inside an encoder-decoder, these are read from the whole.
FIELDS_OF_THE_WHOLE = ("tie_word_embeddings", "bos_token_id", "eos_token_id")


def _active_fields_of_all(config: AnyVariantConfig, head: str) -> Fields:
    """`active_fields`; of an encoder-decoder with the stack's name in front."""
    if isinstance(config, VariantConfig):
        return active_fields(config, head)
    fields = {name: getattr(config, name) for name in SEQ2SEQ_FIELDS}
    for stack in STACKS:
        # An encoder has no head, so what describes one has no effect on it.
        own = active_fields(getattr(config, stack), "none" if stack == "encoder" else head)
        heads = ("lm_head_", "logit_", "final_logit_", "output_projection") if stack == "encoder" else ()
        fields |= {
            f"{stack}.{name}": value
            for name, value in own.items()
            if name not in FIELDS_OF_THE_WHOLE and not name.startswith(heads or ("\0",))
        }
    return fields


def differing_fields(ours: AnyVariantConfig, other: AnyVariantConfig, head: str = "") -> dict[str, tuple]:
    """
    Active fields that differ, with both values. Numbers that are equal up to one rounding count as equal.

    Args:
        head: see `active_fields`.
    """
    left, right = _active_fields_of_all(ours, head), _active_fields_of_all(other, head)
    different = {}
    for name in left.keys() | right.keys():
        a, b = left.get(name), right.get(name)
        close = isinstance(a, float) and isinstance(b, (int, float)) and math.isclose(a, b, rel_tol=1e-15)
        if a != b and not close:
            different[name] = (a, b)
    return dict(sorted(different.items()))


def leaves_out_the_pooler(
    config: AnyVariantConfig, head: str, native_classes: tuple[type[PreTrainedModel], ...]
) -> bool:
    """Whether a bare variant has no pooler, and its stock class, the first of these, is asked to have none either."""
    if head != "base" or not isinstance(config, VariantConfig) or config.has_pooler("base"):
        return False
    return bool(native_classes) and "add_pooling_layer" in inspect.signature(native_classes[0].__init__).parameters


@cache
def _casts_in_its_loss(model_class: type[PreTrainedModel]) -> bool:
    """Whether a class takes labels and leaves the loss to transformers' own, or has none."""
    forward = inspect.unwrap(model_class.forward)
    return "labels" not in inspect.signature(forward).parameters or "self.loss_function(" in inspect.getsource(forward)


def quantisation_of(values: Mapping[str, Any]) -> str:
    """How the weights of a config are packed, as the key that says so and the method; empty for weights as they are."""
    # MLX writes both keys, in its first releases the second alone, and no method.
    for key in ("quantization_config", "quantization"):
        packed = values.get(key)
        if isinstance(packed, dict) and (key == "quantization_config" or "bits" in packed):
            return f"`{key}`: {packed.get('quant_method') or ('mlx' if 'group_size' in packed else packed)}"
    return ""


def _own_values(native: PreTrainedConfig) -> Fields:
    """A native config's values, without what the framework writes into every config."""
    return {key: value for key, value in native.to_dict().items() if key not in FRAMEWORK_KEYS}


def _as_rotary_embeddings_read(native: PreTrainedConfig) -> PreTrainedConfig:
    """A native config as it is after the stock model has scaled its RoPE by it, where keys beside the parameters count."""
    parameters = getattr(native, "rope_parameters", None) or {}
    if parameters.get("rope_type", "default") == "default":
        return native
    native = copy.deepcopy(native)
    native.standardize_rope_params()
    return native


def _refuse_other_positions(config: AnyVariantConfig, unread: Fields) -> None:
    """
    Refuse a native config that speaks of positions which its class does not encode.

    The class ignores the key, but the code that the weights were trained with did not: such a checkpoint bears the name
    of a type that it is not (GPT-J as GPT-Neo, Jina's BERT), and no tensor would tell.
    """
    stacks = [config] if isinstance(config, VariantConfig) else [config.encoder, config.decoder]
    own = {stack.position_embedding_type for stack in stacks}
    other = {key: value for key, value in unread.items() if config_keys.positions_of(key, value) not in {None, *own}}
    if other:
        named = " and ".join(f"`{key}` {value!r}" for key, value in sorted(other.items()))
        raise ConversionError(
            f"The config has {named}, but the class of its `model_type` encodes positions otherwise "
            f"({' and '.join(sorted(own))}) and would ignore it. The checkpoint was made for other code: load it with "
            "that, or correct `model_type` in its config.json."
        )


def rotated_layers(fields: Mapping[str, Any]) -> list[bool]:
    """Which layers of a rotary stack are rotated, by `no_rope_layers` and by an empty entry of `rope_parameters`."""
    parameters = fields["rope_parameters"] or {}
    without = {kind for kind in fields["layer_types"] if kind in parameters and parameters[kind] is None}
    return [bool(flag) and kind not in without for flag, kind in zip(fields["no_rope_layers"], fields["layer_types"])]


def _nested(fields: Fields) -> Fields:
    """Fields with a stack's name in front, gathered per stack."""
    nested: Fields = {stack: {} for stack in STACKS}
    for name, value in fields.items():
        stack, dot, field = name.partition(".")
        if dot:
            nested[stack][field] = value
        else:
            nested[name] = value
    return nested


def _fields_of(config: AnyVariantConfig) -> Fields:
    """Every field by name, a stack's with its name in front; `None` where layers differ."""
    if isinstance(config, VariantSeq2SeqConfig):
        fields = {name: getattr(config, name) for name in config.to_dict() if name not in STACKS}
        for stack in STACKS:
            fields |= {f"{stack}.{name}": value for name, value in _fields_of(getattr(config, stack)).items()}
        return fields
    # A saved config is without parameters of a rotation that is not there.
    names = dict.fromkeys([*config.to_dict(), "rope_parameters"])
    fields = {name: getattr(config, name) for name in names if not config.is_heterogeneous_in(name)}
    return fields | {name: None for name in FIELDS if config.is_heterogeneous_in(name)}


class _Recorded(Mapping):
    """Fields that remember which of them were read."""

    def __init__(self, fields: Mapping[str, Any]):
        self._fields = fields
        self.names: dict[str, None] = {}

    def __getitem__(self, name):
        value = self._fields[name]
        self.names[name] = None
        return value

    def __iter__(self):
        return iter(self._fields)

    def __len__(self):
        return len(self._fields)

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


# What a translation raises for values that the other side does not have.
UNBUILDABLE = (ValueError, TypeError, KeyError, ZeroDivisionError, StrictDataclassError)


def _layers_that_differ(config: AnyVariantConfig) -> dict[str, tuple]:
    """`per_layer_config` of every stack that has one, which no native type does."""
    named = [("", config)] if isinstance(config, VariantConfig) else [(f"{s}.", getattr(config, s)) for s in STACKS]
    return {
        f"{prefix}per_layer_config": (stack.to_dict()["per_layer_config"], None)
        for prefix, stack in named
        if stack.is_heterogeneous
    }


def _with_layers_alike(config: AnyVariantConfig) -> AnyVariantConfig:
    """The config of the same model without what single layers have of their own."""
    values = config.to_dict()
    for stack in [values] if isinstance(config, VariantConfig) else [values[name] for name in STACKS]:
        stack.pop("per_layer_config", None)
    return type(config).from_dict(values)


def training_fields(config: AnyVariantConfig) -> Fields:
    """The fields that matter in training alone, of an encoder-decoder with the stack's name in front."""
    names = {name for name, entry in FIELDS.items() if TRAINING in entry.metadata} - KEPT_FOR_THE_WAY_BACK
    return {name: value for name, value in _fields_of(config).items() if name.rpartition(".")[2] in names}


@dataclass(frozen=True)
class ConfigMap:
    """
    The config translation of one native type.

    Args:
        model_type: as in transformers.
        entries: of the family.
        config_class: `VariantConfig`, or `VariantSeq2SeqConfig` for encoder-decoders.
        own_config: the native config class, of a type that transformers does not have.
        told_by_weights: fields that the native config does not decide, because its class looks at the weights.
        readers: the classes that read a native config, by head.
        argument_order: of a config of ours, the field of that name; a type's own code is not known here.
    """

    model_type: str
    entries: tuple[Entry, ...]
    config_class: type[PreTrainedConfig] = VariantConfig
    own_config: type[PreTrainedConfig] | None = None
    told_by_weights: tuple[str, ...] = ()
    readers: Callable[[str], tuple[type[PreTrainedModel], ...]] = lambda head: ()
    argument_order: Callable[[AnyVariantConfig], dict[str, str] | None] = lambda config: None

    @property
    def native_class(self) -> type[PreTrainedConfig]:
        return self.own_config or CONFIG_MAPPING[self.model_type]

    def _all_entries(self, native_keys: Iterable[str]) -> list[Entry]:
        taken = {key for entry in self.entries for key in entry.keys}
        shared = [key for key in SHARED_KEYS + COMMON_KEYS if key in native_keys and key not in taken]
        undeclared = [key for key in TOKEN_CLASSIFIER_DROPOUT if key in native_keys and key not in taken]
        heads = Computed(undeclared, _token_classifier_dropout, lambda fields: {}, kept=undeclared)
        # First, so that a family's own entries win.
        first = [Same(*shared)] if self.config_class is VariantSeq2SeqConfig else [Same(*shared), heads]
        return [*first, *self.entries]

    def _parts(self, native: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig, Fields, set[str]]]:
        """A native config and those nested in it: name with a dot, config, values, and the keys that are translated."""
        values = _own_values(native)
        yield "", native, values, {key for entry in self._all_entries(values) for key in entry.keys}
        for entry in self.entries:
            if isinstance(entry, NestedStack):
                name = entry.keys[0]
                common = {*SHARED_KEYS, *COMMON_KEYS}
                yield (
                    f"{name}.",
                    getattr(native, name),
                    _own_values(getattr(native, name)),
                    {*entry.inner.keys, *common},
                )

    def runs_eager(self, head: str) -> bool:
        """Whether the stock class has eager attention alone; what a type's own code runs is not known here."""
        classes = self.readers(head)
        return self.own_config is None and bool(classes) and not classes[0]._supports_sdpa

    def _losses(self, head: str) -> Fields:
        """In which dtype the stock classes compute losses: in float32 where they call transformers' own."""
        model = head if head in ("causal_lm", "masked_lm") else ""
        fields = {"loss_in_float32": model, "token_classifier_loss_in_float32": "token_classification"}
        classes = {field: self.readers(head)[:1] for field, head in fields.items()}
        return {
            field: self.own_config is not None or all(map(_casts_in_its_loss, found))
            for field, found in classes.items()
        }

    def unread(self, native: PreTrainedConfig, head: str = "") -> Fields:
        """
        The values in a native config that change nothing: no entry translates them, and its class does not read them,
        or it acts on other values only. Those of a nested config have its name in front.
        """
        found: Fields = {}
        for name, config, values, translated in self._parts(native):
            verdicts = self._verdicts(config, values, translated, head)
            found |= {f"{name}{key}": values[key] for key, verdict in verdicts.items() if verdict == config_keys.IDLE}
        return found

    def _verdicts(self, config: PreTrainedConfig, values: Fields, translated: set[str], head: str) -> dict[str, str]:
        rest = {key: value for key, value in values.items() if key not in translated}
        # The source of the models is read for a config that needs it only.
        return config_keys.verdicts(config, rest, self.readers(head), self.own_config is not None) if rest else {}

    def _check_keys(self, native: PreTrainedConfig, ignore_keys: Iterable[str], head: str) -> None:
        """Refuse keys that are read and not understood, and values that switch something on that is not there."""
        unknown, switched, ignored = [], [], set(ignore_keys)
        for name, config, values, translated in self._parts(native):
            for key, verdict in self._verdicts(config, values, translated, head).items():
                if verdict == config_keys.SWITCHED:
                    switched.append(f"`{name}{key}` {values[key]!r}")
                elif verdict == config_keys.UNKNOWN and key not in ignored:
                    unknown.append(f"{name}{key}")
        if switched:
            raise ConversionError(
                f"The {self.model_type} config has {' and '.join(sorted(switched))}, which changes what the model computes "
                "and is not supported here. Use the stock class of transformers for this checkpoint."
            )
        if unknown:
            raise ConversionError(
                f"The {self.model_type} config has the keys {sorted(unknown)}, which its class reads and whose meaning is "
                "not known here. If they do not change what the model computes, name them in `ignore_keys` "
                "(`--ignore-key` on the command line)."
            )

    def _fields(self, values: Mapping[str, Any]) -> Fields:
        """What every entry makes of native values; a stack's fields with its name in front."""
        fields: Fields = {}
        for entry in self._all_entries(values):
            fields.update(entry.forward(values))
        return fields

    def to_variant(
        self, native: PreTrainedConfig, ignore_keys: Iterable[str] = (), head: str = ""
    ) -> AnyVariantConfig:
        """
        The config of the same model here.

        Args:
            native: a config of this type.
            ignore_keys: keys of it that the caller knows to be meaningless, though its class reads them.
            head: of the checkpoint, where fields depend on it.

        Raises:
            ConversionError: for a key that is read and not understood, or an option that is not supported.
        """
        if packed := quantisation_of(native.to_dict()):
            raise ConversionError(
                f"The checkpoint is quantised ({packed}). Take the model as it was before, or, where its quantiser can, "
                "`model.dequantize()` it and save it."
            )
        if own := block_configs.overrides(native):
            config = self.to_variant(block_configs.without(native), ignore_keys, head)
            with nobody_chose():
                return type(config).from_dict({**config.to_dict(), "per_layer_config": own})
        self._check_keys(native, ignore_keys, head)
        published = _own_values(native)
        values = _own_values(_as_rotary_embeddings_read(native))
        entries = self._all_entries(values)
        values[HEAD_KEY] = head
        fields = self._fields(values)
        by_class = {"eager_by_default": self.runs_eager(head), **self._losses(head)}
        if self.config_class is VariantSeq2SeqConfig:
            fields = _nested(fields)
            for stack in STACKS:
                fields[stack] |= by_class
        else:
            fields |= by_class
        with nobody_chose():
            config = self.config_class(**fields, dtype=native.dtype)
        config.argument_order = self.argument_order(config)
        unread = self.unread(native, head)
        _refuse_other_positions(config, unread)
        restored = self.native_class().to_dict()
        own = _fields_of(config)
        for entry in entries:
            restored.update(entry.backward(own))
        undetermined = [key for entry in entries for key in entry.kept]
        # The way back knows those only that the class declares.
        undeclared = set(entries[0].keys) - self.native_class().to_dict().keys()
        kept = {key: published[key] for key in [*undetermined, *undeclared, *unread, *ignore_keys] if key in published}
        kept |= {key: value for key, value in native.to_dict().items() if key in KEPT_FRAMEWORK_KEYS}
        leftovers = {
            key: value
            for key, value in kept.items()
            if key in undeclared or key not in restored or restored[key] != value
        }
        config.native_leftovers = {"model_type": self.model_type, **leftovers}
        return config

    def to_native(self, config: AnyVariantConfig, head: str = "") -> PreTrainedConfig:
        """
        The native config of the same model.

        Args:
            config: ours.
            head: of the checkpoint, where fields depend on it.

        Raises:
            NotRepresentable: naming every field that the native type cannot express.
        """
        if not isinstance(config, self.config_class):
            kinds = (config.model_type, self.config_class.model_type)
            raise NotRepresentable(self.model_type, {"model_type": kinds})
        if overrides := _layers_that_differ(config):
            raise NotRepresentable(self.model_type, overrides | self._in_the_way(_with_layers_alike(config), head))
        leftovers = dict(config.native_leftovers or {})
        if leftovers.pop("model_type", None) != self.model_type:
            leftovers = {}
        try:
            values = self._native_values(_fields_of(config))
            native, differences = self._native_and_differences(config, {**values, **leftovers}, head, leftovers)
            if differences and leftovers:
                # The variant has changed since it was converted, in what a leftover says about it.
                native, differences = self._native_and_differences(config, values, head)
        except UNBUILDABLE as error:
            raise NotRepresentable(self.model_type, self._refused_fields(config, head, error)) from error
        if differences:
            raise NotRepresentable(self.model_type, differences)
        return native

    def _in_the_way(self, config: AnyVariantConfig, head: str) -> dict[str, tuple]:
        """The fields that keep a variant from being one of this type."""
        try:
            self.to_native(config, head)
        except NotRepresentable as error:
            return error.fields
        return {}

    def _native_values(self, fields: Mapping[str, Any]) -> Fields:
        """What every entry gives."""
        values: Fields = {}
        for entry in self._all_entries(self.native_class().to_dict()):
            values.update(entry.backward(fields))
        return values

    def _refused_fields(self, config: AnyVariantConfig, head: str, error: Exception) -> dict[str, tuple]:
        """
        The fields for which no native config can be made, or none that comes back as one of ours: what the entries read
        whose native values are at fault; or, where both can be made and ours cannot be built of them, what differs.
        """
        fields, active = _fields_of(config), _active_fields_of_all(config, head)
        listed = self._all_entries(self.native_class().to_dict())
        entries = [one for entry in listed for one in (map(Same, entry.keys) if type(entry) is Same else [entry])]
        values: Fields = {}
        reads: dict[str, _Recorded] = {}
        refused: dict[str, tuple] = {}

        def refuse(keys: Iterable[str], fault: Exception) -> None:
            names = [name for key in keys if key in reads for name in reads[key].names]
            # Of what is read, some may be derived, or without effect.
            names = [name for name in names if name in active] or names
            refused.update({name: (fields[name], Refusal(fault)) for name in names})

        for entry in entries:
            reads |= dict.fromkeys(entry.keys, _Recorded(fields))
            try:
                values |= entry.backward(next((reads[key] for key in entry.keys), fields))
            except UNBUILDABLE as fault:
                refuse(entry.keys, fault)
        kept = self._buildable(values, config.dtype)
        refuse([key for key in values if key not in kept], error)
        native = self._native(kept, config.dtype).to_dict() | {HEAD_KEY: head}
        made = {name: getattr(VariantConfig, name.rpartition(".")[2], None) for name in active}
        for entry in entries:
            seen = _Recorded(native)
            try:
                made |= entry.forward(seen)
            except UNBUILDABLE as fault:
                refuse(seen.names, fault)
        for name, ours in active.items():
            ours = ours if fields.get(name) is None else fields[name]
            if name not in refused and made[name] is not None and made[name] != ours:
                refused[name] = (ours, made[name])
        return dict(sorted(refused.items())) or {"config": (config.model_type, Refusal(error))}

    def _buildable(self, values: Fields, dtype: torch.dtype | None) -> Fields:
        """Those native values of which a config can be made: all, all but one, or as many as can be together."""

        def builds(chosen: Fields) -> bool:
            try:
                self._native(chosen, dtype)
            except UNBUILDABLE:
                return False
            return True

        all_but_one = ({name: value for name, value in values.items() if name != key} for key in values)
        if whole := next(filter(builds, (values, *all_but_one)), None):
            return whole
        kept: Fields = {}
        for entry in self._all_entries(self.native_class().to_dict()):
            tried = kept | {key: values[key] for key in entry.keys if key in values}
            kept = tried if builds(tried) else kept
        return kept

    def _native(self, values: Fields, dtype: torch.dtype | None) -> PreTrainedConfig:
        # Copies, because config classes complete dictionaries and lists in place.
        return self.native_class(**copy.deepcopy(values), dtype=dtype)

    def _native_and_differences(
        self, config: AnyVariantConfig, values: Fields, head: str, ignore_keys: Iterable[str] = ()
    ) -> tuple[PreTrainedConfig, dict[str, tuple]]:
        """A native config, and the fields of ours that do not come out of it again."""
        native = self._native(values, config.dtype)
        differences = differing_fields(config, self.to_variant(native, ignore_keys, head), head)
        defaults = VariantConfig.__dataclass_fields__
        unused = {
            name
            for entry in self.entries
            if isinstance(entry, Offered)
            for name in entry.fields
            if name in differences and differences[name][0] == defaults[name].default
        }
        beside = {*self.told_by_weights, *unused}
        if leaves_out_the_pooler(config, head, self.readers(head)):
            beside.add("pooler")
        return native, {name: values for name, values in differences.items() if name not in beside}
