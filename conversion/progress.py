"""What of a task is on the disk already, so that a run goes on where one that was killed stopped."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from .tensor_files import Safetensors


logger = logging.get_logger(__name__)

PROGRESS = "progress.json"


class Finished(NamedTuple):
    """A file of weights that has all of its bytes: SHA-256 of its tensors', and which of them have NaN or infinities."""

    tensors: dict[str, str]
    non_finite: list[str]


class Progress:
    """
    What of a task is on the disk already, so that a run goes on where one that was killed stopped.

    Args:
        folder: in which the task is done. What an earlier run finished there stays, after a look at the hashes of its
            bytes; whatever else it left is removed.
        task: of which the same value stands for the same bytes in every file.
        files: that are to be written, with the tensors of each.
        digests: of the source's tensors; they are noted as well.

    Attributes:
        kept: what was there already.
        source: SHA-256 of the source's tensors that the earlier run read.
    """

    def __init__(
        self,
        folder: Path,
        task: str,
        files: Mapping[str, Mapping[str, torch.Tensor]],
        digests: dict[str, str] | None = None,
    ):
        self._folder, self._task, self._digests = folder, task, digests
        self.source: dict[str, str] = {}
        self.kept = self._keep(files)
        self._files = dict(self.kept)
        self._write()

    @staticmethod
    def task_in(folder: Path) -> str | None:
        """The task of the run that left a folder, if it says so."""
        try:
            return json.loads((folder / PROGRESS).read_text(encoding="utf-8"))["task"]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _keep(self, files: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Finished]:
        known = self._read()
        kept = {
            name: known[name] for name, headers in files.items()
            if name in known and self._is_whole(self._folder / name, headers, known[name].tensors)
        }  # fmt: skip
        for path in self._folder.iterdir():
            if path.name in kept:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        if known:
            logger.warning(f"{len(kept)} of {len(files)} files of weights are there, with the hashes that were noted.")
        return kept

    def _read(self) -> dict[str, Finished]:
        if self.task_in(self._folder) != self._task:
            return {}
        content = json.loads((self._folder / PROGRESS).read_text(encoding="utf-8"))
        try:
            self.source = dict(content["source"])
            return {name: Finished(dict(tensors), list(names)) for name, (tensors, names) in content["files"].items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            return {}

    @staticmethod
    def _is_whole(path: Path, headers: Mapping[str, torch.Tensor], digests: Mapping[str, str]) -> bool:
        try:
            tensors = Safetensors(path)
        except (OSError, ValueError):
            return False
        if tensors.keys() != headers.keys() or digests.keys() != headers.keys():
            return False
        found: dict[str, str] = {}
        with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"Hashing {path.name}", delay=1.0) as bar:
            for name, header in headers.items():
                stored = tensors[name]
                if stored.shape != header.shape or stored.dtype != header.dtype:
                    return False
                stored.note_digest(found, name)
                for piece in stored.pieces():
                    bar.update(piece.nbytes)
        return found == dict(digests)

    def add(self, file: str, tensors: dict[str, str], non_finite: list[str]) -> None:
        """A file has all of its bytes, and they are on the disk."""
        self._files[file] = Finished(tensors, non_finite)
        self._write()

    def _write(self) -> None:
        source = self.source | (self._digests or {})
        content = {"task": self._task, "source": source, "files": self._files}
        new = self._folder / f"{PROGRESS}.new"
        with new.open("w", encoding="utf-8") as stream:
            json.dump(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(self._folder / PROGRESS)
