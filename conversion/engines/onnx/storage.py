"""Weights in one file beside the graphs, each once, in the type that they are stored in."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from .package import onnx_packages


# Bytes: what is smaller stays in the graph.
INLINE = 1024
# Of a tensor's place, for what maps a file into memory.
ALIGNMENT = 4096


class SharedWeights:
    """
    A file of weights that several graphs read. Tensors with the same bytes are one, so that tied tables and those of
    several graphs are stored once.

    Args:
        path: of the file, which is begun.
        dtypes: by name, the types that parameters are stored in; the graphs compute in float32.
    """

    def __init__(self, path: Path, dtypes: dict[str, torch.dtype]):
        self.path, self.dtypes = path, dtypes
        self.places: dict[tuple[str, str], int] = {}
        self.path.touch()

    def move(self, model: Any) -> None:
        """Take the large initialisers out of a graph."""
        ir, *_ = onnx_packages()
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes < INLINE:
                continue
            stored = _torch_tensor(tensor)
            dtype = self.dtypes.get(name, stored.dtype)
            if dtype != stored.dtype and stored.is_floating_point():
                value = _cast(model, value, ir.DataType[_NAMES[dtype]])
                stored = stored.to(dtype)
            value.const_value = ir.ExternalTensor(
                self.path.name, self._place(stored), stored.nbytes, ir.DataType[_NAMES[stored.dtype]],
                shape=ir.Shape(stored.shape), name=value.name, base_dir=str(self.path.parent),
            )  # fmt: skip

    def _place(self, tensor: torch.Tensor) -> int:
        """Where the tensor's bytes begin, which are appended if they are new."""
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        key = str(tensor.dtype), hashlib.sha256(data).hexdigest()
        if key not in self.places:
            with self.path.open("r+b") as file:
                place = -(-file.seek(0, 2) // ALIGNMENT) * ALIGNMENT
                file.seek(place)
                file.write(data)
            self.places[key] = place
        return self.places[key]


_NAMES = {
    torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float64: "DOUBLE",
    torch.int64: "INT64", torch.int32: "INT32", torch.bool: "BOOL",
}  # fmt: skip


def _torch_tensor(tensor: Any) -> torch.Tensor:
    raw = getattr(tensor, "raw", None)
    return raw.detach() if isinstance(raw, torch.Tensor) else torch.from_numpy(tensor.numpy().copy())


def _cast(model: Any, value: Any, dtype: Any) -> Any:
    """A new initialiser of the type, which the old one's users read through a cast, and which takes its name."""
    ir, *_ = onnx_packages()
    graph, name = model.graph, value.name
    del graph.initializers[name]
    value.name = f"{name}.computed"
    stored = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
    graph.initializers[name] = stored
    node = ir.node("Cast", inputs=[stored], attributes={"to": ir.DataType.FLOAT})
    cast = node.outputs[0]
    cast.name, cast.shape, cast.type = f"{name}.float32", value.shape, ir.TensorType(ir.DataType.FLOAT)
    ir.convenience.replace_all_uses_with(value, cast)
    graph.insert_before(graph[0], node)
    return stored
