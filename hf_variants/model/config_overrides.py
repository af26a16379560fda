"""Overrides of a saved config, on loading and in `update`: they go through the constructor and obey its rules."""

import copy
from collections.abc import Iterable
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .axis import nobody_chose, quote


logger = logging.get_logger(__name__)

# What the constructor folds into `rope_parameters`.
ROPE_SHORTHANDS = ("rope_theta", "rope_scaling", "partial_rotary_factor")


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
            loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if kwargs.get("return_unused_kwargs") else loaded
        config.warn_of_idle_fields(overrides)
        if config is loaded and (unread := [name for name in kwargs if name[0] != "_" and not hasattr(config, name)]):
            logger.warning(f"{quote(unread)}: no field of this config, and not used.")
        return loaded

    def warn_of_idle_fields(self, names: Iterable[str]) -> None:
        """Say which of these fields have no effect, where that is known."""

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
