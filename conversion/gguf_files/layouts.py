"""How llama.cpp lays a tensor out where it is not as the native class has it: each way there, and the way back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Heads:
    """What layouts need to know of the attention; `own` has it of layers that differ, by their numbers."""

    queries: int
    keys: int
    own: Mapping[int, "Heads"] = field(default_factory=dict)

    def of(self, name: str) -> "Heads":
        """Those of the layer that a tensor of the file belongs to."""
        layer = re.match(r"blk\.(\d+)\.", name)
        return self if layer is None else self.own.get(int(layer[1]), self)


class Layout:
    """As the native class has it."""

    def to_native(self, tensor: torch.Tensor, heads: Heads) -> torch.Tensor:
        return tensor

    def to_gguf(self, tensor: torch.Tensor, heads: Heads) -> torch.Tensor:
        return tensor


class Transposed(Layout):
    """Linear layers of GPT-2, whose native class has their columns as rows."""

    def to_native(self, tensor, heads):
        return tensor.T.contiguous()

    def to_gguf(self, tensor, heads):
        return tensor.T


class OffsetNorm(Layout):
    """Norms that multiply by 1 + w natively, stored as 1 + w; in float32, where both ways are exact but for tiny w."""

    def to_native(self, tensor, heads):
        return tensor.float() - 1

    def to_gguf(self, tensor, heads):
        return tensor.float() + 1


@dataclass(frozen=True)
class PairedRotation(Layout):
    """Queries or keys whose rotary pairs lie side by side, natively in the two halves of a head."""

    of_keys: bool

    def _heads(self, heads: Heads) -> int:
        return heads.keys if self.of_keys else heads.queries

    def to_native(self, tensor, heads):
        # (heads, head_dim / 2, 2, ...) -> (heads, 2, head_dim / 2, ...)
        pairs = tensor.reshape(self._heads(heads), -1, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)

    def to_gguf(self, tensor, heads):
        # (heads, 2, head_dim / 2, ...) -> (heads, head_dim / 2, 2, ...)
        halves = tensor.reshape(self._heads(heads), 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)


class GroupedQKV(Layout):
    """All queries, all keys, all values; natively the queries of each key/value head with its key and value."""

    def to_native(self, tensor, heads):
        head_dim = tensor.shape[0] // (heads.queries + 2 * heads.keys)
        rows = tensor.split([heads.queries * head_dim, heads.keys * head_dim, heads.keys * head_dim])
        # (key/value heads, queries of each + 2, head_dim, ...)
        grouped = [part.reshape(heads.keys, -1, head_dim, *tensor.shape[1:]) for part in rows]
        return torch.cat(grouped, dim=1).reshape(tensor.shape)

    def to_gguf(self, tensor, heads):
        grouped = tensor.reshape(heads.keys, heads.queries // heads.keys + 2, -1, *tensor.shape[1:])
        parts = (grouped[:, :-2], grouped[:, -2], grouped[:, -1])
        return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])


AS_IT_IS = Layout()
