"""The config that makes a translated adapter's modules."""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .files import Adapter
from .places import Place
from .settings import SCALES, feed_forward_of, patterns_of, setting_of


def translated_config(
    adapter: Adapter,
    source: PreTrainedModel,
    target: PreTrainedModel,
    adapted: Mapping[str, Place],
    parameters: Mapping[str, Mapping[str, torch.Tensor]],
    saved: set[str],
    joined: Mapping[str, tuple[int, float]],
) -> PeftConfig:
    """The config that makes exactly these modules on the target."""
    old = adapter.config
    config = copy.deepcopy(old)
    tokens_only = {
        module for module, values in parameters.items() if all(name.startswith("token_adapter.") for name in values)
    }
    tuned = adapted.keys() - tokens_only
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(config, name):
            setattr(config, name, None)
    if hasattr(config, "modules_to_save"):
        roots = _saved_roots(target, saved)
        config.modules_to_save = (
            _named(target, roots, lambda short, name: any(name.endswith(s) for s in short)) or None
        )
    if getattr(config, "target_modules", None) is not None:
        probe = copy.copy(config)

        def matches(short: list[str], name: str) -> bool:
            probe.target_modules = set(short)
            return check_target_module_exists(probe, name) is True

        config.target_modules = set(_named(target, tuned, matches))
    if getattr(config, "feedforward_modules", None):
        flagged = feed_forward_of(source, old)
        inputs = {module for module, place in adapted.items() if not flagged.isdisjoint(place.sources)}
        # PEFT wants these to be among those, as they are spelled.
        short = {name.rpartition(".")[2] for name in inputs} & config.target_modules
        if short and {name for name in tuned if name.rpartition(".")[2] in short} == inputs:
            inputs = short
        else:
            config.target_modules = set(tuned)
        config.feedforward_modules = inputs
    for name, pattern in patterns_of(old).items():
        settings = {
            module: pattern[key]
            for module, place in adapted.items()
            if (key := get_pattern_key(pattern, place.sources[0])) in pattern
        }
        setattr(config, name, {re.escape(module): value for module, value in settings.items()})
    if joined:
        _set_ranks(config, old, adapted, joined)
    if isinstance(getattr(config, "trainable_token_indices", None), dict):
        indices = config.trainable_token_indices
        config.trainable_token_indices = {
            module: value
            for key, value in indices.items()
            for module, place in adapted.items()
            if place.sources[0] == key or place.sources[0].endswith(f".{key}")
        }
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(isinstance(target.get_submodule(module), Conv1D) for module in tuned)
    if config.peft_type == PeftType.ADALORA and config.rank_pattern:
        config.rank_pattern = _renamed_masks(config.rank_pattern, adapted)
    if config.auto_mapping is not None:
        config.auto_mapping = {
            "base_model_class": type(target).__name__,
            "parent_library": type(target).__module__,
        }
    config.base_model_name_or_path = config.revision = None
    return config


def _renamed_masks(masks: Mapping[str, Any], adapted: Mapping[str, Place]) -> dict[str, Any]:
    """AdaLoRA's masks of the ranks that it kept, by the names of its parameters."""
    renamed = {}
    for key, mask in masks.items():
        for module, place in adapted.items():
            for source in place.sources:
                before, found, after = key.partition(f"{source}.lora_E")
                if found and (not before or before.endswith(".")):
                    renamed[f"{before}{module}.lora_E{after}"] = mask
    return renamed


def _set_ranks(
    config: PeftConfig, old: PeftConfig, adapted: Mapping[str, Place], joined: Mapping[str, tuple[int, float]]
) -> None:
    """Rank and scale of every module, the commonest as the default."""
    rank_name, alpha_name = SCALES[config.peft_type]
    values = {
        module: joined.get(module)
        or (
            setting_of(old, rank_name, "rank_pattern", place.sources[0]),
            setting_of(old, alpha_name, "alpha_pattern", place.sources[0]),
        )
        for module, place in adapted.items()
    }
    (rank, alpha), _ = Counter(values.values()).most_common(1)[0]
    setattr(config, rank_name, rank)
    setattr(config, alpha_name, alpha)
    config.rank_pattern = {re.escape(module): r for module, (r, _) in values.items() if r != rank}
    config.alpha_pattern = {re.escape(module): a for module, (_, a) in values.items() if a != alpha}


def _saved_roots(target: PreTrainedModel, names: set[str]) -> list[str]:
    """The largest modules that consist of these tensors, which is what `modules_to_save` names."""
    roots = set()
    state = list(target.state_dict())
    for name in names:
        module = name.rpartition(".")[0]
        while parent := module.rpartition(".")[0]:
            inside = {other for other in state if other.startswith(f"{parent}.")}
            if not inside <= names or isinstance(target.get_submodule(parent), (nn.ModuleList, PreTrainedModel)):
                break
            module = parent
        roots.add(module)
    return sorted(roots)


def _named(model: PreTrainedModel, modules: Iterable[str], matches: Any) -> list[str]:
    """The last parts of the modules' names where these mean no other module, or else whole names."""
    modules = sorted(modules)
    short = sorted({name.rpartition(".")[2] for name in modules})
    if sorted(name for name, _ in model.named_modules() if name and matches(short, name)) == modules:
        return short
    return modules
