"""What a native family is: its config translation, its weight rules, and where its arithmetic must differ from ours."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import getattribute_from_module
from transformers.models.auto.configuration_auto import model_type_to_module_name

import hf_variants
from hf_variants.model.configuration_variant import VariantConfig

from . import families, refusals
from .config_map import ConfigMap, Entry
from .errors import UnsupportedModelType
from .rules import Drop, Rule


# head -> (transformers' table of native classes by model type, our class)
HEADS = {
    "base": (modeling_auto.MODEL_MAPPING_NAMES, "VariantModel"),
    "causal_lm": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "VariantForCausalLM"),
    "sequence_classification": (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "VariantForSequenceClassification",
    ),
}


@dataclass(frozen=True)
class Deviation:
    """
    An operation whose rounding differs from the native model's.

    Args:
        reason: which operation, and why it must differ.
        bound: the largest difference of logits in float32, relative to their standard deviation.
        applies: whether a config is affected.
    """

    reason: str
    bound: float = 1e-5
    applies: Callable[[VariantConfig], bool] = lambda config: True


@dataclass(frozen=True)
class Family:
    """
    One native model type.

    Args:
        model_type: as in transformers.
        config: entries of the config translation, see `config_map`.
        weights: rules for the tensors of the causal LM, see `rules`; names of the bare model and of other heads follow.
        deviations: where logits are not bit-identical, and why.
    """

    model_type: str
    config: tuple[Entry, ...]
    weights: tuple[Rule | Drop, ...]
    deviations: tuple[Deviation, ...] = ()

    @property
    def config_map(self) -> ConfigMap:
        return ConfigMap(self.model_type, self.config)

    def native_class(self, head: str) -> type[PreTrainedModel] | None:
        """transformers' class for this type and head, or `None` if it has none."""
        name = HEADS[head][0].get(self.model_type)
        if name is None:
            return None
        name = name if isinstance(name, str) else name[0]
        module = importlib.import_module(f"transformers.models.{model_type_to_module_name(self.model_type)}")
        return getattribute_from_module(module, name)

    def head_of(self, class_name: str) -> str:
        """The head of a native class, by its name."""
        for head in HEADS:
            native = self.native_class(head)
            if native is not None and native.__name__ == class_name:
                return head
        raise UnsupportedModelType(
            f"{class_name} has no counterpart here. Load the checkpoint as one of: "
            + ", ".join(c.__name__ for head in HEADS if (c := self.native_class(head)) is not None)
            + "."
        )

    def rules_for(self, head: str) -> list[Rule | Drop]:
        """The weight rules with the names that the classes of this head use."""
        causal = self.native_class("causal_lm")
        native_prefix = causal.base_model_prefix + "."
        if head == "causal_lm":
            return list(self.weights)
        rules = [rule for rule in self.weights if rule.native_names()[0].startswith(native_prefix)]
        if head == "base":
            return [rule.without_prefixes(native_prefix, "model.") for rule in rules]
        head_prefix = self.native_class(head).base_model_prefix + "."
        return [rule.with_native_prefix(native_prefix, head_prefix) for rule in rules] + [
            Rule("score.{leaf}", "score.{leaf}")
        ]

    def deviations_of(self, config: VariantConfig) -> list[Deviation]:
        """The deviations that affect this config."""
        return [deviation for deviation in self.deviations if deviation.applies(config)]


def variant_class(head: str) -> type[PreTrainedModel]:
    return getattr(hf_variants, HEADS[head][1])


def head_of_variant(class_name: str) -> str:
    """The head of one of our classes, by its name."""
    for head, (_, ours) in HEADS.items():
        if ours == class_name:
            return head
    raise UnsupportedModelType(f"{class_name} has no native counterpart. Convert the model without its head.")


@cache
def all_families() -> dict[str, Family]:
    """Every family by model type, from the modules of `families`."""
    found = {}
    for module_info in pkgutil.iter_modules(families.__path__):
        if module_info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{families.__name__}.{module_info.name}")
        for family in module.FAMILIES:
            found[family.model_type] = family
    return dict(sorted(found.items()))


def supported_model_types() -> list[str]:
    """The native model types that convert both ways, sorted."""
    return list(all_families())


def family_of(model_type: str) -> Family:
    """
    The family of a native model type.

    Raises:
        UnsupportedModelType: naming the mechanism that is missing here.
    """
    family = all_families().get(model_type)
    if family is None:
        raise UnsupportedModelType(refusals.sentence(model_type))
    return family


def is_variant(config: PreTrainedConfig) -> bool:
    return config.model_type == VariantConfig.model_type
