"""A native model and its variant, and an adapter's place between them."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from peft.utils.constants import CONFIG_NAME
from transformers import PreTrainedConfig, PreTrainedModel

from hf_variants.model.configuration_variant import VariantConfig

from .. import rules
from ..errors import ConversionError
from ..family import Family, family_with_head
from ..native_target import native_config_for
from ..skeleton import empty_model, stored_tensors
from .files import Adapter


@dataclass
class Pair:
    """
    A native model and its variant, without memory for weights.

    Attributes:
        native, variant: on the meta device.
        config (`VariantConfig`): that the rules' operations read.
    """

    family: Family
    head: str
    native: PreTrainedModel
    variant: PreTrainedModel
    config: VariantConfig

    @classmethod
    def of_native(cls, config: PreTrainedConfig, head: str, ignore_keys: Iterable[str] = ()) -> "Pair":
        family = family_with_head(config, head)
        native_class = family.native_class(head)
        if native_class is None:
            raise ConversionError(
                f"The adapter is for {head}, and {config.model_type} has no such class. Correct `task_type` in its "
                f"{CONFIG_NAME}, or `base_model_name_or_path`."
            )
        variant_config = family.config_map.to_variant(config, ignore_keys, head)
        variant = empty_model(family.variant_class(head), variant_config)
        return cls(family, head, empty_model(native_class, config), variant, variant_config)

    @classmethod
    def of_variant(cls, config: VariantConfig, head: str, model_type: str | None = None) -> "Pair":
        family, native_config = native_config_for(config, model_type, head)
        native_class = family.native_class(head)
        if native_class is None:
            raise ConversionError(f"{family.model_type} has no class for {head}. Name another type.")
        variant = empty_model(family.variant_class(head), config)
        return cls(family, head, empty_model(native_class, native_config), variant, config)

    def steps(self, to_native: bool) -> list[rules.Step]:
        """Where every tensor goes; of tied tensors each for itself, since an adapter may have untied them."""
        all_rules = self.family.rules_for(self.head)
        native, ours = stored_tensors(self.native), stored_tensors(self.variant)
        source, target = (ours, native) if to_native else (native, ours)
        found = rules.plan(all_rules, source, target, to_native=to_native)
        places = set((self.native if to_native else self.variant).state_dict()) - set(target)
        for name in (self.variant if to_native else self.native).state_dict().keys() - source.keys():
            for rule in all_rules:
                step = rules.single(rule, name, to_native)
                if step is not None and (step.targets[0] in places or step.targets[0] in target):
                    found.append(step)
                    break
        return found

    def fit(self, adapter: Adapter, to_native: bool) -> int | None:
        """
        Give both models the adapter's number of labels and of tokens.

        Returns:
            the number of tokens, if the adapter's is not the base's.
        """
        # What chooses among sequences has one logit for each, whatever the number of labels.
        if self.head != "multiple_choice":
            rows = classes_of(adapter, None if to_native else self.family, self.head)
            if rows not in (None, self.native.config.num_labels):
                for side in ("native", "variant"):
                    model = getattr(self, side)
                    config = copy.deepcopy(model.config)
                    config.num_labels = rows
                    setattr(self, side, empty_model(type(model), config))
        rows = vocabulary_of(adapter, self.variant if to_native else self.native)
        if rows is not None:
            for model in (self.native, self.variant):
                model.resize_token_embeddings(rows, mean_resizing=False)
        return rows


def classes_of(adapter: Adapter, family: Family | None, head: str) -> int | None:
    """How many rows this head's classifier has in an adapter that holds it, of a family's model or else of a variant."""
    name = "score.{leaf}"
    if family is not None:
        rule = next((rule for rule in family.rules_for(head) if rule.ours == name), None)
        name = "" if rule is None else rule.native_names()[0]
    tensor = adapter.tensors.get(adapter.prefix + name.replace("{leaf}", "weight"))
    return None if tensor is None else tensor.shape[0]


def vocabulary_of(adapter: Adapter, model: PreTrainedModel) -> int | None:
    """How many tokens an adapter has rows for, where that is not the model's own number."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(module, "weight", None)
        name = next((name for name, other in model.named_modules() if other is module), None)
        if weight is None or name is None:
            continue
        for key, tensor in adapter.tensors.items():
            inner = key.removeprefix(adapter.prefix)
            if not inner.startswith(f"{name}."):
                continue
            if inner.endswith(".weight") and tensor.shape[1:] == weight.shape[1:]:
                rows = tensor.shape[0]
            elif inner.endswith("lora_embedding_A"):
                rows = tensor.shape[1]
            else:
                continue
            if rows != weight.shape[0]:
                return rows
    return None
