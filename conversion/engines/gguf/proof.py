"""The written file against the model: read back by our reader, by others, and run by llama.cpp where it is installed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ...errors import NotRepresentable
from ...gguf_files.container import GGUFFile
from ...gguf_files.proof import readings
from ...gguf_source import load_gguf
from ...in_memory import from_native
from ...skeleton import stored_tensors
from ...tokenization import ids_that_differ, load_tokenizer
from ...verification import Check, relative_error
from . import llama_cpp
from .target import Config, compare_configs, head_of


# Of a norm that is stored as 1 + w.
OFFSET_ERROR = 2.0**-22
BLOCK, STEPS = 32, 127
LENGTH = 24
# What outputs may be off is as much as random errors of the rounding's size make them, the worst of so many draws and twice
# that: the rounding is one more draw. Sums in another order stay below the other bound.
DRAWS, TIMES = 4, 2
BOUND = 1e-4


def check(path: Path, body: PreTrainedModel, config: Config, tokenizer: Any) -> tuple[list[Check], list[str]]:
    """
    Compare a file with the model that it was written from.

    Args:
        body: ours, in float32.
        config: of what of it is in the file.
    """
    try:
        read = from_native(path, dtype=torch.float32)
    except ValueError as error:
        return [Check("read back", False, str(error))], []
    tensors, errors = _tensors(path, body, read)
    checks = [_config(path, config, read.config), tensors]
    if all(one.ok for one in checks):
        checks.append(_outputs(body, read, errors))
    notes = []
    for reading in readings(path, load_gguf(path)):
        if reading.ok is None:
            notes.append(f"{reading.name}: {reading.detail}")
        else:
            checks.append(Check(reading.name, reading.ok, reading.detail))
    written = tokenizer if "tokenizer.ggml.tokens" in GGUFFile(path).metadata else None
    if written is not None:
        checks.append(_tokenizer(path, written))
    if not all(one.ok for one in checks):
        # It ends the process over some files that say what is not there.
        return checks, notes
    ran, said = llama_cpp.check(path, read, written)
    return [*checks, *ran], [*notes, *said]


def _config(path: Path, config: Config, read: Config) -> Check:
    name = "config"
    try:
        notes = compare_configs(config, read, path.name, head_of(config))
    except NotRepresentable as error:
        return Check(name, False, "; ".join(f"`{field}`: {ours!r:.60}" for field, (ours, _) in error.fields.items()))
    return Check(name, True, "; ".join(notes) or "equal in every field that changes what is computed")


def _tensors(path: Path, body: PreTrainedModel, read: PreTrainedModel) -> tuple[Check, dict[str, torch.Tensor]]:
    """
    Every tensor bit for bit as its number format, computed here anew, rounds it; and of those that are rounded, by their
    names, how far off a value may be at most.
    """
    name = "tensors of the file"
    kinds = {info.kind for info in GGUFFile(path).tensors.values()}
    offset = any(getattr(layer, "norm_unit_offset", False) for layer in _layers(body.config))
    expected, seen = body.state_dict(), read.state_dict()
    stored = stored_tensors(read)
    missing = [one for one in stored if one not in expected]
    if missing:
        return Check(name, False, f"not in the model: {missing[:4]}"), {}
    exact, wrong, errors = 0, [], {}
    for one in stored:
        ours, theirs = expected[one].float(), seen[one].float()
        if ours.shape != theirs.shape:
            wrong.append(one)
            continue
        unread = one.endswith("embed_positions.weight") and getattr(body.config, "position_offset", 0)
        # Rows that no token reads are not in the file.
        form = _format_of(ours[unread:], theirs[unread:], kinds) if unread else _format_of(ours, theirs, kinds)
        if form is not None:
            exact += 1
            if form != "F32":
                errors[one] = FORMATS[form].error(ours)
        elif offset and "norm" in one and torch.allclose(ours, theirs, rtol=OFFSET_ERROR, atol=OFFSET_ERROR):
            errors[one] = OFFSET_ERROR * (1.0 + ours.abs())
        else:
            wrong.append(one)
    if wrong:
        return Check(name, False, f"different: {wrong[:4]}"), {}
    rest = "; the rest to the last bit of 1 + w" if exact < len(stored) else ""
    return Check(name, True, f"{exact} of {len(stored)} bit-identical in {', '.join(sorted(kinds))}{rest}"), errors


def _layers(config: Config) -> list[Any]:
    stacks = (config.encoder, config.decoder) if head_of(config) == "seq2seq_lm" else (config,)
    return [layer for stack in stacks for layer in stack.per_layer_config]


class Format(NamedTuple):
    """A number format: float32 values as it rounds them, and how far each may be off at most; both of the same shape."""

    round: Callable[[torch.Tensor], torch.Tensor]
    error: Callable[[torch.Tensor], torch.Tensor]


def _half(dtype: torch.dtype) -> Format:
    """A type of torch: half of its last bit, and of the smallest step below its normal numbers."""
    info = torch.finfo(dtype)
    return Format(
        lambda values: values.to(dtype).float(),
        lambda values: values.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2,
    )


def _in_blocks(values: torch.Tensor) -> torch.Tensor:
    """Q8_0: whole steps of 1/127 of the largest value of a block, away from 0 at half a step; the step in half precision."""
    blocks = values.reshape(-1, BLOCK)
    step = blocks.abs().amax(1, keepdim=True) / STEPS
    inverse = torch.where(step == 0, 0.0, 1.0 / step)
    scaled = blocks * inverse
    steps = torch.sign(scaled) * torch.floor(scaled.abs() + 0.5)
    return (steps * step.half().float()).reshape(values.shape)


def _error_in_blocks(values: torch.Tensor) -> torch.Tensor:
    """Half a step, and what the step loses in half precision, times as many."""
    blocks = values.reshape(-1, BLOCK)
    step = blocks.abs().amax(1, keepdim=True) / STEPS
    return (step / 2 + blocks.abs() * torch.finfo(torch.float16).eps / 2).reshape(values.shape)


FORMATS = {
    "F32": Format(lambda values: values, torch.zeros_like),
    "F16": _half(torch.float16),
    "BF16": _half(torch.bfloat16),
    "Q8_0": Format(_in_blocks, _error_in_blocks),
}


def _format_of(ours: torch.Tensor, theirs: torch.Tensor, kinds: set[str]) -> str | None:
    """In which of a file's number formats a tensor is what ours becomes, bit for bit."""
    for kind, form in FORMATS.items():
        fits = kind != "Q8_0" or (ours.ndim > 1 and ours.shape[-1] % BLOCK == 0)
        # What is in half precision already is so in float32 as well.
        if (kind in kinds or kind == "F32") and fits and torch.equal(form.round(ours), theirs):
            return kind
    return None


def _inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    config = model.config
    pair = head_of(config) == "seq2seq_lm"
    size = (config.encoder if pair else config).vocab_size
    ids = torch.randint(0, size, (1, LENGTH), generator=generator)
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if pair else {})


@torch.no_grad()
def _outputs(body: PreTrainedModel, read: PreTrainedModel, errors: dict[str, torch.Tensor]) -> Check:
    """Outputs within what errors of the rounding's size, drawn anew, make of them."""
    inputs = _inputs(body)
    ours, theirs = (one(**inputs)[0].float() for one in (body, read))
    error, bound = relative_error(theirs, ours), BOUND
    if errors:
        drawn = [relative_error(_disturbed(body, errors, seed)(**inputs)[0].float(), ours) for seed in range(DRAWS)]
        bound = max(BOUND, TIMES * max(drawn))
    seen = "bit-identical" if torch.equal(ours, theirs) else f"{error:.1e} of their spread away (bound {bound:.1e})"
    return Check("outputs of the file", error <= bound, seen)


def _disturbed(body: PreTrainedModel, errors: dict[str, torch.Tensor], seed: int) -> PreTrainedModel:
    """A model whose weights are off by random errors, evenly distributed up to these."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(body)
    state = other.state_dict()
    for name, error in errors.items():
        state[name].add_(error * (2 * torch.rand(error.shape, generator=generator) - 1))
    return other


def _tokenizer(path: Path, tokenizer: Any) -> Check:
    name = "tokenizer of the file"
    reread = load_tokenizer(path)
    if isinstance(reread, str):
        return Check(name, False, reread)
    different = ids_that_differ(tokenizer, reread)
    return Check(name, different is None, different or "the same ids of every probe text, and the same chat template")
