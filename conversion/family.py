"""What a native family is: its config translation, its weight rules, and where its arithmetic must differ from ours."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import getattribute_from_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.utils import CONFIG_NAME

import hf_variants
from hf_variants.model.arguments import argument_names, usual_order
from hf_variants.model.configuration_variant import VariantConfig
from hf_variants.model.configuration_variant_seq2seq import VariantSeq2SeqConfig

from . import block_configs, families, refusals
from .config_keys import VARIANT_TYPES
from .config_map import AnyVariantConfig, ConfigMap, Entry
from .errors import UnsupportedModelType, reading
from .json_files import read_config_values
from .rules import Rule
from .skeleton import empty_model


# head -> (transformers' table of native classes by model type, our class)
HEADS = {
    "base": (modeling_auto.MODEL_MAPPING_NAMES, "VariantModel"),
    "causal_lm": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "VariantForCausalLM"),
    "masked_lm": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "VariantForMaskedLM"),
    "sequence_classification": (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "VariantForSequenceClassification",
    ),
    "token_classification": (
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "VariantForTokenClassification",
    ),
    "question_answering": (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, "VariantForQuestionAnswering"),
    "multiple_choice": (modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES, "VariantForMultipleChoice"),
    "next_sentence_prediction": (
        modeling_auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
        "VariantForNextSentencePrediction",
    ),
}
# The same tensors, as classes of an encoder.
LANGUAGE_MODELS = {"causal_lm", "masked_lm"}
_SEQ2SEQ_CLASSIFIERS = ("sequence_classification", "token_classification", "question_answering")
_CLASSIFIERS = (*_SEQ2SEQ_CLASSIFIERS, "multiple_choice", "next_sentence_prediction")
# The same for encoder-decoders.
SEQ2SEQ_HEADS = {
    "base": (modeling_auto.MODEL_MAPPING_NAMES, "VariantSeq2SeqModel"),
    "seq2seq_lm": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "VariantForConditionalGeneration"),
    **{head: (HEADS[head][0], HEADS[head][1].replace("Variant", "VariantSeq2Seq")) for head in _SEQ2SEQ_CLASSIFIERS},
}
# The same for the encoders of encoder-decoders, and for their decoders.
ENCODER_HEADS = {
    "base": (modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, "VariantModel"),
    "token_classification": HEADS["token_classification"],
}
DECODER_HEADS = {"causal_lm": HEADS["causal_lm"]}
# What most native classes call the tensors of their heads; a family with other names lists its own.
HEAD_WEIGHTS: dict[str, tuple[Rule, ...]] = {
    "sequence_classification": (Rule("score.{leaf}", "score.{leaf}"),),
    "token_classification": (Rule("score.{leaf}", "score.{leaf}"),),
    "question_answering": (Rule("qa_outputs.{leaf}", "qa_outputs.{leaf}"),),
}


# How classes of other code call their heads; the last one is every bare model's.
ENDINGS = {
    "primary": ("ForCausalLM", "LMHeadModel", "WithLMHead", "WithLMHeadModel", "ForPreTraining", "MTModel",
                "ForConditionalGeneration", "ForSeq2SeqLM"),
    "masked_lm": ("ForMaskedLM",),
    "sequence_classification": ("ForSequenceClassification",),
    "token_classification": ("ForTokenClassification",),
    "question_answering": ("ForQuestionAnswering", "ForQuestionAnsweringSimple"),
    "multiple_choice": ("ForMultipleChoice",),
    "next_sentence_prediction": ("ForNextSentencePrediction",),
    "base": ("Model",),
}  # fmt: skip


def _plain(name: str) -> str:
    """A class's name as its letters and digits, in which old and new spellings agree."""
    return "".join(character for character in name.lower() if character.isalnum())


@dataclass(frozen=True)
class Deviation:
    """
    An operation whose rounding differs from the native model's.

    Args:
        reason: which operation, and why it must differ.
        bound: the largest difference of logits in float32, relative to their standard deviation.
        applies: whether a config is affected.
        gradients_only: whether the logits are bit-identical all the same; the bound is then the gradients'.
    """

    reason: str
    bound: float = 1e-5
    gradients_only: bool = False
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
        primary: the head whose class `weights` describes.
        base_weights: rules for tensors of the bare model that the class of the primary head lacks (a pooler).
        head_weights: rules for the tensors of other heads, where their names are not the usual ones.
        loosely_tied: the native name of an LM head that the config ties in any case and transformers unties where the
            checkpoint has other values for it (T5 1.1), or `None`.
        encoder, decoder: of an encoder-decoder, one stack alone, for which transformers has classes as well (T5's
            encoder, BART's decoder); of an encoder, the same as a decoder (`is_decoder`).
        part: which stack of an encoder-decoder it is; empty for a whole model.
        inside: what the classes of other heads call the bare model, as a prefix, where it is not `base_model_prefix`.
        own_config, own_models: for a type that transformers does not have, its config class, and for every head a class
            that holds the weights in the type's layout; what they compute is in the checkpoint's own code.
    """

    model_type: str
    config: tuple[Entry, ...]
    weights: tuple[Rule, ...]
    deviations: tuple[Deviation, ...] = ()
    primary: str = "causal_lm"
    base_weights: tuple[Rule, ...] = ()
    head_weights: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    loosely_tied: str | None = None
    own_config: type[PreTrainedConfig] | None = None
    own_models: Mapping[str, type[PreTrainedModel]] = field(default_factory=dict)
    encoder: "Family | None" = None
    decoder: "Family | None" = None
    part: str = ""
    inside: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_seq2seq(self) -> bool:
        return self.primary == "seq2seq_lm"

    @property
    def parts(self) -> list["Family"]:
        """The stacks for which transformers has classes of their own."""
        return [part for part in (self.encoder, self.decoder) if part is not None]

    @property
    def heads(self) -> dict[str, tuple[dict, str]]:
        """The heads that models of this kind can have."""
        if self.part:
            return ENCODER_HEADS if self.part == "encoder" else DECODER_HEADS
        if not self.is_seq2seq:
            return HEADS
        # What transformers lists as a head of the type may be a head of its encoder (T5's token classifier).
        of_parts = {head for part in self.parts for head in part.heads} - {"base"}
        return {head: classes for head, classes in SEQ2SEQ_HEADS.items() if head not in of_parts}

    @property
    def converted_heads(self) -> list[str]:
        """The heads that transformers has for this type and we convert."""
        return [head for head in self.heads if self.native_class(head) is not None]

    @property
    def config_map(self) -> ConfigMap:
        config_class = VariantSeq2SeqConfig if self.is_seq2seq else VariantConfig
        told_by_weights = ("tie_word_embeddings",) if self.loosely_tied else ()
        return ConfigMap(
            self.model_type,
            self.config,
            config_class,
            self.own_config,
            told_by_weights,
            self._readers,
            self._argument_order,
        )

    @property
    def runs_eager(self) -> bool:
        """Whether the stock class of the primary head has eager attention alone."""
        return self.config_map.runs_eager(self.primary)

    def _readers(self, head: str) -> tuple[type[PreTrainedModel], ...]:
        """The classes that read the config of a checkpoint with this head."""
        classes = (self.native_class(head or self.primary), self.native_class("base"))
        return tuple(dict.fromkeys(filter(None, classes)))

    def _argument_order(self, config: PreTrainedConfig) -> dict[str, str] | None:
        """Where stock classes take arguments by place in another order than ours of the same heads, that order."""
        orders = {}
        for head in [] if self.own_models else self.converted_heads:
            ours, stock = self.variant_class(head), argument_names(self.native_class(head).forward)
            if usual_order(ours, config)[: len(stock)] != stock:
                orders[ours.__name__] = ", ".join(stock)
        return orders or None

    @property
    def is_installed(self) -> bool:
        """Whether there is a config class for this type, of this transformers or our own."""
        return self.own_config is not None or self.model_type in CONFIG_MAPPING

    def native_class(self, head: str) -> type[PreTrainedModel] | None:
        """transformers' class for this type and head, or `None` if it has none."""
        if self.own_models:
            return self.own_models.get(head)
        name = self.heads[head][0].get(self.model_type) if head in self.heads else None
        if name is None:
            return None
        name = name if isinstance(name, str) else name[0]
        module = importlib.import_module(f"transformers.models.{model_type_to_module_name(self.model_type)}")
        return getattribute_from_module(module, name)

    def variant_class(self, head: str) -> type[PreTrainedModel]:
        """Our class for this head."""
        return getattr(hf_variants, self.heads[head][1])

    def head_of(self, class_name: str) -> str:
        """
        The head of a checkpoint, by the class that it names.

        transformers goes by `model_type` and loads whatever name stands there: capitals and underscores of earlier
        releases, of another type or of the checkpoint's own code (`Ernie4_5_ForCausalLM`). Of a class that is not here
        (`BertForPreTraining`, `ElectraForPreTraining`) it is the part that is: the language model, or the bare one.

        Raises:
            UnsupportedModelType: if no part of such a model is here.
        """
        named = (head for head in self.heads if self._is_called(head, class_name))
        head = next(named, None) or self._part_of(class_name) or self._head_by_ending(class_name)
        if head is None:
            classes = (self.native_class(head) for head in self.converted_heads)
            raise UnsupportedModelType(
                f"{class_name} has no counterpart here. Use the stock class of "
                f"transformers for it; what is converted is {' and '.join(c.__name__ for c in classes if c is not None)}."
            )
        return head

    def knows(self, class_name: str) -> bool:
        """Whether the name of a checkpoint's class says what it is: a class of transformers, or one named like those."""
        named = any(self._is_called(head, class_name) for head in self.heads)
        return (
            named or self.class_of_transformers(class_name) is not None or self._head_by_ending(class_name) is not None
        )

    def _is_called(self, head: str, class_name: str) -> bool:
        native = self.native_class(head)
        return native is not None and _plain(native.__name__) == _plain(class_name)

    def taken_part(self, class_name: str, head: str) -> str:
        """What to say where a class is converted as another one; empty for the class of this head."""
        if not class_name or self._is_called(head, class_name):
            return ""
        return f"the checkpoint is a {class_name}, of which {self.native_class(head).__name__} is what was taken"

    def class_of_transformers(self, class_name: str) -> type[PreTrainedModel] | None:
        """A class of this type by its name, whatever its head."""
        found = getattr(sys.modules[self.native_class(self.primary).__module__], class_name, None)
        return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None

    def _part_of(self, class_name: str) -> str | None:
        """Of another class of transformers, the head without a task of its own that has most of its tensors."""
        whole = self.class_of_transformers(class_name)
        if whole is None:
            return None
        config = self.config_map.native_class()
        shapes = {name: tensor.shape for name, tensor in empty_model(whole, config).state_dict().items()}
        sizes = {}
        for head in (head for head in self.converted_heads if head not in _CLASSIFIERS):
            part = empty_model(self.native_class(head), config)
            prefix = "" if part.base_model_prefix != whole.base_model_prefix else f"{whole.base_model_prefix}."
            tensors = {
                name if name in shapes else prefix + name: tensor.shape for name, tensor in part.state_dict().items()
            }
            # A class without a pooler may be the rest of one.
            if all("pooler" in name for name, shape in tensors.items() if shapes.get(name) != shape):
                sizes[head] = (len(tensors), part.can_generate() == whole.can_generate())
        return max(sizes, key=sizes.__getitem__, default=None)

    def _head_by_ending(self, class_name: str) -> str | None:
        """The head that the name of a class of other code speaks of."""
        if self.class_of_transformers(class_name) is not None:
            return None
        for head, endings in ENDINGS.items():
            if any(_plain(class_name).endswith(_plain(ending)) for ending in endings):
                return self.primary if head == "primary" else head if self.native_class(head) is not None else None
        return None

    def rules_for(self, head: str) -> list[Rule]:
        """The weight rules with the names that the classes of this head use."""
        if head == self.primary or {head, self.primary} == LANGUAGE_MODELS:
            return list(self.weights)
        own = self.head_weights.get(head, HEAD_WEIGHTS.get(head, ()))
        if self.primary == "base":
            return [*(rule.with_prefixes(self.inside.get(head, ""), "model.") for rule in self.weights), *own]
        native_prefix = self._native_prefix
        rules = [rule for rule in (*self.weights, *self.base_weights) if rule.is_inside("model.", native_prefix)]
        if head == "base":
            return [rule.without_prefixes(native_prefix, "model.") for rule in rules]
        usual = self.native_class(head).base_model_prefix + "." if native_prefix else ""
        inner = self.inside.get(head, usual)
        return [*(rule.with_native_prefix(native_prefix, inner) for rule in rules), *own]

    @property
    def _native_prefix(self) -> str:
        """What stands before the bare model's names inside the class of the primary head; T5 has nothing there."""
        prefix = self.native_class(self.primary).base_model_prefix + "."
        return prefix if any(name.startswith(prefix) for rule in self.weights for name in rule.native_names()) else ""

    def deviations_of(self, config: VariantConfig) -> list[Deviation]:
        """The deviations that affect this config."""
        return [deviation for deviation in self.deviations if deviation.applies(config)]

    def bound(self, config: VariantConfig) -> float:
        """The largest difference of logits in float32 that is due, relative to their spread: 0 for the same bits."""
        bounds = (each.bound for each in self.deviations_of(config) if not each.gradients_only)
        return max(bounds, default=0.0)


def variant_class(class_name: str) -> type[PreTrainedModel]:
    """One of our classes, by the name that `architectures` gives."""
    if all(class_name != ours for heads in (HEADS, SEQ2SEQ_HEADS) for _, ours in heads.values()):
        raise UnsupportedModelType(
            f"{class_name} is none of the models here. Correct `architectures` in the checkpoint's config.json."
        )
    return getattr(hf_variants, class_name)


def head_of_variant(class_name: str) -> str:
    """The head of one of our classes, by its name."""
    for heads in (HEADS, SEQ2SEQ_HEADS):
        for head, (_, ours) in heads.items():
            if ours == class_name:
                return head
    raise UnsupportedModelType(
        f"`architectures` is {class_name}, which has no native counterpart. Convert the model without its head."
    )


@cache
def known_families() -> dict[str, Family]:
    """Every family by model type, from the modules of `families`, whether or not this transformers has the type."""
    found = {}
    for module_info in pkgutil.iter_modules(families.__path__):
        if module_info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{families.__name__}.{module_info.name}")
        found |= {family.model_type: family for family in module.FAMILIES}
    return dict(sorted(found.items()))


@cache
def all_families() -> dict[str, Family]:
    """The families whose type this transformers has, by model type."""
    return {model_type: family for model_type, family in known_families().items() if family.is_installed}


def supported_model_types() -> list[str]:
    """The native model types that convert both ways, sorted."""
    return list(all_families())


def all_families_and_parts() -> list[Family]:
    """The same, with the stacks of encoder-decoders as families of their own."""
    return [*all_families().values(), *(part for family in all_families().values() for part in family.parts)]


def family_of(model_type: str) -> Family:
    """
    The family of a native model type.

    Raises:
        UnsupportedModelType: naming the mechanism that is missing here.
    """
    family = all_families().get(refusals.own_name(model_type))
    if family is None and model_type in known_families():
        raise UnsupportedModelType(
            f"transformers {transformers.__version__} has no type {model_type!r}, and another release has. Install the "
            "newest one."
        )
    if family is None:
        raise UnsupportedModelType(refusals.sentence(model_type, all_families()))
    return family


def family_and_head(config: PreTrainedConfig, class_name: str | None) -> tuple[Family, str]:
    """
    The family of a native config, and the head of the class that goes with it.

    Args:
        class_name: of the model, or what `architectures` says; without it, the family's usual head.
    """
    family, decoder = _family_and_decoder(config)
    if class_name is None:
        return family, family.primary
    for part in filter(None, (family.encoder, decoder)):
        for head in part.heads:
            if part._is_called(head, class_name):
                return part, head
    return family, family.head_of(class_name)


def _family_and_decoder(config: PreTrainedConfig) -> tuple[Family, Family | None]:
    """The family of a native config (of an encoder as a decoder, that), and, of two stacks, the decoder alone."""
    family = family_of(config.model_type)
    if family.is_seq2seq:
        return family, family.decoder
    return (family.decoder if family.decoder is not None and config.is_decoder else family), None


def family_with_head(config: PreTrainedConfig, head: str) -> Family:
    """The family of a native config, or its decoder alone, for which transformers has a class with this head."""
    family, decoder = _family_and_decoder(config)
    return decoder if decoder is not None and head in decoder.heads else family


def family_for(model_type: str, config: AnyVariantConfig) -> Family:
    """The family that a variant is to be expressed in: of an encoder-decoder's type, for one stack, that stack."""
    family = family_of(model_type)
    part = (family.decoder if config.is_causal else family.encoder) if isinstance(config, VariantConfig) else None
    return family if part is None else part


def read_config(folder: Path) -> PreTrainedConfig:
    """
    The config of a checkpoint folder, or in a file of any name; code that the checkpoint brings is never run.

    Raises:
        FileNotFoundError: if the folder has no config.json.
        UnsupportedModelType: if transformers does not know its model type.
        ConversionError: for a file or values of which no config can be made.
    """
    path = folder if folder.is_file() else folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG_NAME}. Give the folder of a checkpoint; one of another code base has to be converted "
            "first."
        )
    values = read_config_values(path)
    differ = block_configs.describes(values)
    if differ:
        values = block_configs.even(values)
    # The classes of transformers read a config without a type; AutoConfig does not.
    has_type = "model_type" in values
    model_type = values["model_type"] if has_type else _type_by_class(values)
    if not isinstance(model_type, str) or not model_type:
        raise UnsupportedModelType(
            f"{path} has no `model_type`, and no class of transformers in `architectures` that would say it. Write the "
            "model's type there."
        )
    family = all_families().get(model_type)
    own = None if family is None else family.own_config
    if own is None and model_type not in CONFIG_MAPPING:
        raise UnsupportedModelType(refusals.sentence(model_type))
    config_class = own or CONFIG_MAPPING[model_type]

    def without(key: str) -> PreTrainedConfig:
        return config_class.from_dict({name: value for name, value in values.items() if name != key})

    with reading(path, values, without):
        if differ:
            config = config_class.from_dict(values)
            config.name_or_path = str(folder)
            return config
        if own is not None or not has_type:
            return config_class.from_pretrained(folder)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _type_by_class(values: Mapping[str, Any]) -> str | None:
    """The model type of the class that wrote a config, if it is one of transformers."""
    for name in values.get("architectures") or ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is not None:
            return found.config_class.model_type
    return None


def is_variant(config: PreTrainedConfig) -> bool:
    return config.model_type in VARIANT_TYPES


def stacks(config: PreTrainedConfig) -> list[VariantConfig]:
    """The stacks of a variant's config: itself, or encoder and decoder."""
    return [config] if isinstance(config, VariantConfig) else [config.encoder, config.decoder]
