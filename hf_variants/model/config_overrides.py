"""What keys a config takes: overrides of a saved one go through the constructor, and a misspelt field is refused."""

import copy
import difflib
from collections.abc import Iterable
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .axis import VariantConfigError, nobody_chose, quote


logger = logging.get_logger(__name__)

# What the constructor folds into `rope_parameters`.
ROPE_SHORTHANDS = ("rope_theta", "rope_scaling", "partial_rotary_factor")

# Keys that transformers and its tools put into a config.json next to a model's own fields.
FRAMEWORK_KEYS = frozenset(
    {
        "architectures", "attn_implementation", "auto_map", "dtype", "finetuning_task", "head_dim", "label2id",
        "model_type", "name_or_path", "num_labels", "output_attentions", "partial_rotary_factor", "per_layer_config",
        "quantization_config", "rope_scaling", "rope_theta", "task_specific_params", "torch_dtype",
        "transformers_version", "use_return_dict",
    }
)  # fmt: skip


class ConstructorRules:
    """Mixed into the configs, before `PreTrainedConfig`."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """
        As in transformers, and a field that was derived is derived again from what overrides the others.

        Args:
            config_dict: a saved config.
            kwargs: fields that override it, and what transformers takes.

        Raises:
            ValueError: as on construction; for a key that looks like a field and is none.
        """
        own = cls.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
        known = {*own, *cls.other_arguments, *ROPE_SHORTHANDS, "per_layer_config"}
        overrides = {name: kwargs.pop(name) for name in known & kwargs.keys()}
        cls.refuse_near_misses(kwargs)
        # A saved config has every field, with or without effect.
        with nobody_chose():
            if overrides:
                config_dict = cls.overridden(config_dict, overrides)
            returns_unused = kwargs.pop("return_unused_kwargs", False)
            config, unused = super().from_dict(config_dict, **kwargs, return_unused_kwargs=True)
        config.warn_of_idle_fields(overrides)
        if returns_unused:
            return config, unused
        if unread := [name for name in unused if name[0] != "_"]:
            logger.warning(f"{quote(unread)}: no field of this config, and not used.")
        return config

    def warn_of_idle_fields(self, names: Iterable[str]) -> None:
        """Say which of these fields have no effect, where that is known."""

    @classmethod
    def refuse_near_misses(cls, unknown: dict[str, Any], beside: Iterable[str] = ()) -> None:
        """Refuse an unknown key that looks like a field: it would otherwise be stored and never read."""
        field_names = [name for name in (*cls.__dataclass_fields__, *beside) if not name.startswith("_")]
        sentences = []
        for key in unknown:
            if key in FRAMEWORK_KEYS or key in field_names or key.startswith("_"):
                continue
            match = difflib.get_close_matches(key, field_names, n=1, cutoff=0.84)
            if match:
                sentences.append(f"`{key}` is not a field; did you mean `{match[0]}`?")
        if sentences:
            raise VariantConfigError(" ".join(sentences))

    def update(self, config_dict: dict[str, Any]) -> None:
        """As in transformers, where it sets attributes one by one, under the rules of construction; all or nothing."""
        changed, others = type(self).from_dict(self.to_dict(), **config_dict, return_unused_kwargs=True)
        for name, value in vars(changed).items():
            if (name[0] != "_" or name == "_heterogeneity_spec") and vars(self).get(name) != value:
                # Not `setattr`, by which others would follow: `changed` has what follows.
                PreTrainedConfig.__setattr__(self, name, value)
        for name in others.keys() - {"return_unused_kwargs"}:
            setattr(self, name, others[name])

    @classmethod
    def overridden(cls, saved: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
        """What the constructor is given."""
        saved = cls.without_derived(copy.deepcopy(saved))
        return saved | cls.complete_overrides(saved, dict(overrides))

    @classmethod
    def without_derived(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """A saved config without the values that construction would derive from its others."""
        return {name: value for name, value in saved.items() if not cls._would_derive(name, saved)}

    @classmethod
    def _would_derive(cls, name: str, saved: dict[str, Any]) -> bool:
        field = cls.__dataclass_fields__.get(name)
        if field is None or field.default is not None or saved[name] is None:
            return False
        try:
            without = cls(**{other: saved[other] for other in saved if other != name})
        except (ValueError, AttributeError):
            # Another field needs it.
            return False
        # As it is saved: where layers have values of their own, a config has no attribute for all of them.
        return without.to_dict().get(name) == saved[name]

    @classmethod
    def complete_overrides(cls, saved: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
        """Overrides by the fields' own names, each a whole value."""
        shorthands = {name: overrides.pop(name) for name in ROPE_SHORTHANDS if name in overrides}
        if not shorthands:
            return overrides
        parameters = dict(overrides.get("rope_parameters") or saved.get("rope_parameters") or {})
        if saved.get("layer_rope_theta") or any(
            value is None or isinstance(value, dict) for value in parameters.values()
        ):
            raise ValueError(
                f"`{'`, `'.join(shorthands)}` would change the rotation of all layers, which differ in it. "
                "Pass `rope_parameters`, and `layer_rope_theta` where it is set."
            )
        kept = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
        if "rope_scaling" in shorthands:
            parameters = {**kept, **(shorthands.pop("rope_scaling") or {})}
        return overrides | {"rope_parameters": parameters | shorthands}
