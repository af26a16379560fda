"""A file before it is written: its keys and the shapes of its tensors, which our reader takes for a file."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...gguf_files.container import GGUFFile, TensorInfo, gguf_package


class Outline(GGUFFile):
    """
    A file that is not there yet.

    Args:
        metadata: every key with its value.
        shapes: name -> shape of every tensor, as torch has it.
        settings: tensors whose values the reader wants to know.
    """

    def __init__(
        self, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], settings: dict[str, torch.Tensor]
    ):
        self.package = gguf_package()
        self.path = Path("the file")
        self.metadata = {key: _as_read(value) for key, value in metadata.items()}
        shapes = shapes | {name: tuple(tensor.shape) for name, tensor in settings.items()}
        self.tensors = {name: TensorInfo("F32", shape, 0, 0) for name, shape in shapes.items()}
        self._settings = settings
        self._parts = []

    def load(self, name: str) -> torch.Tensor:
        return self._settings[name]

    def same_bytes(self, a: str, b: str) -> bool:
        return False

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


def _as_read(value: Any) -> Any:
    """A value as it comes out of a file: numbers in float32, as the shortest decimals that are these."""
    if isinstance(value, list):
        return [_as_read(entry) for entry in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value
