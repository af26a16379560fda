"""Tokens on which a model of ours and an engine's are run side by side, and how far their results may be apart."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..verification import Check, relative_error


# Largest difference of scores, in their standard deviations, where nothing is rounded to fewer bits.
BOUND = 1e-4
# In nats, on average over positions, between the distributions of next tokens; and of hidden states, the root mean square
# of the differences in standard deviations.
KL_BOUNDS = {"int8": 0.05, "int16": 1e-3, "float16": 1e-3, "bfloat16": 0.02}
HIDDEN_BOUNDS = {"int8": 0.1, "int16": 1e-2, "float16": 1e-2, "bfloat16": 0.05}
LENGTHS = (1, 7, 48)
NEW_TOKENS = 12


@dataclass(frozen=True)
class Bound:
    """
    How far the engine may be off.

    Attributes:
        rounded: to what its weights are rounded; `None` for nothing.
        scores: largest difference in their standard deviations, where nothing is rounded.
    """

    rounded: str | None
    scores: float = BOUND


def stacks_of(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Encoder and decoder, or the one there is."""
    base = model.base_model
    return [base.encoder, base.decoder] if model.config.is_encoder_decoder else [base]


def limit_of(stack: PreTrainedModel) -> int:
    """The longest text."""
    return stack.config.max_position_embeddings - stack.first_position


def rounding_of(model: PreTrainedModel) -> float:
    """How far float32 is off float64 on random tokens, in standard deviations of the scores."""
    stacks, exact = stacks_of(model), copy.deepcopy(model).double()
    errors = []
    for text in texts_of(
        min(s.config.vocab_size for s in stacks), min(map(limit_of, stacks)), special_of(model.config)
    ):
        inputs = {"input_ids": torch.tensor([text])}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        errors.append(relative_error(model(**inputs)[0], exact(**inputs)[0]))
    return max(errors)


def texts_of(vocab_size: int, limit: int, avoid: set[int], lengths: Iterable[int] = LENGTHS) -> list[list[int]]:
    """Random token ids of several lengths, `limit` at most, without special ones."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([index for index in range(vocab_size) if index not in avoid] or range(vocab_size))
    return [ids[torch.randint(0, len(ids), (min(length, limit),), generator=generator)].tolist() for length in lengths]


def special_of(config: Any) -> set[int]:
    ids = [config.bos_token_id, config.eos_token_id, config.pad_token_id]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in ids]
    return {index for values in lists for index in values if index is not None}


def compare_scores(name: str, ours: torch.Tensor, theirs: torch.Tensor, bound: Bound) -> Check:
    if bound.rounded is None:
        error = relative_error(theirs, ours)
        detail = f"largest difference {error:.1e} of their spread (bound {bound.scores:.0e})"
        return Check(name, error <= bound.scores, detail)
    mean, most = divergence(ours, theirs), KL_BOUNDS[bound.rounded]
    return Check(name, mean <= most, f"KL {mean:.1e} nats on average (bound {most:g})")


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """KL(ours || theirs) in nats, on average over positions: (positions, vocabulary) twice."""
    a, b = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def compare_hidden(name: str, ours: torch.Tensor, theirs: torch.Tensor, bound: Bound) -> Check:
    if bound.rounded is None:
        return compare_scores(name, ours, theirs, bound)
    error = float((ours.double() - theirs.double()).pow(2).mean().sqrt() / (ours.double().std() or 1.0))
    most = HIDDEN_BOUNDS[bound.rounded]
    return Check(name, error <= most, f"root mean square difference {error:.1e} of their spread (bound {most:g})")
