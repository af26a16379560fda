"""How far a changed model is from its source: on random tokens, and on a text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .subject import Subject, SurgeryError


# Of the random inputs.
SEQUENCES, LENGTH = 2, 64
# Of a text: tokens at a time, and characters in all.
WINDOW, CHARACTERS = 512, 60_000


@dataclass(frozen=True)
class Difference:
    """
    Outputs of the source and of the result on the same tokens.

    Attributes:
        of: what was compared: `"logits"` or `"hidden states"`.
        same_bits: whether all are equal.
        relative: the largest difference, in standard deviations of the source's.
    """

    of: str
    same_bits: bool
    relative: float

    def __str__(self) -> str:
        return (
            f"{self.of} have the same bits"
            if self.same_bits
            else f"{self.of} differ by {self.relative:.1e} of their spread"
        )


@dataclass(frozen=True)
class OnText:
    """
    Both models on a text.

    Attributes:
        tokens: predicted, by the source.
        perplexity_before, perplexity_after: per token of the source's tokenizer; the result's tokens may be others, and its
            perplexity is that of the same text, for as many tokens.
        kl: Kullback-Leibler divergence of the result's next-token distribution from the source's, in nats per token; `None`
            where they speak of other tokens.
    """

    tokens: int
    perplexity_before: float
    perplexity_after: float
    kl: float | None

    def __str__(self) -> str:
        kl = "" if self.kl is None else f", KL to the source {self.kl:.4g} nats per token"
        before, after = self.perplexity_before, self.perplexity_after
        return f"perplexity {before:.4g} before and {after:.4g} after{kl} ({self.tokens} tokens)"


def difference(before: Subject, after: Subject) -> Difference | None:
    """
    The two on random tokens that both have, or `None` where they have no output in common.

    One model is in memory at a time.
    """
    ids, old_ids, columns = _random_tokens(before, after)
    kind = "logits" if _has_logits(before) and _has_logits(after) else "hidden states"
    first = _outputs(before, old_ids, kind)
    second = _outputs(after, ids, kind)
    if kind == "logits" and columns is not None:
        kept = [new for new, old in enumerate(columns) if old >= 0]
        first, second = first[..., [columns[new] for new in kept]], second[..., kept]
    if first.shape != second.shape:
        return None
    spread = first.double().std().item() or 1.0
    relative = (first.double() - second.double()).abs().max().item() / spread
    return Difference(kind, torch.equal(first, second), relative)


def _has_logits(subject: Subject) -> bool:
    return "CausalLM" in subject.model_class.__name__ or any(
        part in subject.model_class.__name__ for part in ("MaskedLM", "ConditionalGeneration")
    )


def _random_tokens(before: Subject, after: Subject) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...] | None]:
    """Token ids of the result and of the source, and the source's token of every one of the result's."""
    generator = torch.Generator().manual_seed(0)
    stack = next(iter(before.stacks.values()))
    length = min(LENGTH, before.context, after.context)
    columns = after.tokens
    candidates = torch.tensor(
        [new for new, old in enumerate(columns) if old >= 0] if columns else range(stack.vocab_size)
    )
    padding = {before.config.pad_token_id, after.config.pad_token_id}
    kept = [token for token in candidates.tolist() if token not in padding] or candidates.tolist()
    choice = torch.randint(len(kept), (SEQUENCES, length), generator=generator)
    ids = torch.tensor(kept)[choice]
    return ids, torch.tensor(columns)[ids] if columns else ids, columns


@torch.no_grad()
def _outputs(subject: Subject, ids: torch.Tensor, kind: str) -> torch.Tensor:
    model = subject.to_measure()
    if kind == "logits":
        arguments = {"decoder_input_ids": ids} if subject.config.is_encoder_decoder else {}
        return model(input_ids=ids, **arguments).logits
    stack = model.base_model.encoder if subject.config.is_encoder_decoder else model.base_model
    return stack(input_ids=ids).last_hidden_state


@torch.no_grad()
def on_text(before: Subject, after: Subject, text: str, tokenizers: tuple[Any, Any]) -> OnText | None:
    """
    Both language models, in memory together, on the beginning of a text; `None` for models that predict no next token.

    Args:
        tokenizers: of the source and of the result.

    Raises:
        SurgeryError: if there is no tokenizer, or nothing to predict.
    """
    if not all(subject.model_class.__name__ == "VariantForCausalLM" for subject in (before, after)):
        return None
    if any(isinstance(tokenizer, str) or tokenizer is None for tokenizer in tokenizers):
        raise SurgeryError("There is no tokenizer that could read the text. Leave the text out.")
    first, second = (
        tokenizer(text[:CHARACTERS], add_special_tokens=False, verbose=False).input_ids for tokenizer in tokenizers
    )
    size = min(WINDOW, before.context, after.context)
    if min(len(first), len(second)) < 2:
        raise SurgeryError("The text is too short to predict anything of it. Give a longer one.")
    source, result = before.to_measure(), after.to_measure()
    if first != second or before.config.vocab_size != after.config.vocab_size:
        count = sum(window.shape[1] - 1 for window in _windows(first, size))
        nats = [
            sum(_nats(_predictions(model, window), window) for window in _windows(ids, size))
            for model, ids in ((source, first), (result, second))
        ]
        return OnText(count, math.exp(nats[0] / count), math.exp(nats[1] / count), None)
    count, nats, kl = 0, [0.0, 0.0], 0.0
    for window in _windows(first, size):
        logs = [_predictions(model, window) for model in (source, result)]
        count += window.shape[1] - 1
        nats = [total + _nats(log, window) for total, log in zip(nats, logs)]
        kl += F.kl_div(logs[1], logs[0], log_target=True, reduction="sum").item()
    return OnText(count, math.exp(nats[0] / count), math.exp(nats[1] / count), kl / count)


def _predictions(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """(1, length) -> log-probabilities of all tokens but the first, (length - 1, vocabulary)."""
    return model(input_ids=window, use_cache=False).logits[0, :-1].float().log_softmax(-1)


def _nats(logs: torch.Tensor, window: torch.Tensor) -> float:
    return -logs.gather(-1, window[0, 1:, None]).double().sum().item()


def _windows(ids: list[int], size: int) -> Iterator[torch.Tensor]:
    for start in range(0, len(ids), size):
        window = ids[start : start + size]
        if len(window) > 1:
            yield torch.tensor([window])
