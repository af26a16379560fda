"""Checkpoints that other training code bases write themselves, into variants: one room for each."""

from pathlib import Path

from ..checkpoint import SETS_OF_WEIGHTS
from . import fairseq, litgpt, meta, mistral, nanochat, nanogpt, x_transformers
from .source import ForeignCheckpoint


# Each says by its `finds` which file or folder is its own.
ROOMS = (mistral, meta, litgpt, nanochat, x_transformers, fairseq, nanogpt)


def _room(source: str | Path):
    path = Path(source).expanduser()
    # What transformers would load comes first: such folders often hold both.
    folder = path if path.is_dir() else path.parent
    if not path.exists() or (path.is_dir() and any((folder / name).is_file() for name in SETS_OF_WEIGHTS)):
        return None
    return next((room for room in ROOMS if room.finds(path)), None)


def is_foreign(source: str | Path) -> bool:
    """Whether a path is a checkpoint of one of these code bases."""
    return _room(source) is not None


def open_foreign(source: str | Path) -> ForeignCheckpoint:
    """
    A checkpoint that `is_foreign`, understood and not yet read.

    Raises:
        ConversionError: naming keys that are not understood, mechanisms that no field expresses, or damage.
    """
    return _room(source).open_checkpoint(Path(source).expanduser())


open_x_transformers = x_transformers.open_module

__all__ = ["ForeignCheckpoint", "is_foreign", "open_foreign", "open_x_transformers"]
