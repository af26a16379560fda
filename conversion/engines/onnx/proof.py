"""Whether the graphs compute what our model does: both run on the same tokens, whole, padded and step by step."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...verification import Check
from ..samples import (
    BOUND,
    LENGTHS,
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
from .graphs import BATCH, DECODER, ENCODER, MODEL, WITH_PAST, Graph, graphs_of
from .package import onnx_packages


class Session:
    """A graph in onnxruntime, tensors in and out."""

    def __init__(self, folder: Path, graph: Graph):
        *_, runtime = onnx_packages()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # It warns of what it folds.
        options.log_severity_level = 3
        self.session = runtime.InferenceSession(str(folder / graph.file), options, ["CPUExecutionProvider"])
        self.taken = {each.name for each in self.session.get_inputs()}
        self.graph = graph

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """What comes out, by name; inputs that the graph does not take are passed over."""
        fed = {name: tensor.contiguous().numpy() for name, tensor in inputs.items() if name in self.taken}
        names = [tensor.name for tensor in self.graph.outputs]
        return dict(zip(names, map(torch.from_numpy, self.session.run(names, fed))))

    def empty(self, rows: int) -> dict[str, torch.Tensor]:
        """A past of length 0."""
        past = [tensor for tensor in self.graph.inputs if tensor.name.startswith("past_key_values")]
        return {
            tensor.name: torch.zeros([rows if dim == BATCH else dim if isinstance(dim, int) else 0 for dim in tensor.shape])
            for tensor in past
        }  # fmt: skip


def past_of(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The keys and values that came out, under the names that they go in by."""
    return {
        name.replace("present", "past_key_values", 1): tensor
        for name, tensor in outputs.items()
        if name.startswith("present")
    }


def check(folder: Path, model: PreTrainedModel, rounded: str | None) -> list[Check]:
    """
    Compare written graphs with our model, both in float32.

    Args:
        folder: of the written graphs.
        model: ours, in float32, with the values that were written.
        rounded: to what the writing rounded the weights: `"float16"`, ...; `None` for nothing.
    """
    graphs = {graph.file: Session(folder, graph) for graph in graphs_of(model)}
    compare = _compare_whole
    if DECODER in graphs:
        compare = _compare_pair
    elif model.can_generate():
        compare = _compare_decoder
    with torch.no_grad():
        checks = compare(graphs, model, Bound(rounded))
        if rounded is None and not all(one.ok for one in checks):
            # Weights that magnify rounding do so here as there: what float32 loses beside float64 tells how much.
            bound = Bound(None, 4 * rounding_of(model))
            checks = compare(graphs, model, bound) if bound.scores > BOUND else checks
    return checks


def _lengths(model: PreTrainedModel) -> list[int]:
    """Some, and one past every window."""
    config = model.config
    stacks = (config.encoder, config.decoder) if config.is_encoder_decoder else (config,)
    windows = sorted({window for stack in stacks for window in _windows(stack)})
    return [*LENGTHS, *(window + 5 for window in windows if window + 5 > max(LENGTHS))]


def _windows(config: Any) -> set[int]:
    """Those of a stack's layers."""
    if "sliding_attention" not in config.layer_types:
        return set()
    return {layer.sliding_window for layer in config.per_layer_config if layer.sliding_window}


def _samples(model: PreTrainedModel, stack: PreTrainedModel, room: int = 0) -> list[list[int]]:
    """Texts that leave room for further tokens."""
    limit = max(1, limit_of(stack) - room)
    return texts_of(stack.config.vocab_size, limit, special_of(model.config), _lengths(model))


def padded(texts: list[list[int]], padding: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, (texts, longest)."""
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), padding)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if side == "left" else slice(len(text))
        ids[row, place] = torch.tensor(text)
        mask[row, place] = 1
    return ids, mask


def _padding(config: Any) -> int:
    return 0 if config.pad_token_id is None else config.pad_token_id


# One call


def _compare_whole(graphs: dict[str, Session], model: PreTrainedModel, bound: Bound) -> list[Check]:
    session, config = graphs[MODEL], model.config
    texts = _samples(model, stacks_of(model)[0])
    if config.is_encoder_decoder and config.eos_token_id is not None:
        # What some classifiers look for.
        end = config.eos_token_id[0] if isinstance(config.eos_token_id, (list, tuple)) else config.eos_token_id
        texts = [[*text[:-1], end] for text in texts]
    batches = [(f"of {len(text)} tokens", [text], "right") for text in texts]
    batches += [(f"of a batch with padding on the {side}", texts, side) for side in ("right", "left")]
    checks = []
    for name, rows, side in batches:
        ids, mask = padded(rows, _padding(config), side)
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
        inputs["token_type_ids"] = torch.arange(ids.shape[1]).expand_as(ids) % max(
            getattr(config, "type_vocab_size", 0), 1
        )
        theirs = session(**inputs)
        ours = model(**{key: inputs[key] for key in _names(session)}, use_cache=False)
        for output, tensor in theirs.items():
            a, b = (_real(each, mask) for each in (ours[output], tensor))
            # One number has no spread; it is compared among others, in the batches.
            if a.numel() > 1:
                compare = compare_scores if output == "logits" and a.shape[-1] > 1 else compare_hidden
                checks.append(compare(f"{output} {name}", a, b, bound))
    return checks


def _names(session: Session) -> list[str]:
    return [tensor.name for tensor in session.graph.inputs]


def _real(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of what there is for every token, the real ones; of anything else, all."""
    return tensor[mask.bool()] if tensor.shape[:2] == mask.shape else tensor


# A decoder


def _positions(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As `generate` numbers tokens."""
    return model._prepare_position_ids_for_generation(ids, {"attention_mask": mask}).expand_as(mask)


def _compare_decoder(graphs: dict[str, Session], model: PreTrainedModel, bound: Bound) -> list[Check]:
    session, checks = graphs[MODEL], []
    new = min(NEW_TOKENS, limit_of(model.base_model) - 1)
    texts = _samples(model, model.base_model, room=new)
    for text in texts:
        ids, mask = padded([text], 0, "left")
        positions = _positions(model, ids, mask)
        theirs = session(input_ids=ids, attention_mask=mask, position_ids=positions, **session.empty(1))["logits"]
        ours = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        checks.append(compare_scores(f"scores of {len(text)} tokens", ours[0], theirs[0], bound))
    batches = [("", [texts[1]])]
    if len(texts) > 2:
        batches.append((", two texts with padding on the left", texts[1:3]))
    for name, rows in batches if new > 0 else ():
        ids, mask = padded(rows, _padding(model.config), "left")
        checks.append(_greedily(session, model, ids, mask, new, name, bound))
    return checks


def _greedily(
    session: Session, model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, new: int, name: str, bound: Bound
) -> Check:
    """The likeliest tokens by the graph, the prompt in two parts, and then one by one: our scores of the same tokens."""
    length = ids.shape[1]
    first = length // 2
    scores, past = [], session.empty(len(ids))
    starts = [0] * (first > 0) + [first, *range(length, length + new - 1)]
    ends = [*starts[1:], length + new - 1]
    for start, end in zip(starts, ends):
        seen = mask[:, :end]
        positions = _positions(model, ids[:, :end], seen)[:, start:]
        out = session(input_ids=ids[:, start:end], attention_mask=seen, position_ids=positions, **past)
        past, last = past_of(out), out["logits"][:, -1]
        if end >= length:
            scores.append(last)
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    ours = model(ids, attention_mask=mask, position_ids=_positions(model, ids, mask), use_cache=False).logits
    # (rows, new, vocabulary)
    ours, theirs = ours[:, length - 1 : -1], torch.stack(scores, dim=1)
    return compare_steps(f"{new} greedy tokens after {length}, step by step{name}", ours, theirs, bound)


def compare_steps(name: str, ours: torch.Tensor, theirs: torch.Tensor, bound: Bound) -> Check:
    """
    Scores at every step, and whether ours choose the same tokens, but for a tie within the bound.

    Args:
        ours, theirs: (rows, steps, vocabulary), of which theirs chose.
    """
    found = compare_scores(name, ours.flatten(0, 1), theirs.flatten(0, 1), bound)
    chosen = ours.gather(2, theirs.argmax(-1, keepdim=True))[..., 0]
    behind = float((ours.max(dim=-1).values - chosen).max() / (ours.std().item() or 1.0))
    if found.ok and bound.rounded is None and behind > 2 * bound.scores:
        return Check(name, False, f"a token that ours put {behind:.1e} of their spread behind the first")
    return found


# An encoder-decoder


def _compare_pair(graphs: dict[str, Session], model: PreTrainedModel, bound: Bound) -> list[Check]:
    config = model.config
    encoder, decoder = stacks_of(model)
    limit = limit_of(decoder)
    sources, new = _samples(model, encoder), min(NEW_TOKENS, limit - 1)
    # Of the first call: the start alone, and past every window.
    longest = min(max([2, *_windows(decoder.config)]) + 1, limit - new)
    cases = [(f" from {len(text)}", [text], 1) for text in sources]
    cases.append((f" after {longest}, a batch with padding", sources, longest))
    checks = []
    for name, rows, length in cases:
        ids, mask = padded(rows, _padding(config), "right")
        states = graphs[ENCODER](input_ids=ids, attention_mask=mask)["last_hidden_state"]
        ours = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        checks.append(compare_hidden(f"hidden states{name}", _real(ours, mask), _real(states, mask), bound))
        tokens = _prefix(model, length).expand(len(ids), -1)
        out = graphs[DECODER](input_ids=tokens, encoder_attention_mask=mask, encoder_hidden_states=states)
        scores, past = [out["logits"][:, -1]], past_of(out)
        for _ in range(new - 1):
            tokens = torch.cat([tokens, scores[-1].argmax(-1, keepdim=True)], dim=1)
            out = graphs[WITH_PAST](input_ids=tokens[:, -1:], encoder_attention_mask=mask, **past)
            # The source's half stays what it is.
            past |= past_of(out)
            scores.append(out["logits"][:, -1])
        # With a cache, as the graphs: without one, some decoders take their padding tokens for none.
        ours = model(ids, attention_mask=mask, decoder_input_ids=tokens, use_cache=True).logits[:, length - 1 :]
        theirs = torch.stack(scores, dim=1)
        checks.append(compare_steps(f"{len(scores)} greedy tokens{name}, step by step", ours, theirs, bound))
    return checks


def _prefix(model: PreTrainedModel, length: int) -> torch.Tensor:
    """What a target begins with: the start and random tokens, (1, length)."""
    vocabulary, start = model.config.decoder.vocab_size, model.config.decoder_start_token_id
    (text,) = texts_of(vocabulary, length, special_of(model.config), [length])
    return torch.tensor([[1 % vocabulary if start is None else start, *text[1:]]])
