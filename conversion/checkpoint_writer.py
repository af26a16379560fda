"""Weights and config into a folder, and when a run that was killed may be gone on with."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_variants.model.custom_code import auto_map_of, write_code

from . import checkpoint, tensor_files, tensor_writer
from .family import is_variant
from .progress import Progress
from .record import Digests, HashedMeanwhile, weight_files


@dataclass
class Writing:
    """
    How weights are written.

    Attributes:
        max_shard_bytes: largest size of one file.
        workers: threads; by default one for each of up to four cores.
        task: the same value for the same bytes, where a run that was killed may be gone on with; the folder then comes
            from `new_folder` with this task.
    """

    max_shard_bytes: int = tensor_writer.MAX_SHARD_BYTES
    workers: int | None = None
    task: str | None = None


@dataclass
class Written:
    """What was seen of the weights on their way: tensors with NaN or infinite values, and the hashes of all."""

    non_finite: list[str]
    digests: Digests


def write_checkpoint(
    folder: Path,
    config: PreTrainedConfig,
    target: PreTrainedModel,
    tensors: Callable[[Set[str]], Iterable[tuple[str, torch.Tensor | tensor_files.Unread]]],
    headers: Mapping[str, torch.Tensor],
    writing: Writing,
    source: Path,
    weights: checkpoint.Weights | None = None,
) -> Written:
    """
    Weights and config of `source` into a folder.

    Args:
        tensors: given the names of those that an earlier run has written, makes the others.
        weights: of the source, where they are read through it.
    """
    digests = Digests()
    if weights is not None and weights.hash_what_is_read():
        digests.source = weights.digests
    progress = None
    if writing.task is not None:
        shards = tensor_writer.in_shards(headers, writing.max_shard_bytes)
        progress = Progress(folder, writing.task, shards, digests.source)
    kept = {} if progress is None else progress.kept
    config.architectures = [type(target).__name__]
    if is_variant(config):
        config.auto_map = auto_map_of(config, type(target).__name__)
        write_code(folder)
    with HashedMeanwhile(weight_files(source) if digests.source is None else ()):
        non_finite = tensor_writer.write_safetensors(
            tensors({name for entry in kept.values() for name in entry.tensors}), headers, folder,
            writing.max_shard_bytes, workers=writing.workers, digests=digests.result, progress=progress,
        )  # fmt: skip
    if progress is not None and digests.source is not None:
        digests.source = progress.source | digests.source
    config.save_pretrained(folder)
    if is_variant(config) and config._attn_implementation is not None:
        # What the source asks for: transformers reads this key, and does not write it.
        path = folder / CONFIG_NAME
        settings = json.loads(path.read_text(encoding="utf-8")) | {"attn_implementation": config._attn_implementation}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Written(non_finite, digests)


def task_of(
    source: Path, config: PreTrainedConfig, headers: Mapping[str, torch.Tensor], max_shard_bytes: int, *more: Any
) -> str:
    """
    A value that is the same where the same tensors come of the same files into the same files.

    Args:
        source: folder or file; of its files of weights and its config, size and time of the last change count.
        more: what else decides.
    """
    files = [*weight_files(source), *([source / CONFIG_NAME] if source.is_dir() else [])]
    said = [
        {str(path.resolve()): tensor_files.state_of(path) for path in files},
        config.to_json_string(use_diff=False),
        [(name, str(header.dtype), list(header.shape)) for name, header in headers.items()],
        max_shard_bytes,
        [version(name) for name in ("hf-variants", "transformers", "torch")],
        more,
    ]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()
