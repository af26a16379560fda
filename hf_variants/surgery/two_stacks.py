"""An encoder-decoder of one stack or two, and an embedder of a language model."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..conversion.folds import is_zero_centered
from ..conversion.opened_variant import open_variant
from ..model.axis import nobody_chose
from ..model.configuration_variant import VariantConfig
from ..model.configuration_variant_seq2seq import VariantSeq2SeqConfig
from ..model.modeling_variant_seq2seq import VariantForConditionalGeneration
from ..model.normalization import unchanged
from .kind import DropHead, ToEncoder
from .layers import outputs_of
from .operation import Operation
from .subject import APPROXIMATE, SAME_BITS, Outcome, Subject, SurgeryError
from .ties import HEAD
from .width import body_prefix


# Of the whole model, where it is one of two stacks.
OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class ToEncoderDecoder(Operation):
    """
    An encoder-decoder whose decoder is a language model (https://arxiv.org/abs/1907.12461). Its cross-attention is a copy of
    its self-attention.

    Args:
        cross: `"zero"`: what the copy adds is nothing until it is trained, so that the decoder computes what it did; or
            `"copy"`: it is as it is.
        encoder: the checkpoint whose stack is the encoder; by default the language model itself, with one embedding.
    """

    cross: str = "zero"
    encoder: str = ""

    def apply(self, subject: Subject) -> Subject:
        if self.cross not in ("zero", "copy"):
            raise SurgeryError(f"Cross-attention cannot begin as {self.cross!r}. Give zero or copy.")
        decoder = subject.config
        is_decoder = isinstance(decoder, VariantConfig) and decoder.is_causal and not decoder.add_cross_attention
        if not is_decoder or HEAD not in subject.skeleton.state_dict():
            raise SurgeryError(
                f"{subject.model_class.__name__} is no language model with one stack (`is_causal`, an LM head), which a "
                "decoder is made of. Take one."
            )
        other = subject if not self.encoder else Subject.of(open_variant(self.encoder))
        if not isinstance(other.config, VariantConfig):
            raise SurgeryError(
                f"{self.encoder} has two stacks itself. Take its encoder alone first (`--encoder-alone`)."
            )
        if other.config.vocab_size != decoder.vocab_size:
            raise SurgeryError(
                f"The encoder has a vocabulary of {other.config.vocab_size} tokens and the decoder one of "
                f"{decoder.vocab_size}, and one tokenizer cannot serve both. Make them equal first."
            )
        if other.config.hidden_size != decoder.hidden_size:
            raise SurgeryError(
                f"The encoder's stream has {other.config.hidden_size} channels and the decoder's {decoder.hidden_size}, so "
                "that no copy of the self-attention can read it. Make them equal first (`--hidden-size`)."
            )
        shown = other if not other.config.is_causal else ToEncoder().apply(other)
        stacks = {"encoder": _fields(shown.config) | {"pooler": False}, "decoder": _fields(decoder)}
        start = decoder.bos_token_id if decoder.bos_token_id is not None else decoder.pad_token_id
        whole = {name: getattr(decoder, name) for name in OF_THE_WHOLE}
        notes = []
        if whole["pad_token_id"] is None:
            # Labels that are not scored stand under it.
            end = decoder.eos_token_id
            whole["pad_token_id"] = end[0] if isinstance(end, list) else end if end is not None else start
            notes.append(f"`pad_token_id` is {whole['pad_token_id']}, the end of sequence, since there was none")
        with nobody_chose():
            config = VariantSeq2SeqConfig(
                **stacks,
                **whole,
                share_embeddings=not self.encoder,
                tie_word_embeddings=decoder.tie_word_embeddings,
                decoder_start_token_id=start,
            )
        config.dtype = decoder.dtype
        prefixes = {"decoder": body_prefix(subject), "encoder": body_prefix(other)}

        def tensor(name: str, before: Subject) -> torch.Tensor:
            inner = name.removeprefix("model.")
            stack, _, rest = inner.partition(".")
            if stack not in prefixes:
                # The shared embedding, or the head.
                own = name if name in before.skeleton.state_dict() else prefixes["decoder"] + rest
                return before.load(own)
            source = before
            if stack == "encoder" and self.encoder:
                source = (
                    other if before.source is not before.header_source else replace(other, source=other.header_source)
                )
            if inner in neutral:
                like = before.load(f"{prefixes['decoder']}{rest.split('cross_attn')[0]}self_attn.q_proj.weight")
                return like.new_full(built.stored[name].shape, neutral[inner])
            place = rest.replace("cross_attn", "self_attn")
            old = source.load(prefixes[stack] + place)
            zeros = ends.get(rest.split(".")[1] if rest.startswith("layers.") else "", {})
            leaf = rest.partition(".")[2].partition(".")[2]
            return torch.full_like(old, zeros[leaf]) if leaf in zeros else old

        outcome = Outcome("being made", APPROXIMATE)
        # Built without tensors first, to see what cross-attention ends with.
        built = replace(subject, config=config, model_class=VariantForConditionalGeneration)
        ends: dict[str, dict[str, float]] = {}
        is_same = self.cross == "zero"
        for number, block in enumerate(built.blocks("decoder")):
            if self.cross == "zero":
                found = outputs_of(block)
                ends[str(number)] = {leaf: value for leaf, value in found.items() if leaf.startswith("cross_attn")}
            is_same = is_same and block.cross_attn_post_norm is unchanged and not block.residual_from_norm
        # What self-attention has no counterpart of: the norm that a first layer may lack.
        neutral: dict[str, float] = {}
        for name in (name.removeprefix("model.") for name in built.stored if ".cross_attn" in name):
            if (
                prefixes["decoder"] + name.removeprefix("decoder.").replace("cross_attn", "self_attn")
                in subject.stored
            ):
                continue
            owner, _, leaf = name.rpartition(".")
            norm = built.skeleton.get_submodule(f"model.{owner}")
            neutral[name] = 1.0 if leaf == "weight" and not is_zero_centered(norm) else 0.0
        source_of = (
            f"the stack of {Path(self.encoder).name}" if self.encoder else "the language model itself, which sees all"
        )
        how = "adds nothing at first" if self.cross == "zero" else "is a copy of self-attention"
        note = "the decoder computes what it did, whatever is encoded" if is_same else "both stacks want training"
        outcome = Outcome(
            f"an encoder-decoder; the encoder is {source_of}; cross-attention {how}",
            SAME_BITS if is_same else APPROXIMATE,
            (note, *notes),
        )
        return subject.changed(outcome, tensor, config=config, model_class=VariantForConditionalGeneration, apart=())


def _fields(config: VariantConfig) -> dict[str, Any]:
    """A stack's, without what the whole has."""
    left = {
        "model_type",
        "native_leftovers",
        "argument_order",
        "tie_word_embeddings",
        "transformers_version",
        "architectures",
        "dtype",
    }
    return {name: value for name, value in config.to_dict().items() if name not in left}


@dataclass(frozen=True)
class ToEmbedder(Operation):
    """
    A language model or encoder as Sentence Transformers loads one: no head, and a pooling module beside it.

    Args:
        pooling: `"mean"`, of all tokens, which then see each other (`ToEncoder`), or `"last"`, the last token of a
            decoder that stays one.
    """

    pooling: str = "mean"

    def apply(self, subject: Subject) -> Subject:
        if self.pooling not in ("mean", "last"):
            raise SurgeryError(f"An embedder cannot pool {self.pooling!r}. Give mean or last.")
        if not isinstance(subject.config, VariantConfig):
            raise SurgeryError("The model is an encoder-decoder. Take its encoder first (`--encoder-alone`).")
        if self.pooling == "last" and not subject.config.is_causal:
            raise SurgeryError(
                "Of an encoder (`is_causal` is False) every token sees all, so that the last is no summary. Give mean."
            )
        steps: list[Operation] = []
        if self.pooling == "mean" and subject.config.is_causal:
            steps = [ToEncoder()]
        elif subject.model_class.__name__ != "VariantModel":
            steps = [DropHead()]
        for step in steps:
            subject = step.apply(subject)
        kind = "sentence_transformers.models"
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
        ]
        pooling = {"word_embedding_dimension": subject.config.hidden_size, "pooling_mode_cls_token": False}
        pooling |= {"pooling_mode_mean_tokens": self.pooling == "mean", "pooling_mode_max_tokens": False}
        pooling |= {"pooling_mode_lasttoken": self.pooling == "last"}
        length = {"max_seq_length": min(512, subject.context), "do_lower_case": False}
        written = {"modules.json": modules, "1_Pooling/config.json": pooling, "sentence_bert_config.json": length}
        files = tuple((name, json.dumps(content, indent=2) + "\n") for name, content in written.items())
        outcome = Outcome(
            f"an embedder, by the {self.pooling} of the tokens", SAME_BITS, ("it wants training to be a good one",)
        )
        return replace(subject, files=files, outcomes=(*subject.outcomes, outcome))
