"""What an adapter's config says of one module."""

import re
from typing import Any

from peft import PeftConfig, PeftType
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel


# Ways to initialise that take something out of the base's weight, which PEFT computes again on loading.
INITIALISED_FROM_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Of a factorised method, the config's names of rank and of the numerator of its scale.
SCALES = {PeftType.LORA: ("r", "lora_alpha"), PeftType.LOHA: ("r", "alpha")}


def is_initialised_from_base(config: PeftConfig) -> bool:
    way = getattr(config, "init_lora_weights", None)
    return isinstance(way, str) and way.lower().startswith(INITIALISED_FROM_BASE)


def patterns_of(config: PeftConfig) -> dict[str, dict[str, Any]]:
    """Settings that hold for modules by name, such as `rank_pattern`; AdaLoRA's are the masks of its parameters."""
    if config.peft_type == PeftType.ADALORA:
        return {}
    names = [name for name in vars(config) if name.endswith("_pattern") and isinstance(getattr(config, name), dict)]
    return {name: getattr(config, name) for name in names}


def setting_of(config: PeftConfig, name: str, pattern: str, module: str) -> Any:
    """A setting of one module."""
    values = getattr(config, pattern, None) or {}
    return values.get(get_pattern_key(values, module), getattr(config, name))


def feed_forward_of(model: PreTrainedModel, config: PeftConfig) -> set[str]:
    """The modules whose inputs IA3 scales."""
    chosen = config.feedforward_modules or ()
    if isinstance(chosen, str):
        return {name for name, _ in model.named_modules() if re.fullmatch(chosen, name)}
    return {name for name, _ in model.named_modules() if any(name.endswith(ending) for ending in chosen)}
