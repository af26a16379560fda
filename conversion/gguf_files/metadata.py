"""A GGUF file's metadata as it is consumed: whatever nobody has asked for in the end is refused by name."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import ConversionError
from .container import GGUFFile


# Keys of an architecture that change nothing that is computed.
IRRELEVANT = {
    "rope.scaling.finetuned": "a note of how the model was trained",
    "pooling_type": "what llama.cpp makes of the hidden states when it embeds",
    "tensor_data_layout": "a note of the order of rows, which the architecture decides",
}
# Keys that are written also where they say nothing, with the value that says so.
NEUTRAL = {
    "expert_count": 0, "expert_used_count": 0, "expert_shared_count": 0, "nextn_predict_layers": 0,
    "attention.max_alibi_bias": 0.0, "attention.clamp_kqv": 0.0, "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0, "attention.sliding_window": 0, "attention.scale": 0.0,
}  # fmt: skip


class Metadata:
    """
    Keys of the architecture and tensors of settings, each of which counts as consumed when it is asked for.

    Args:
        file: the file.
        ignore_keys: full names of keys that the caller knows to be meaningless.
    """

    def __init__(self, file: GGUFFile, ignore_keys: Iterable[str] = ()):
        self.file = file
        self.ignored = frozenset(ignore_keys)
        self.consumed: set[str] = set()
        self.consumed_tensors: set[str] = set()

    def name(self, key: str) -> str:
        return f"{self.file.architecture}.{key}"

    def get(self, key: str, default: Any = None) -> Any:
        """A key of the architecture, by its name behind it."""
        self.consumed.add(self.name(key))
        return self.file.metadata.get(self.name(key), default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ConversionError(f"{self.file.path} has no key `{self.name(key)}`. The file is incomplete.")
        return value

    def uniform(self, key: str, default: Any = None) -> Any:
        """A key that may have one value per layer, which must be the same."""
        value = self.get(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise ConversionError(
                f"`{self.name(key)}` differs from layer to layer ({value}), which the native class does not know."
            )
        return value[0]

    def of_layers(self, key: str, layers: int) -> list[int]:
        """A key that has one count for every layer, or one per layer, of which 0 says that the layer lacks the part."""
        value = self.need(key)
        values = value if isinstance(value, list) else [value] * layers
        if len(values) != layers or any(type(one) is not int or one < 0 for one in values):
            raise ConversionError(
                f"`{self.name(key)}` is {str(value)[:60]} in {self.file.path}, which are no {layers} counts, one for each "
                "layer (`block_count`). The file is damaged."
            )
        return values

    def usual(self, key: str, default: Any = None) -> Any:
        """Of such a key what most layers have that have the part."""
        value = self.get(key, default)
        if not isinstance(value, list):
            return value
        counts = Counter(one for one in value if one != 0)
        return counts.most_common(1)[0][0] if counts else 0

    def tensor(self, name: str) -> torch.Tensor | None:
        """A tensor that holds settings, as float32."""
        if name not in self.file.tensors:
            return None
        self.consumed_tensors.add(name)
        return self.file.load(name).float()

    def has(self, name: str) -> bool:
        """Whether there is a tensor."""
        return name in self.file.tensors

    def refuse_leftovers(self) -> None:
        """
        Raises:
            ConversionError: naming the keys of the architecture that nothing has consumed.
        """
        prefix = f"{self.file.architecture}."
        left = {
            key: value
            for key, value in self.file.metadata.items()
            if key.startswith(prefix) and key not in self.consumed | self.ignored
        }
        unknown = [
            f"`{key}` ({str(value)[:40]})"
            for key, value in sorted(left.items())
            if (short := key.removeprefix(prefix)) not in IRRELEVANT
            and not (short in NEUTRAL and value == NEUTRAL[short])
        ]
        if unknown:
            raise ConversionError(
                f"{self.file.path} has the keys {', '.join(unknown)}, whose meaning for this architecture is not known "
                "here. If they do not change what the model computes, name them in `ignore_keys` (`--ignore-key` on "
                "the command line)."
            )
