"""The configuration of one Transformer stack: every architectural axis is a field, none is keyed on a model's name."""

# First, so that a transformers too old for what follows is refused in words.
from .versions import MINIMUM  # noqa: F401


# isort: split
import copy
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import Field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .attention import AttentionAxis
from .axis import (
    TRAINING,
    Axis,
    Check,
    Idle,
    VariantConfigError,
    nobody_chose,
    own_fields,
    refuse,
    setting,
    somebody_chose,
)
from .block import PlacementAxis
from .config_overrides import ConstructorRules
from .distribution import pipeline_plan, tensor_parallel_plan
from .embedding import EmbeddingAxis
from .feed_forward import FeedForwardAxis
from .heads import ClassifierAxis, HeadAxis
from .losses import LossAxis
from .normalization import NormalizationAxis
from .per_layer import SKIP_NAMES, PerLayerRules
from .positions import PositionsAxis
from .stack import LayersAxis, RegularisationAxis, SizeAxis


logger = logging.get_logger(__name__)

# In the order in which they are documented, derived, checked and described.
AXES: tuple[type[Axis], ...] = (
    SizeAxis,
    NormalizationAxis,
    PlacementAxis,
    FeedForwardAxis,
    AttentionAxis,
    LayersAxis,
    PositionsAxis,
    EmbeddingAxis,
    HeadAxis,
    ClassifierAxis,
    RegularisationAxis,
    LossAxis,
)

# Fields of older config.json files -> what they are called now.
RENAMED_FIELDS = {"layer_scale_type": "learned_scale_type"}


@strict
class VariantConfig(ConstructorRules, PerLayerRules, *AXES, PreTrainedConfig):
    r"""
    Configuration of one dense Transformer stack: a decoder (`is_causal=True`) or an encoder (`is_causal=False`).

    The defaults describe a small Llama-like decoder. Fields left at `None` are derived on construction and written
    out explicitly, so that a saved `config.json` is complete. All inconsistencies are reported together, each with its
    remedy, as a `ValueError`; a field that is set and has no effect under the rest is named in a warning. Those under
    "Rounding" leave the function as it is and say how a stock class computes it: who designs a variant needs none.

    initializer_scheme (`str`): standard deviation of new matrices: `"normal"`: `initializer_range`; `"depth_scaled"`: the
        same, divided by the root of twice the depth where a branch ends (GPT-2), or `"depth_scaled_attention"`, in
        attention only (nanochat), or `"depth_scaled_and_heads"`, before and in the LM head as well, with classifiers at
        the inverse root of the width (ModernBERT); `"fan_out_heads"`: in the LM head and classifiers, times the inverse
        root of what they score (T5Gemma); `"fan_in"`: times the inverse root of what is summed, and 1 for
        embeddings; norms start at `initializer_range` (T5).
    initializer_cutoff_factor (`float`): new matrices keep within so many standard deviations (ModernBERT); `None`: no limit.
    initializer_norm_ones (`bool`): new norms store 1 also where the applied weight is `1 + w` (Nemotron: a gain of 2).
    initializer_positions (`str`): how a learned table of positions starts: as matrices do, `"normal"`, or from
        sinusoids, `"sinusoidal"` (DistilBERT).
    initializer_sinks (`str`): how attention sinks start: as matrices do, `"normal"`, or at `"zero"` (Granite SWA).
    initializer_range, use_cache, bos_token_id, eos_token_id, pad_token_id: as everywhere in transformers.
    argument_order (`dict`): class -> the names of the arguments that its forward takes by place, with commas between
        them, where a stock class has another order; `None`: that of the signature, or, with token types, BERT's.
    native_leftovers (`dict`): where the model was converted from: its `model_type`, and keys of that config which do
        not change what the model computes, kept for the way back.
    """

    title = "other"

    model_type = "hf_variant"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    ignore_keys_at_rope_validation = {"llama_4_scaling_beta", "alpha"}
    # Of the constructor, beside the fields.
    other_arguments = tuple(RENAMED_FIELDS)
    # (name, overrides) -> fields: set by `hf_variants.presets`, which the code beside a checkpoint is without.
    resolve_preset = None

    initializer_range: int | float = setting(0.02, TRAINING)
    initializer_scheme: Literal[
        "normal", "depth_scaled", "depth_scaled_attention", "depth_scaled_and_heads", "fan_out_heads", "fan_in"
    ] = setting("normal", TRAINING)
    initializer_cutoff_factor: int | float | None = setting(None, TRAINING)
    initializer_norm_ones: bool = setting(False, TRAINING)
    initializer_positions: Literal["normal", "sinusoidal"] = setting("normal", TRAINING)
    initializer_sinks: Literal["normal", "zero"] = setting("normal", TRAINING)
    argument_order: dict[str, str] | None = setting(None, TRAINING)
    native_leftovers: dict | None = setting(None, TRAINING)
    use_cache: bool = setting(True, TRAINING)
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        for old in RENAMED_FIELDS.keys() & kwargs.keys():
            setattr(self, RENAMED_FIELDS[old], kwargs.pop(old))
        if kwargs.get("per_layer_config"):
            kwargs["per_layer_config"] = {
                layer: {
                    RENAMED_FIELDS.get(name, name): [SKIP_NAMES.get(one, one) for one in value]
                    if name == "skip"
                    else value
                    for name, value in fields.items()
                }
                for layer, fields in kwargs["per_layer_config"].items()
            }
        self.refuse_near_misses(kwargs)
        self._refuse_shared_fields(kwargs.get("per_layer_config"))
        self.derive()
        self._refuse_missing_rope_entries()
        super().__post_init__(**kwargs)
        # Before `@strict` runs it again, so that the error is a `ValueError` as everywhere in transformers.
        self.validate_architecture()
        for name, plan in self.plans().items():
            setattr(self, name, plan)
        if somebody_chose():
            self.warn_of_idle_fields(FIELDS)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in transformers; and what was derived from a field follows it, as in `update` and on loading."""
        # The plans are the last that construction sets. A layer's own config, which has `skip`, changes in these alone.
        alone = name not in FIELDS or "base_model_tp_plan" not in vars(self) or "skip" in vars(self)
        if alone or vars(self)[name] == value:
            super().__setattr__(name, value)
            return
        derived, planned = self.derived_fields() - {name}, self.plans()
        planned = {plan for plan in planned if getattr(self, plan) == planned[plan]}
        super().__setattr__(name, value)
        bare = self._under_construction(derived)
        bare.derive()
        # A pattern of layers, or `None`, is resolved as on construction.
        for follower in {*derived, name}:
            super().__setattr__(follower, vars(bare)[follower])
        renewed = self.plans()
        for plan in planned:
            super().__setattr__(plan, renewed[plan])

    def plans(self) -> dict[str, dict | None]:
        """How tensor, pipeline and data parallelism split this stack, by the names that transformers reads."""
        fsdp = {k: v for k, v in type(self).base_model_fsdp_plan.items() if k != "norm" or self.final_norm}
        return {
            "base_model_pp_plan": pipeline_plan(self),
            "base_model_fsdp_plan": fsdp,
            "base_model_tp_plan": tensor_parallel_plan(self),
        }

    def derived_fields(self) -> set[str]:
        """The fields with the value that construction would derive from the others."""
        names = {name for name, entry in FIELDS.items() if entry.default is None and vars(self)[name] is not None}
        return {name for name in names if self._derives(name)}

    def _derives(self, name: str) -> bool:
        bare = self._under_construction({name})
        bare.derive()
        return vars(bare)[name] == vars(self)[name]

    def _under_construction(self, unset: Iterable[str]) -> "VariantConfig":
        """A copy without layers of their own, on which `derive` fills in these fields."""
        bare = copy.copy(self)
        for name in ("base_model_tp_plan", "_heterogeneity_spec"):
            vars(bare).pop(name, None)
        vars(bare).update(dict.fromkeys(unset))
        return bare

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VariantConfig":
        """
        The axes of a published architecture (`hf_variants.presets()` lists them) with your sizes.

        Args:
            name (`str`): preset, such as `"gemma2"`.
            overrides: any field of this config; they win over the preset's.

        Raises:
            ValueError: if there is no such preset.
        """
        if cls.resolve_preset is None:
            raise VariantConfigError("Presets are not part of the code beside a checkpoint. Install hf-variants.")
        with nobody_chose():
            config = cls(**cls.resolve_preset(name, overrides))
        config.warn_of_idle_fields(overrides)
        return config

    def derive(self) -> None:
        for room in AXES:
            room.derive(self)

    def checks(self) -> list[Check]:
        cutoff = self.initializer_cutoff_factor
        own = Check(
            cutoff is not None and cutoff <= 0,
            f"`initializer_cutoff_factor` is {cutoff}.",
            "Set it above 0, or to None for no limit.",
        )
        return [row for room in AXES for row in room.checks(self)] + [own]

    def idle(self) -> list[Idle]:
        own = [
            Idle(not self.attention_sinks, ["initializer_sinks"], "`attention_sinks` is off"),
            Idle(
                self.position_embedding_type != "learned",
                ["initializer_positions"],
                f"`position_embedding_type` is {self.position_embedding_type}",
            ),
        ]
        return [row for room in AXES for row in room.idle(self)] + own

    def idle_fields(self) -> dict[str, str]:
        """The fields that have no effect in any layer, and why."""
        layers = self.per_layer_config if self.is_heterogeneous else [self]
        reasons = [
            {name: because for idle, names, because in layer.idle() if idle for name in names} for layer in layers
        ]
        return {name: because for name, because in reasons[0].items() if all(name in layer for layer in reasons)}

    def warn_of_idle_fields(self, names: Iterable[str]) -> None:
        """Name those of these fields that are set to other than their default and have no effect."""
        idle = {name: because for name, because in self.idle_fields().items() if name in names}
        layer = self.per_layer_config[0]
        defaults = {name: FIELDS[name].default for name in idle}
        derived = copy.copy(layer)
        for name in [name for name, default in defaults.items() if default is None]:
            object.__setattr__(derived, name, None)
        derived.derive()
        defaults |= {name: getattr(derived, name) for name, default in defaults.items() if default is None}
        sentences = [
            f"`{name}` is set, but has no effect, because {because}."
            for name, because in idle.items()
            if not self.is_heterogeneous_in(name) and getattr(layer, name) != defaults[name]
        ]
        if sentences:
            logger.warning_once(" ".join(sentences))

    def validate_architecture(self):
        """Report every inconsistency at once: what is wrong, and what to do about it."""
        if not self.is_heterogeneous:
            return refuse(self.checks())
        return refuse(self.per_layer_checks() + [row for layer in self.per_layer_config for row in layer.checks()])


# Every field by name, in the order of the axes.
FIELDS: dict[str, Field] = {name: entry for room in (*AXES, VariantConfig) for name, entry in own_fields(room).items()}

VariantConfig.__doc__ = "\n\n".join(
    [inspect.getdoc(VariantConfig)]
    + [f"{room.title.capitalize()}:\n{textwrap.indent(inspect.getdoc(room), '    ')}" for room in AXES]
)

__all__ = ["VariantConfig"]
