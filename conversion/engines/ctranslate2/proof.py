"""Whether a CTranslate2 model computes what ours does: both run on the same tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ...verification import Check
from ..samples import (
    BOUND,
    NEW_TOKENS,
    Bound,
    compare_hidden,
    compare_scores,
    limit_of,
    rounding_of,
    special_of,
    stacks_of,
    texts_of,
)
from .kernels import ctranslate2_package


INTEGERS = "int8_float32"
# Below what any model gives: the engine's score of a token that may not come.
SUPPRESSED = -1e30
# By token, in any order: the end of the text, the unknown token, padding.
MAY_BE_SUPPRESSED = 3


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
            bound = Bound(None, 4 * rounding_of(model))
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
    config, words, limit = model.config, tokens["target"], limit_of(model.base_model)
    checks = []
    texts = texts_of(config.vocab_size, limit, special_of(config))
    for text in texts:
        theirs = torch.from_numpy(np.array(generator.forward_batch([text]))[0])
        checks.append(
            compare_scores(f"scores of {len(text)} tokens", model(torch.tensor([text])).logits[0], theirs, bound)
        )
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
    encoder, decoder = stacks_of(model)
    new = min(NEW_TOKENS, limit_of(decoder) - 1)
    start = config.decoder_start_token_id
    first = 1 % len(words) if start is None else start
    index_of = {token: index for index, token in enumerate(words)}
    checks = []
    for source in texts_of(config.encoder.vocab_size, limit_of(encoder), special_of(config)):
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
    texts = texts_of(config.vocab_size, limit_of(stack), special_of(config))
    checks = []
    for text in texts:
        types = [index % max(config.type_vocab_size, 1) for index in range(len(text))]
        theirs = encoder.forward_batch([text], **({"token_type_ids": [types]} if config.type_vocab_size else {}))
        ours = stack(torch.tensor([text]), token_type_ids=torch.tensor([types]) if config.type_vocab_size else None)
        name, hidden = f"hidden states of {len(text)} tokens", torch.from_numpy(np.array(theirs.last_hidden_state))
        checks.append(compare_hidden(name, ours.last_hidden_state, hidden, bound))
        if stack.pooler is not None and theirs.pooler_output is None:
            checks.append(Check("pooled vector", False, "there is none"))
        elif stack.pooler is not None:
            name, pooled = f"pooled vector of {len(text)} tokens", torch.from_numpy(np.array(theirs.pooler_output))
            checks.append(compare_hidden(name, ours.pooler_output, pooled, bound))
    # One batch, with padding.
    batch = torch.from_numpy(np.array(encoder.forward_batch(texts).last_hidden_state))
    for row, text in enumerate(texts):
        hidden = stack(torch.tensor([text])).last_hidden_state[0]
        checks.append(compare_hidden(f"hidden states of row {row} in a batch", hidden, batch[row, : len(text)], bound))
    return checks


def _steps(name: str, ours: torch.Tensor, theirs: torch.Tensor, ids: list[int], bound: Bound) -> Check:
    """Scores at every step, and whether ours choose the same tokens, but for a tie within the bound."""
    allowed = (theirs > SUPPRESSED).all(dim=0)
    if int((~allowed).sum()) > MAY_BE_SUPPRESSED:
        return Check(name, False, f"{int((~allowed).sum())} tokens without a score")
    check = compare_scores(name, ours[:, allowed], theirs[:, allowed], bound)
    chosen = ours.gather(1, torch.tensor(ids)[:, None])[:, 0]
    behind = float((ours[:, allowed].max(dim=1).values - chosen).max() / (ours.std().item() or 1.0))
    if check.ok and bound.rounded is None and behind > 2 * bound.scores:
        return Check(name, False, f"a token that ours put {behind:.1e} of their spread behind the first")
    return check
