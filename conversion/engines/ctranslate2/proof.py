"""Whether a CTranslate2 model computes what ours does: both run on the same tokens."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ...verification import Check, relative_error
from .kernels import ctranslate2_package


# Largest difference of scores, in their standard deviations, where nothing is rounded to fewer bits.
BOUND = 1e-4
# In nats, on average over positions, between the distributions of next tokens; and of hidden states, the root mean square
# of the differences in standard deviations.
KL_BOUNDS = {"int8": 0.05, "int16": 1e-3, "float16": 1e-3, "bfloat16": 0.02}
HIDDEN_BOUNDS = {"int8": 0.1, "int16": 1e-2, "float16": 1e-2, "bfloat16": 0.05}
INTEGERS = "int8_float32"
LENGTHS = (1, 7, 48)
NEW_TOKENS = 12
# Below what any model gives: the engine's score of a token that may not come.
SUPPRESSED = -1e30
# By token, in any order: the end of the text, the unknown token, padding.
MAY_BE_SUPPRESSED = 3


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


def check(folder: Path, model: PreTrainedModel, tokens: dict[str, list[str]], rounded: str | None) -> list[Check]:
    """
    Compare a written model with ours, both in float32, so that of an int8 model the weights alone are rounded.

    Args:
        folder: of the written model.
        model: ours, in float32, with the values that were written.
        tokens: by `"source"` and `"target"`, the token of every id.
        rounded: to what the writing rounded the weights: `"int8"`, ...; `None` for nothing.
    """
    with torch.no_grad():
        checks = _compare(folder, model, tokens, Bound(rounded))
        if rounded is None and not all(check.ok for check in checks):
            # Weights that magnify rounding do so here as there: what float32 loses beside float64 tells how much.
            bound = Bound(None, 4 * _rounding(model))
            checks = _compare(folder, model, tokens, bound) if bound.scores > BOUND else checks
    return checks


def integers(folder: Path, model: PreTrainedModel, tokens: dict[str, list[str]]) -> list[str]:
    """
    How far the engine is off where it computes in int8, which rounds every activation, too: notes and no checks, since
    that is the model's nature and not of what was written.
    """
    if INTEGERS not in ctranslate2_package().get_supported_compute_types("cpu"):
        return []
    with torch.no_grad():
        checks = _compare(folder, model, tokens, Bound("int8"), INTEGERS)
    return [
        f"Computed in int8, activations rounded as well: {check.name}: {check.detail.split(' (')[0]}"
        for check in checks
    ]


def _compare(
    folder: Path, model: PreTrainedModel, tokens: dict[str, list[str]], bound: Bound, compute: str = "float32"
) -> list[Check]:
    engine, config = ctranslate2_package(), model.config
    kind = "Translator" if config.is_encoder_decoder else "Generator" if config.is_causal else "Encoder"
    runner = getattr(engine, kind)(str(folder), compute_type=compute, intra_threads=torch.get_num_threads())
    compare = {"Translator": _compare_pair, "Generator": _compare_decoder, "Encoder": _compare_encoder}[kind]
    return compare(runner, model, tokens, bound)


def _stacks(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Encoder and decoder, or the one there is."""
    return [model.model.encoder, model.model.decoder] if model.config.is_encoder_decoder else [model.base_model]


def _limit(stack: PreTrainedModel) -> int:
    """The longest text."""
    return stack.config.max_position_embeddings - stack.first_position


def _rounding(model: PreTrainedModel) -> float:
    """How far float32 is off float64 on random tokens, in standard deviations of the scores."""
    stacks, exact = _stacks(model), copy.deepcopy(model).double()
    errors = []
    for text in _texts(min(s.config.vocab_size for s in stacks), min(map(_limit, stacks)), _special(model.config)):
        inputs = {"input_ids": torch.tensor([text])}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        errors.append(relative_error(model(**inputs)[0], exact(**inputs)[0]))
    return max(errors)


def _texts(vocab_size: int, limit: int, avoid: set[int]) -> list[list[int]]:
    """Random token ids of several lengths, without special ones."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([index for index in range(vocab_size) if index not in avoid] or range(vocab_size))
    return [ids[torch.randint(0, len(ids), (min(length, limit),), generator=generator)].tolist() for length in LENGTHS]


def _special(config: Any) -> set[int]:
    ids = [config.bos_token_id, config.eos_token_id, config.pad_token_id]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in ids]
    return {index for values in lists for index in values if index is not None}


def _greedy(config: Any, tokens: list[str]) -> dict[str, Any]:
    """What has the engine take the likeliest tokens, and tell its scores."""
    return {
        "return_logits_vocab": True,
        "end_token": [tokens[0]],
        # What a text should not have: ours may take it for padding.
        "suppress_sequences": [] if config.pad_token_id is None else [[tokens[config.pad_token_id]]],
    }


def _logits(result: Any) -> torch.Tensor:
    """(steps, vocabulary) of the first hypothesis."""
    return torch.stack([torch.from_numpy(np.array(step)) for step in result.logits[0]])


def _compare_decoder(
    generator: Any, model: PreTrainedModel, tokens: dict[str, list[str]], bound: Bound
) -> list[Check]:
    config, words, limit = model.config, tokens["target"], _limit(model.base_model)
    checks = []
    texts = _texts(config.vocab_size, limit, _special(config))
    for text in texts:
        theirs = torch.from_numpy(np.array(generator.forward_batch([text]))[0])
        checks.append(_scores(f"scores of {len(text)} tokens", model(torch.tensor([text])).logits[0], theirs, bound))
    for text in texts:
        prompt = text[: max(1, limit - NEW_TOKENS)]
        new = min(NEW_TOKENS, limit - len(prompt))
        if new < 1:
            continue
        result = generator.generate_batch(
            [[words[index] for index in prompt]], max_length=new, min_length=new, include_prompt_in_result=False,
            **_greedy(config, words),
        )[0]  # fmt: skip
        ids = result.sequences_ids[0][:new]
        ours = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : len(prompt) - 1 + len(ids)]
        name = f"{len(ids)} greedy tokens after {len(prompt)}, step by step"
        checks.append(_steps(name, ours, _logits(result)[: len(ids)], ids, bound))
    return checks


def _compare_pair(translator: Any, model: PreTrainedModel, tokens: dict[str, list[str]], bound: Bound) -> list[Check]:
    config, words = model.config, tokens["target"]
    encoder, decoder = _stacks(model)
    new = min(NEW_TOKENS, _limit(decoder) - 1)
    start = config.decoder_start_token_id
    first = 1 % len(words) if start is None else start
    index_of = {token: index for index, token in enumerate(words)}
    checks = []
    for source in _texts(config.encoder.vocab_size, _limit(encoder), _special(config)):
        result = translator.translate_batch(
            [[tokens["source"][index] for index in source]], target_prefix=[[words[first]]] if start is None else None,
            beam_size=1, max_decoding_length=new, min_decoding_length=new, **_greedy(config, words),
        )[0]  # fmt: skip
        ids = [index_of[token] for token in result.hypotheses[0]][:new]
        inputs = torch.tensor([[first, *ids[:-1]]])
        ours = model(input_ids=torch.tensor([source]), decoder_input_ids=inputs).logits[0]
        name = f"{len(ids)} greedy tokens from {len(source)}, step by step"
        checks.append(_steps(name, ours, _logits(result)[: len(ids)], ids, bound))
    return checks


def _compare_encoder(encoder: Any, model: PreTrainedModel, tokens: dict[str, list[str]], bound: Bound) -> list[Check]:
    config, stack = model.config, model.base_model
    texts = _texts(config.vocab_size, _limit(stack), _special(config))
    checks = []
    for text in texts:
        types = [index % max(config.type_vocab_size, 1) for index in range(len(text))]
        theirs = encoder.forward_batch([text], **({"token_type_ids": [types]} if config.type_vocab_size else {}))
        ours = stack(torch.tensor([text]), token_type_ids=torch.tensor([types]) if config.type_vocab_size else None)
        name, hidden = f"hidden states of {len(text)} tokens", torch.from_numpy(np.array(theirs.last_hidden_state))
        checks.append(_hidden(name, ours.last_hidden_state, hidden, bound))
        if stack.pooler is not None and theirs.pooler_output is None:
            checks.append(Check("pooled vector", False, "there is none"))
        elif stack.pooler is not None:
            name, pooled = f"pooled vector of {len(text)} tokens", torch.from_numpy(np.array(theirs.pooler_output))
            checks.append(_hidden(name, ours.pooler_output, pooled, bound))
    # One batch, with padding.
    batch = torch.from_numpy(np.array(encoder.forward_batch(texts).last_hidden_state))
    for row, text in enumerate(texts):
        hidden = stack(torch.tensor([text])).last_hidden_state[0]
        checks.append(_hidden(f"hidden states of row {row} in a batch", hidden, batch[row, : len(text)], bound))
    return checks


def _scores(name: str, ours: torch.Tensor, theirs: torch.Tensor, bound: Bound) -> Check:
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


def _steps(name: str, ours: torch.Tensor, theirs: torch.Tensor, ids: list[int], bound: Bound) -> Check:
    """Scores at every step, and whether ours choose the same tokens, but for a tie within the bound."""
    allowed = (theirs > SUPPRESSED).all(dim=0)
    if int((~allowed).sum()) > MAY_BE_SUPPRESSED:
        return Check(name, False, f"{int((~allowed).sum())} tokens without a score")
    check = _scores(name, ours[:, allowed], theirs[:, allowed], bound)
    chosen = ours.gather(1, torch.tensor(ids)[:, None])[:, 0]
    behind = float((ours[:, allowed].max(dim=1).values - chosen).max() / (ours.std().item() or 1.0))
    if check.ok and bound.rounded is None and behind > 2 * bound.scores:
        return Check(name, False, f"a token that ours put {behind:.1e} of their spread behind the first")
    return check


def _hidden(name: str, ours: torch.Tensor, theirs: torch.Tensor, bound: Bound) -> Check:
    if bound.rounded is None:
        return _scores(name, ours, theirs, bound)
    error = float((ours.double() - theirs.double()).pow(2).mean().sqrt() / (ours.double().std() or 1.0))
    most = HIDDEN_BOUNDS[bound.rounded]
    return Check(name, error <= most, f"root mean square difference {error:.1e} of their spread (bound {most:g})")
