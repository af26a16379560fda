"""What a conversion leaves beside its result: conversion_report.json, which says what was done and what was checked."""

import hashlib
import json
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

RECORD = "conversion_report.json"
# What a reader relies on.
KEYS = {
    "source", "direction", "model_type", "tensors", "parameters", "exactness", "folds", "deviations", "non_finite",
    "verification", "sha256",
}  # fmt: skip


def last_part(path: str | Path) -> str:
    """The name of a folder or file: where it lay on a machine is nobody else's business."""
    return Path(path).expanduser().resolve().name


def public_name(source: str | Path) -> str:
    """What others may know of a source: a Hub id, or the name of a folder or file."""
    return str(source) if is_hub_id(source) else last_part(source)


def is_hub_id(source: str | Path) -> bool:
    """Whether a source that could be opened is a repository: neither a folder nor a file."""
    return not Path(source).expanduser().exists()


def write_record(folder: Path, report: dict[str, Any]) -> None:
    """Write the record of a conversion, with the hashes of the weights of which it speaks."""
    record = {
        **report,
        "source": public_name(report["source"]),
        "destination": last_part(report["destination"]),
        "versions": {name: version(name) for name in ("hf-variants", "transformers", "torch")},
        "sha256": _hashes(folder),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


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
    return record["sha256"] == _hashes(folder)


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: _hash(path, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.safetensors"))}


@lru_cache(maxsize=256)
def _hash(path: Path, changed: int) -> str:
    """SHA-256 of a file that was changed last at a time in nanoseconds; large weights are read once for it."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
