"""
Verification of checkpoints that do not fit into memory: every tensor by itself, and outputs of as many layers as do.

What is not compared is said in the report, and claimed nowhere.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from . import block_configs, checkpoint
from .config_map import differing_fields
from .errors import ConversionError
from .family import head_of_variant, stacks
from .foreign import is_foreign
from .generation_settings import stored_generation_config
from .gguf_source import is_gguf
from .in_memory import build
from .opened_variant import OpenedVariant, open_variant
from .skeleton import stored_tensors
from .verification import Check, VerificationReport, _check_generation_configs, _check_tokenizers, verify


_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def stored_bytes(source: str | Path | PreTrainedModel) -> int:
    """
    What the weights of a checkpoint take, from the headers of its files.

    Raises:
        ConversionError: for what is no folder of transformers or ours, whose tensors cannot be read one by one.
    """
    if isinstance(source, PreTrainedModel) or is_gguf(source) or is_foreign(source):
        what = type(source).__name__ if isinstance(source, PreTrainedModel) else source
        raise ConversionError(
            f"`memory` is for checkpoints in folders, and {what} is none. Leave it out, or convert {what} first."
        )
    weights = checkpoint.weights_of(source, checkpoint.resolve_folder(source))
    return sum(weights.header(name).nbytes for name in weights.names())


def verify_bounded(
    a: str | Path,
    b: str | Path,
    memory: int,
    *,
    new_tokens: int = 32,
    progress: bool = True,
    ignore_keys: Iterable[str] = (),
) -> VerificationReport:
    """
    Compare two checkpoints of which no more than a tensor, and the layers that fit, are in memory.

    Args:
        a, b: folders or Hub ids.
        memory: bytes that the weights of both models may take together.
        new_tokens, progress, ignore_keys: as of `verify`.

    Returns:
        a report whose `limits` say what was not compared. Comparisons of outputs are named after the layers that ran.
    """
    report = VerificationReport(str(a), str(b))
    sides = []
    for source in (a, b):
        try:
            sides.append(open_variant(source, ignore_keys))
        except ConversionError as error:
            report.checks.append(Check(f"tensors of {source}", False, str(error)))
    if len(sides) < 2:
        return report
    left, right = sides
    report.checks += [
        Check(f"tensors of {side.source}", True, "every tensor of the architecture, and no other") for side in sides
    ]
    if left.model_class is not right.model_class:
        seen = f"{left.model_class.__name__} and {right.model_class.__name__}"
        report.checks.append(Check("kind of model", False, seen))
        return report
    different = differing_fields(left.config, right.config, head_of_variant(left.model_class.__name__))
    seen = "; ".join(f"{name}: {x!r} and {y!r}" for name, (x, y) in different.items())
    report.checks.append(Check("config", not different, seen or "every field that changes what the model computes"))
    if different:
        return report
    report.checks.append(_compare_tensors(left, right))
    settings = [
        SimpleNamespace(
            can_generate=side.model_class.can_generate, generation_config=stored_generation_config(side.path)
        )
        for side in sides
    ]
    for check in (_check_generation_configs(*settings), _check_tokenizers(left.path, right.path)):
        if check is not None:
            report.checks.append(check)
    if report.ok:
        _compare_layers(left, right, memory, report, new_tokens, progress)
    return report


def _compare_tensors(left: OpenedVariant, right: OpenedVariant) -> Check:
    """Bit equality, each tensor in the layout of a variant, where the conversion's rules put it."""
    names = [list(_stored(side)) for side in (left, right)]
    different = sorted(set(names[0]) ^ set(names[1]))
    for name in names[0]:
        if name in names[1] and not torch.equal(left.load(name), right.load(name)):
            different.append(name)
    seen = f"different: {different[:4]}" if different else f"{len(names[0])} tensors, one by one, bit-identical"
    return Check("weights", not different, seen)


def _stored(side: OpenedVariant) -> Mapping[str, torch.Tensor]:
    from ..surgery.subject import Subject

    return Subject.of(side).stored


def _compare_layers(
    left: OpenedVariant,
    right: OpenedVariant,
    memory: int,
    report: VerificationReport,
    new_tokens: int,
    progress: bool,
) -> None:
    """What `verify` compares, of models with the first layers alone; each stack keeps as many."""
    depth = max(stack.num_hidden_layers for stack in stacks(left.config))
    count = _layers_that_fit([left, right], memory)
    if count == 0:
        report.limits.append(f"nothing was run: not even one of {depth} layers fits into {memory:,} bytes")
        return
    try:
        models = [_first_layers(side, count) for side in (left, right)]
    except ConversionError as error:
        report.limits.append(f"nothing was run: the first {count} layers make no model by themselves ({error})")
        return
    inner = verify(*models, new_tokens=new_tokens, progress=progress)
    report.deviations = inner.deviations
    report.checks += [
        Check(f"first {count} of {depth} layers: {check.name}", check.ok, check.detail) for check in inner.checks
    ]
    report.limits.append(
        f"outputs, tokens and losses are of the first {count} of {depth} layers, which fit into {memory:,} bytes; what "
        "the others compute follows from their weights and the config"
    )


def _layers_that_fit(sides: list[OpenedVariant], memory: int) -> int:
    """How many layers of each stack both models may have."""
    sizes: dict[int, int] = {}
    for side in sides:
        for name in _stored(side):
            match = _LAYER.search(name)
            layer = int(match[1]) if match else -1
            sizes[layer] = sizes.get(layer, 0) + side.header(name).nbytes
    left, count = memory - sizes.pop(-1, 0), 0
    for layer in sorted(sizes):
        left -= sizes[layer]
        count += left >= 0
    return count


def _first_layers(side: OpenedVariant, count: int) -> PreTrainedModel:
    """A model of its class, the stock one for a native checkpoint, with so many of the first layers of each stack."""
    from ..surgery.layers import SelectLayers
    from ..surgery.subject import Subject

    subject = Subject.of(side)
    for name, stack in subject.stacks.items():
        subject = SelectLayers(range(min(count, stack.num_hidden_layers)), name).apply(subject)
    model = subject.model() if side.native is None else _native_model(side, subject)
    if model.can_generate():
        model.generation_config = stored_generation_config(side.path)
    return model


def _native_model(side: OpenedVariant, subject: Any) -> PreTrainedModel:
    """The stock model of a config with fewer layers, with the tensors that the checkpoint has under its names."""
    native = side.native
    assert native is not None
    config = native.family.config_map.to_native(subject.config, native.head)
    config.dtype = native.dtype
    skeleton = block_configs.native_skeleton(native.family, native.head, config)
    for name in set(skeleton.all_tied_weights_keys) - set(native.native.all_tied_weights_keys):
        # Where the weights say that nothing is tied.
        skeleton.all_tied_weights_keys.pop(name)
    tensors = {
        name: native.layout.load(name).clone(memory_format=torch.contiguous_format)
        for name in stored_tensors(skeleton)
    }
    return build(type(skeleton), config, tensors)
