"""Weights that torch pickled, read without running anything in them."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from transformers.utils import logging

from .errors import ConversionError
from .rules import some


logger = logging.get_logger(__name__)


def load_pickle(path: Path, harmless: tuple[type, ...] = ()) -> Any:
    """
    What torch saved in a file, its tensors mapped from it.

    Args:
        harmless: classes whose objects may be in it, because making one runs nothing.

    Raises:
        ConversionError: if it cannot be read, or holds more than tensors and plain values: nothing of it is run.
    """
    try:
        # Only zipped files can be mapped.
        with torch.serialization.safe_globals(list(harmless)):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # the unpickler meets damage with errors of every kind
        unsafe = isinstance(error, pickle.UnpicklingError)
        why = "holds other objects than tensors, and could run code" if unsafe else f"cannot be read ({error})"
        raise ConversionError(
            f"{path} {why}. Load it where you trust it, and save the model's state dict as safetensors."
        ) from error
    return content


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a pickle, mapped from the file; also one that a trainer has wrapped together with its own state."""
    content = load_pickle(path)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path} holds a {type(content).__name__}, no state dict. Save the model's state dict.")
    tensors = {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if strange := [name for name in content if name not in tensors]:
        if not tensors:
            raise ConversionError(
                f"{path} holds {strange[0]!r}, which is no tensor. Save the model's state dict by itself."
            )
        logger.warning(f"{path} holds {some([str(name) for name in strange])} beside its tensors, which is left out.")
    return tensors
