"""What kind of model it is: a decoder as an encoder, a model without its head or with a new one, one stack of two."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..conversion.family import variant_class
from ..model.configuration_variant import VariantConfig
from .operation import Operation
from .subject import APPROXIMATE, SAME_BITS, Outcome, Subject, SurgeryError, edited


ENCODERS = {"base": "VariantModel", "masked-lm": "VariantForMaskedLM"}


@dataclass(frozen=True)
class ToEncoder(Operation):
    """
    A decoder as an encoder (`is_causal=False`): every token sees all others, with the decoder's weights
    (https://arxiv.org/abs/2404.05961).

    Args:
        head: `"base"`, without one, or `"masked-lm"`, with the language model's.
    """

    head: str = "base"

    def apply(self, subject: Subject) -> Subject:
        config = _one_stack(subject)
        if not config.is_causal:
            raise SurgeryError("The model is an encoder already (`is_causal` is False). Leave `--to-encoder` out.")
        if config.add_cross_attention:
            raise SurgeryError(
                "The decoder attends to an encoder (`add_cross_attention`), which an encoder cannot. Take another model."
            )
        if self.head not in ENCODERS:
            raise SurgeryError(f"There is no encoder with the head {self.head!r}. Give {' or '.join(ENCODERS)}.")
        if self.head == "masked-lm" and "lm_head.weight" not in subject.skeleton.state_dict():
            raise SurgeryError(f"{subject.model_class.__name__} has no LM head to take over. Give base.")
        changes: dict[str, Any] = {"is_causal": False, "native_leftovers": None}
        notes = ["the weights are copies; what they compute is new, and wants training"]
        if config.classifier_pooling == "last":
            changes["classifier_pooling"] = "mean"
            notes.append("`classifier_pooling` is mean: the last token is no summary any more")
        if config.position_embedding_type == "alibi":
            # The others are equal to it in a decoder alone.
            changes["alibi_form"] = "distance"
        if config.position_embedding_type == "relative_bias":
            notes.append("an encoder shares its buckets of relative positions among both directions")
        if "sliding_attention" in config.layer_types:
            notes.append("a sliding window now reaches to both sides")
        what = f"the decoder is an encoder ({self.head})"
        outcome = Outcome(what, APPROXIMATE, tuple(notes))
        return _as_class(subject, ENCODERS[self.head], edited(config, **changes), outcome)


@dataclass(frozen=True)
class DropHead(Operation):
    """The model without its head: hidden states, as an embedder reads them."""

    def apply(self, subject: Subject) -> Subject:
        two = not isinstance(subject.config, VariantConfig)
        name = "VariantSeq2SeqModel" if two else "VariantModel"
        if subject.model_class.__name__ == name:
            raise SurgeryError(f"{name} has no head. Leave `--drop-head` out.")
        outcome = Outcome(f"without the head of {subject.model_class.__name__}", SAME_BITS)
        return _as_class(subject, name, subject.config, outcome)


@dataclass(frozen=True)
class ToClassifier(Operation):
    """
    A sequence classifier with a new head, which is drawn at random, on the model's body.

    Args:
        labels: number of classes.
        seed: of the new weights.
    """

    labels: int
    seed: int = 0

    def apply(self, subject: Subject) -> Subject:
        config = _one_stack(subject)
        if self.labels < 1:
            raise SurgeryError(f"A classifier needs at least one label, not {self.labels}.")
        outcome = Outcome(
            f"a sequence classifier of {self.labels} labels, whose head is new", SAME_BITS, ("the body is copied",)
        )
        names = {number: f"LABEL_{number}" for number in range(self.labels)}
        labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        made = edited(config, **labels)
        return _as_class(subject, "VariantForSequenceClassification", made, outcome, seed=self.seed)


@dataclass(frozen=True)
class EncoderAlone(Operation):
    """The encoder of an encoder-decoder, by itself."""

    def apply(self, subject: Subject) -> Subject:
        if isinstance(subject.config, VariantConfig):
            raise SurgeryError("The model has one stack. Take an encoder-decoder, or leave `--encoder-alone` out.")
        whole = subject.config
        # Without effect here, and what native encoders say of the model that they are from.
        kept = {"native_leftovers": whole.native_leftovers, "tie_word_embeddings": whole.tie_word_embeddings}
        config = edited(whole.encoder, **kept)
        config.dtype = whole.dtype
        config._attn_implementation = whole._attn_implementation
        outcome = Outcome("the encoder alone", SAME_BITS)
        return _as_class(subject, "VariantModel", config, outcome, prefix=subject.prefix("encoder"))


def _one_stack(subject: Subject) -> VariantConfig:
    if not isinstance(subject.config, VariantConfig):
        raise SurgeryError("The model is an encoder-decoder. Take its encoder first (`--encoder-alone`).")
    return subject.config


def _as_class(
    subject: Subject, name: str, config: Any, outcome: Outcome, prefix: str | None = None, seed: int | None = None
) -> Subject:
    """
    The subject as another of our classes.

    Args:
        prefix: of the body's tensors now.
        seed: draw what is not there; by default that is refused, but for a pooler, which is left out.
    """
    model_class: type[PreTrainedModel] = variant_class(name)
    body = prefix if prefix is not None else _body(subject.model_class)
    there = {*subject.skeleton.state_dict(), *subject.apart}

    def old_name(new: str) -> str | None:
        """A tensor of the body, or one that heads of both classes have."""
        inner = new.removeprefix(_body(model_class))
        return next((name for name in (body + inner, new) if name in there), None)

    after = subject.changed(outcome, lambda name, before: before.load(name), config=config, model_class=model_class)
    missing = {name for name in after.stored if old_name(name) is None}
    if any(".pooler." in f".{name}" for name in missing):
        config = edited(config, pooler=False)
        after = subject.changed(outcome, config=config, model_class=model_class)
        missing = {name for name in after.stored if old_name(name) is None}
    if missing and seed is None:
        raise SurgeryError(f"{subject.model_class.__name__} has no {sorted(missing)[0]}, which {name} needs.")
    dtype = subject.header_source(next(iter(subject.stored))).dtype

    def tensor(new: str, before: Subject) -> torch.Tensor:
        if new not in missing:
            return before.load(old_name(new) or new)
        shape = after.stored[new].shape
        if new.endswith("bias"):
            return torch.zeros(shape, dtype=dtype)
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        generator = torch.Generator().manual_seed(seed or 0)
        return (torch.randn(shape, generator=generator) * config.initializer_range).to(dtype)

    return subject.changed(outcome, tensor, config=config, model_class=model_class, apart=())


def _body(model_class: type[PreTrainedModel]) -> str:
    """What the names of the body's tensors begin with."""
    is_body = model_class.__name__ in ("VariantModel", "VariantSeq2SeqModel")
    return "" if is_body else f"{model_class.base_model_prefix}."
