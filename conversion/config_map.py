"""Translation of configs, written once per family and read in both directions.

A family lists entries; each consumes some native keys and sets some `VariantConfig` fields. The way back inverts the
entries one by one and then runs the forward direction on the result: what does not come out again is what the native
type cannot express, field by field. A native key that no entry consumes is an error.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_variants.model.configuration_variant import VariantConfig

from .errors import ConversionError, NotRepresentable


Fields = dict[str, Any]


class Entry:
    """One translation. `keys` are the native keys it consumes."""

    keys: tuple[str, ...] = ()

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


class Computed(Entry):
    """
    Fields computed from native keys, with the inverse beside it; the forward check catches an inexact inverse.

    Args:
        keys: native keys that are consumed.
        forward: native config values -> fields; it may read any native key.
        backward: all fields -> values of `keys`.
    """

    def __init__(
        self,
        keys: Iterable[str],
        forward: Callable[[Mapping[str, Any]], Fields],
        backward: Callable[[Mapping[str, Any]], Fields],
    ):
        self.keys = tuple(keys)
        self._forward = forward
        self._backward = backward

    def forward(self, native):
        return self._forward(native)

    def backward(self, fields):
        return self._backward(fields)


class Irrelevant(Entry):
    """A native key that does not change what the model computes; its value is kept for the way back."""

    def __init__(self, key: str, reason: str):
        self.keys = (key,)
        self.reason = reason

    def forward(self, native):
        return {}

    def backward(self, fields):
        return {}


class Required(Entry):
    """A native key of which only some values are supported."""

    def __init__(self, key: str, *values: Any, reason: str):
        self.keys = (key,)
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


class RopeParameters(Entry):
    """`rope_parameters`, the same standard dictionary on both sides, flat or per layer type."""

    keys = ("rope_parameters",)

    def forward(self, native):
        return {"rope_parameters": native["rope_parameters"]}

    def backward(self, fields):
        return {"rope_parameters": fields["rope_parameters"]}


class LayerTypes(Entry):
    """`layer_types` and `sliding_window`, the same on both sides; the window is kept also where no layer slides."""

    keys = ("layer_types", "sliding_window")

    def forward(self, native):
        return {"layer_types": list(native["layer_types"]), "sliding_window": native["sliding_window"]}

    def backward(self, fields):
        return {"layer_types": list(fields["layer_types"]), "sliding_window": fields["sliding_window"]}


# What PreTrainedConfig itself declares means the same in every config.
SHARED_KEYS = ("id2label", "label2id", "problem_type", "output_hidden_states", "return_dict", "chunk_size_feed_forward")

# Set by the framework on saving and loading, or by the classes themselves.
FRAMEWORK_KEYS = frozenset(
    {
        "architectures", "auto_map", "dtype", "is_encoder_decoder", "model_type", "num_labels", "torch_dtype",
        "transformers_version", "_name_or_path", "name_or_path", "tokenizer_class", "_attn_implementation",
        "attn_implementation", "experts_implementation", "_commit_hash", "output_attentions",
    }
)  # fmt: skip

# Common to most configs, with one meaning; translated where the native config has them.
COMMON_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache", "initializer_range")

# Keys of real checkpoints that no class of transformers declares or reads.
NOISE_KEYS = {
    "is_llama_config": "a note of the training code",
    "rope_interleaved": "a note of the training code; the native class rotates halves whatever it says",
    "transformers.js_config": "read by transformers.js only",
    "gradient_checkpointing": "a training setting",
    "task_specific_params": "generation settings",
    "finetuning_task": "a note of the training code",
    "unk_token_id": "read by tokenizers only",
    "mask_token_id": "read by tokenizers only",
    "sep_token_id": "read by tokenizers only",
    "cls_token_id": "read by tokenizers only",
    "decoder_start_token_id": "generation settings of encoder-decoders",
    "output_past": "an obsolete name of use_cache",
    "n_ctx": "an obsolete copy of the context length",
    "summary_type": "read by double-head models only",
}

# Fields without effect on a trained model's outputs.
TRAINING_FIELDS = frozenset(
    {
        "attention_dropout", "residual_dropout", "embedding_dropout", "activation_dropout", "layerdrop",
        "classifier_dropout", "z_loss_coefficient", "label_smoothing", "initializer_range", "layer_scale_init",
        "deepnorm_beta", "padding_embedding_frozen", "use_cache", "native_leftovers",
    }
)  # fmt: skip


def active_fields(config: VariantConfig) -> Fields:
    """The fields that change what this config's model computes, with derived values filled in and aliases unified."""
    own = [name for name in VariantConfig.__annotations__ if not name.startswith("_")]
    values = config.to_dict()
    fields = {name: values.get(name) for name in own if name not in TRAINING_FIELDS}
    position = fields["position_embedding_type"]
    inactive = []
    if position == "rope":
        fields["rope_parameters"] = [_canonical_rope(config.rope_parameters_of(i)) for i in range(len(config.layer_types))]
    else:
        inactive += [name for name in fields if name.startswith("rope_")]
    inactive.append("no_rope_layers")
    if position != "alibi":
        inactive += [name for name in fields if name.startswith("alibi_")]
    if position != "relative_bias":
        inactive += [name for name in fields if name.startswith("relative_attention_")]
    if position != "sinusoidal":
        inactive += ["sinusoidal_layout", "sinusoidal_padding_zero"]
    if position not in ("learned", "sinusoidal"):
        inactive += ["position_offset", "position_ids_source"]
    if fields["qk_norm"] == "none":
        inactive += [name for name in fields if name.startswith("qk_norm_")]
    if "sliding_attention" not in fields["layer_types"]:
        inactive.append("sliding_window")
    if fields["norm_placement"] != "deepnorm":
        inactive.append("deepnorm_alpha")
    if fields["embedding_size"] == fields["hidden_size"]:
        inactive += ["embedding_projection_bias", "embedding_projection_position"]
    if not fields["lm_head_transform"]:
        inactive += ["lm_head_transform_bias", "lm_head_transform_act"]
    if fields["embedding_multiplier"] == 1.0:
        inactive.append("embedding_multiplier_in_weight_dtype")
    if fields["parallel_block"] == "none":
        inactive.append("parallel_sum_order")
    if not fields["add_cross_attention"]:
        inactive.append("cross_attention_hidden_size")
    if not fields["norm_affine"]:
        inactive.append("norm_unit_offset")
    if not config.is_heterogeneous and fields["attention_scaling"] is None:
        fields["attention_scaling"] = config.head_dim**-0.5
    if config.is_heterogeneous:
        fields["per_layer_config"] = values["per_layer_config"]
    return {name: value for name, value in fields.items() if name not in inactive}


def _canonical_rope(parameters: dict | None) -> dict | None:
    if parameters is None:
        return None
    kept = {key: value for key, value in parameters.items() if value is not None and key != "type"}
    if kept.get("partial_rotary_factor") == 1.0:
        del kept["partial_rotary_factor"]
    return kept


def differing_fields(ours: VariantConfig, other: VariantConfig) -> dict[str, tuple]:
    """Active fields that differ, with both values. Numbers that are equal up to one rounding count as equal."""
    left, right = active_fields(ours), active_fields(other)
    different = {}
    for name in left.keys() | right.keys():
        a, b = left.get(name), right.get(name)
        close = isinstance(a, float) and isinstance(b, (int, float)) and math.isclose(a, b, rel_tol=1e-15)
        if a != b and not close:
            different[name] = (a, b)
    return dict(sorted(different.items()))


@dataclass(frozen=True)
class ConfigMap:
    """The config translation of one native type."""

    model_type: str
    entries: tuple[Entry, ...]

    @property
    def native_class(self) -> type[PreTrainedConfig]:
        return CONFIG_MAPPING[self.model_type]

    def _all_entries(self, native_keys: Iterable[str]) -> list[Entry]:
        taken = {key for entry in self.entries for key in entry.keys}
        shared = [key for key in SHARED_KEYS + COMMON_KEYS if key in native_keys and key not in taken]
        noise = [Irrelevant(key, reason) for key, reason in NOISE_KEYS.items() if key in native_keys and key not in taken]
        return [Same(*shared), *self.entries, *noise]

    def to_variant(self, native: PreTrainedConfig, ignore_keys: Iterable[str] = ()) -> VariantConfig:
        """
        The config of the same model here.

        Args:
            native: a config of this type.
            ignore_keys: keys of it that the caller knows to be meaningless.

        Raises:
            ConversionError: for a key that is not understood or an option that is not supported.
        """
        values = native.to_dict()
        values = {key: value for key, value in values.items() if key not in FRAMEWORK_KEYS}
        if values.get("quantization_config") is not None:
            raise ConversionError(
                "The checkpoint is quantised (`quantization_config`). Dequantise it first, for example with "
                "`model.dequantize()`, and save it."
            )
        values.pop("quantization_config", None)
        entries = self._all_entries(values)
        consumed = {key for entry in entries for key in entry.keys}
        unknown = sorted(set(values) - consumed - set(ignore_keys))
        if unknown:
            raise ConversionError(
                f"The {self.model_type} config has the keys {unknown}, whose meaning is not known here. If they do "
                f"not change what the model computes, name them in `ignore_keys`."
            )
        fields: Fields = {}
        for entry in entries:
            fields.update(entry.forward(values))
        defaults = self.native_class().to_dict()
        irrelevant = [entry.keys[0] for entry in entries if isinstance(entry, Irrelevant)]
        kept = {key: values[key] for key in [*irrelevant, *ignore_keys] if key in values}
        leftovers = {key: value for key, value in kept.items() if key not in defaults or defaults[key] != value}
        fields["native_leftovers"] = {"model_type": self.model_type, **leftovers}
        return VariantConfig(**fields, dtype=native.dtype)

    def to_native(self, config: VariantConfig) -> PreTrainedConfig:
        """
        The native config of the same model.

        Raises:
            NotRepresentable: naming every field that the native type cannot express.
        """
        native_keys = self.native_class().to_dict()
        values: Fields = {}
        fields = {name: getattr(config, name) for name in config.to_dict() if not config.is_heterogeneous_in(name)}
        fields |= {name: None for name in VariantConfig.__annotations__ if config.is_heterogeneous_in(name)}
        for entry in self._all_entries(native_keys):
            values.update(entry.backward(fields))
        leftovers = dict(config.native_leftovers or {})
        if leftovers.pop("model_type", None) == self.model_type:
            values.update(leftovers)
        try:
            native = self.native_class(**values, dtype=config.dtype)
            differences = differing_fields(config, self.to_variant(native, ignore_keys=leftovers))
        except (ConversionError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
            raise NotRepresentable(self.model_type, {"config": ("this variant", str(error))}) from error
        if differences:
            raise NotRepresentable(self.model_type, differences)
        return native
