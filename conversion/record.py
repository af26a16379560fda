"""What a conversion leaves beside its result: conversion_report.json, which says what was done and what was checked."""

import hashlib
import json
import math
import re
import shlex
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging

from .tensor_files import Safetensors


logger = logging.get_logger(__name__)

RECORD = "conversion_report.json"
# What a reader relies on.
KEYS = {
    "source", "direction", "model_type", "tensors", "parameters", "exactness", "folds", "deviations", "non_finite",
    "verification", "sha256",
}  # fmt: skip

# What a reader wants to know is the same -> the comparisons of `verify` that show it.
CLAIMS = {
    "architecture": r"config$|kind of model",
    "weights": r"weights|tensors of |dtype|vocabulary",
    "outputs": r"outputs(?!.* as loaded)",
    "outputs with the default attention": r"outputs.* as loaded",
    "generated tokens": r"\d+ .*tokens$",
    "tokens with the checkpoint's own settings": r"tokens with",
    "generation settings": r"generation config",
    "training loss": r"training loss",
    "tokenizer": r"tokenizer",
}


def last_part(path: str | Path) -> str:
    """The name of a folder or file: where it lay on a machine is nobody else's business."""
    return Path(path).expanduser().resolve().name


def public_name(source: str | Path) -> str:
    """What others may know of a source: a Hub id, or the name of a folder or file."""
    return str(source) if is_hub_id(source) else last_part(source)


def is_hub_id(source: str | Path) -> bool:
    """Whether a source that could be opened is a repository: neither a folder nor a file."""
    return not Path(source).expanduser().exists()


def command_line(
    command: str, source: str | Path, destination: str | Path, *ordered: tuple[str, Any], **options: Any
) -> str:
    """What does the same in a shell, with names that others may know; `ordered` are options that may come twice."""
    words = ["hf-variants", command, public_name(source), last_part(destination)]
    for name, value in (*ordered, *options.items()):
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if one not in (None, False):
                words += [f"--{name}"] if one is True else [f"--{name}", str(one)]
    return shlex.join(words)


def claims(verification: dict[str, Any] | None, notes: Iterable[str] = ()) -> dict[str, str]:
    """
    What a conversion claims to be equal, each `"verified"`, `"verified on the first 2 of 80 layers"`, `"not verified"`,
    `"not applicable"` or `"DIFFERENT"`.

    Args:
        verification: a `VerificationReport` as a dictionary, or `None` where none was made.
        notes: what could not be said of the tokenizer.
    """
    if verification is None:
        return dict.fromkeys(CLAIMS, "not verified")
    made = {}
    for claim, pattern in CLAIMS.items():
        found = [check["ok"] for check in verification["checks"] if re.match(pattern, check["name"])]
        made[claim] = "not applicable" if not found else "verified" if all(found) else "DIFFERENT"
        if not found and verification.get("limits"):
            parts = [
                re.match(rf"(first \d+ of \d+ layers): (?:{pattern})", each["name"]) for each in verification["checks"]
            ]
            seen = [part[1] for part in parts if part is not None]
            # A check that does not hold leaves no result.
            made[claim] = f"verified on the {seen[0]}" if seen else "not verified"
    if list(notes) and made["tokenizer"] != "DIFFERENT":
        made["tokenizer"] = "not verified"
    return made


@dataclass
class Digests:
    """
    SHA-256 of the bytes of tensors, taken as they passed by: one pass over a tensor that changes its name alone is the
    proof of both sides.

    Attributes:
        result, source: by the names in the files; `source` is `None` where its files were hashed as a whole.
    """

    result: dict[str, str] = field(default_factory=dict)
    source: dict[str, str] | None = None


def write_record(folder: Path, report: dict[str, Any], source: Path, digests: Digests | None = None) -> None:
    """
    Write the record of a conversion, with the hashes of the weights of which it speaks: of every tensor, where they are
    known; and of the files, which a reader can compare with those that the Hub shows, where nothing is known of the
    tensors or where the conversion is verified, which takes longer than hashing.

    Args:
        folder: of the result.
        report: a `Report` as a dictionary.
        source: folder or file that was read.
        digests: of the tensors.
    """
    root = source.resolve()
    if digests is not None:
        for path in weight_files(folder):
            _tensor_hashes(path, digests.result)
    all_files = digests is None or report["verification"] is not None
    record = {
        **report,
        "source": public_name(report["source"]),
        "destination": last_part(report["destination"]),
        # The Hub's cache names a snapshot after its commit.
        "revision": root.name if root.parent.name == "snapshots" else None,
        "claims": claims(report["verification"], report["tokenizer"]),
        "versions": {name: version(name) for name in ("hf-variants", "transformers", "torch")},
        "sha256": _hashes(folder) if all_files else {},
        "source_sha256": _hashes(source) if all_files or (digests is not None and digests.source is None) else {},
        # By name: threads came by them in any order.
        "tensor_sha256": dict(sorted(digests.result.items())) if digests is not None else {},
        "source_tensor_sha256": dict(sorted((digests.source or {}).items())) if digests is not None else {},
    }
    (folder / RECORD).write_text(json.dumps(_finite(record), indent=2) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Numbers that JSON does not have, as a config's leftovers may be, by their names."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def records_page(folders: Iterable[Path]) -> str:
    """
    A page in Markdown of conversions, from the records in their folders.

    Raises:
        ValueError: for a folder without a record that can be read.
    """
    lines = [
        "# Verified conversions",
        "",
        "Written by `hf-variants records FOLDER ...` from the conversion_report.json of each. A claim is verified if every",
        "comparison of `verify` that shows it held; hashes are SHA-256 of the source's weights, file by file.",
    ]
    for folder in folders:
        record = read_record(folder)
        if record is None or "claims" not in record:
            raise ValueError(f"{folder} has no {RECORD} with claims. Convert its source again.")
        versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        lines += [
            "",
            f"## {record['source']}",
            "",
            f"`{record['command']}`",
            "",
            f"- {record['model_type']}, {record['tensors']} tensors, {record['parameters']:,} parameters, "
            f"{record['exactness']}; revision: {record['revision'] or 'none'}",
            f"- {versions}",
            *(f"- {name}: `{digest}`" for name, digest in record["source_sha256"].items()),
            "",
            "| claim | status |",
            "|---|---|",
            *(f"| {claim} | {status} |" for claim, status in record["claims"].items()),
        ]
    return "\n".join(lines) + "\n"


def read_record(folder: Path) -> dict[str, Any] | None:
    """
    The record in a folder, or `None` where there is none, or none that can be read, which is logged: a model that is
    being saved must not be lost to it.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not record.keys() >= KEYS:
            raise ValueError("keys are missing")
    except (ValueError, AttributeError) as error:
        logger.warning(f"{path} is not a record of a conversion ({error}) and goes unused. Remove it.")
        return None
    return record


def speaks_of(record: dict[str, Any], folder: Path) -> bool:
    """Whether the weights in the folder are still those that the record speaks of, bit for bit."""
    if record["sha256"]:
        return record["sha256"] == _hashes(folder)
    found: dict[str, str] = {}
    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            return False
        found |= _tensor_hashes(path)
    return bool(found) and record.get("tensor_sha256") == found


def _hashes(place: Path) -> dict[str, str]:
    """File name -> SHA-256, of a file of weights or of those in a folder."""
    return {path.name: _hash(path) for path in weight_files(place)}


def weight_files(place: Path) -> list[Path]:
    """A file of weights, or those in a folder."""
    if place.is_file():
        return [place]
    found = (sorted(place.glob(f"*{ending}")) for ending in (".safetensors", ".bin", ".pth", ".pt", ".gguf"))
    return next(filter(None, found), [])


# Path and time of the last change in nanoseconds -> SHA-256: large weights are read once for it.
_KNOWN: dict[tuple[Path, int], str] = {}


# The same -> SHA-256 of the bytes of each tensor in the file.
_KNOWN_TENSORS: dict[tuple[Path, int], dict[str, str]] = {}


def _tensor_hashes(path: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """
    SHA-256 of the bytes of each tensor in a safetensors file.

    Args:
        known: the same of the tensors that were just written there.
    """
    key = (path, path.stat().st_mtime_ns)
    if key not in _KNOWN_TENSORS:
        tensors = Safetensors(path)
        found = {name: known[name] for name in tensors} if known is not None else {}
        for name, stored in tensors.items() if known is None else ():
            stored.note_digest(found, name)
            for _ in stored.pieces():
                pass
        _KNOWN_TENSORS[key] = found
    return _KNOWN_TENSORS[key]


def _hash(path: Path, seen: Callable[[int], Any] = lambda count: None) -> str:
    """
    SHA-256 of a file.

    Args:
        seen: told how many bytes of it have been read since it was told last.
    """
    key = (path, path.stat().st_mtime_ns)
    if key not in _KNOWN:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
                seen(len(block))
        _KNOWN[key] = digest.hexdigest()
    return _KNOWN[key]


class HashedMeanwhile:
    """
    Computes hashes of files that `write_record` will ask for while other work is done.

    Args:
        files: that are there from the beginning.
    """

    def __init__(self, files: Iterable[Path]):
        self._files, self._stopped = list(files), threading.Event()
        self._pool = ThreadPoolExecutor(2)
        self._running: list[Future] = []
        self._total = self._done = 0

    def add(self, path: Path) -> None:
        """A file that will not change any more."""
        self._total += path.stat().st_size
        self._running.append(self._pool.submit(_hash, path, self._seen))

    def _seen(self, count: int) -> None:
        if self._stopped.is_set():
            raise RuntimeError("The hashes are no longer wanted.")
        self._done += count

    def __enter__(self) -> "HashedMeanwhile":
        for path in self._files:
            self.add(path)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                with tqdm(total=self._total, unit="B", unit_scale=True, desc="Hashing weights", delay=1.0) as bar:
                    while wait(self._running, timeout=0.1).not_done:
                        bar.update(self._done - bar.n)
        finally:
            self._stopped.set()
            self._pool.shutdown(cancel_futures=True)
