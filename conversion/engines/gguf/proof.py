"""The written file against the model: read back by our reader, by others, and run by llama.cpp where it is installed."""

from pathlib import Path
from typing import Any

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
# Half a step of 127 to the largest value of a block, and the rounding of the step to half precision.
Q8_ERROR = 0.5 / 127 + 2.0**-11
BLOCK = 32
LENGTH = 24


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
    checks = [_config(path, config, read.config), _tensors(path, body, read)]
    if all(one.ok for one in checks):
        checks.append(_outputs(body, read))
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


def _tensors(path: Path, body: PreTrainedModel, read: PreTrainedModel) -> Check:
    """Every tensor bit for bit in its number format; within the format's error where it has blocks."""
    name = "tensors of the file"
    kinds = {info.kind for info in GGUFFile(path).tensors.values()}
    offset = any(getattr(layer, "norm_unit_offset", False) for layer in _layers(body.config))
    expected, seen = body.state_dict(), read.state_dict()
    missing = [one for one in stored_tensors(read) if one not in expected]
    if missing:
        return Check(name, False, f"not in the model: {missing[:4]}")
    exact, worst, wrong = 0, 0.0, []
    for one in stored_tensors(read):
        ours, theirs = expected[one].float(), seen[one].float()
        if ours.shape != theirs.shape:
            wrong.append(one)
            continue
        unread = one.endswith("embed_positions.weight") and getattr(body.config, "position_offset", 0)
        if unread:
            # Rows that no token reads are not in the file.
            ours, theirs = ours[unread:], theirs[unread:]
        if any(torch.equal(theirs, form) for form in _rounded(ours, kinds)):
            exact += 1
        elif offset and "norm" in one and torch.allclose(ours, theirs, rtol=OFFSET_ERROR, atol=OFFSET_ERROR):
            worst = max(worst, 0.0)
        elif "Q8_0" in kinds and _within_blocks(ours, theirs):
            worst = max(worst, ((ours - theirs).abs().max() / ours.abs().max()).item())
        else:
            wrong.append(one)
    if wrong:
        return Check(name, False, f"different: {wrong[:4]}")
    total = len(stored_tensors(read))
    rest = f"{total - exact} within the format's error ({worst:.1e} of the largest value)" if worst else ""
    rest = rest or ("the rest to the last bit of 1 + w" if exact < total else "")
    return Check(
        name, True, f"{exact} of {total} bit-identical in {', '.join(sorted(kinds))}" + (rest and f"; {rest}")
    )


def _layers(config: Config) -> list[Any]:
    stacks = (config.encoder, config.decoder) if head_of(config) == "seq2seq_lm" else (config,)
    return [layer for stack in stacks for layer in stack.per_layer_config]


def _rounded(tensor: torch.Tensor, kinds: set[str]) -> list[torch.Tensor]:
    """As it is, and as the file's number formats round it."""
    halves = {"F16": torch.float16, "BF16": torch.bfloat16}
    return [tensor, *(tensor.to(dtype).float() for kind, dtype in halves.items() if kind in kinds)]


def _within_blocks(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.ndim < 2 or ours.shape[-1] % BLOCK:
        return False
    blocks = ours.reshape(-1, BLOCK)
    bound = blocks.abs().amax(1, keepdim=True) * Q8_ERROR
    return bool(((blocks - theirs.reshape(-1, BLOCK)).abs() <= bound + 2.0**-24).all())


def _inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    config = model.config
    pair = head_of(config) == "seq2seq_lm"
    size = (config.encoder if pair else config).vocab_size
    ids = torch.randint(0, size, (1, LENGTH), generator=generator)
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if pair else {})


@torch.no_grad()
def _outputs(body: PreTrainedModel, read: PreTrainedModel) -> Check:
    inputs = _inputs(body)
    ours, theirs = (one(**inputs)[0].float() for one in (body, read))
    error = relative_error(theirs, ours)
    seen = "bit-identical" if torch.equal(ours, theirs) else f"{error:.1e} of their spread away"
    return Check("outputs of the file", bool(torch.isfinite(theirs).all()), seen)


def _tokenizer(path: Path, tokenizer: Any) -> Check:
    name = "tokenizer of the file"
    reread = load_tokenizer(path)
    if isinstance(reread, str):
        return Check(name, False, reread)
    different = ids_that_differ(tokenizer, reread)
    return Check(name, different is None, different or "the same ids of every probe text, and the same chat template")
