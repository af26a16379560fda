"""The GGUF container: its header, its metadata and its tensors, one at a time, also where it is split over files."""

import mmap
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConversionError


MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
# GGUF's value types: number -> struct format; 8 is a string and 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def gguf_package() -> Any:
    """The package `gguf`, which knows the quantised formats and llama.cpp's names."""
    try:
        import gguf
    except ImportError as error:
        raise ConversionError(
            "GGUF files are read with the package `gguf`, which is not installed. Install hf-variants with the extra "
            "`gguf`."
        ) from error
    return gguf


@dataclass(frozen=True)
class TensorInfo:
    """
    Where a tensor lies.

    Attributes:
        kind: the name of its number format (`"F16"`, `"Q4_K"`, ...).
        shape: as torch has it, rows first.
        offset: of its first byte in the file.
        part: the number of the file.
    """

    kind: str
    shape: tuple[int, ...]
    offset: int
    part: int


class _Header:
    """A cursor over a file's bytes that never leaves them."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise ConversionError(
                    f"{path} is not a GGUF file: it does not begin with its mark. Give another file."
                )
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.at = len(MAGIC)
        self.order = "<"
        version = self.scalar("I")
        if version & 0xFFFF == 0 and version:
            # Of a machine with the other byte order.
            self.order, version = ">", version >> 24 | version >> 8 & 0xFF00
        if version not in VERSIONS:
            raise ConversionError(
                f"{path} has version {version} of the GGUF format, and only {VERSIONS[0]} and {VERSIONS[1]} are read. "
                "Make it anew with a current llama.cpp."
            )

    def damaged(self, what: str) -> ConversionError:
        return ConversionError(f"The header of {self.path} is damaged: {what}. Fetch the file again.")

    def take(self, size: int) -> int:
        """The start of the next `size` bytes, which are thereby read."""
        start = self.at
        if size > len(self.data) - start:
            raise self.damaged(f"it ends at byte {len(self.data)}, where {size} more belong")
        self.at = start + size
        return start

    def scalar(self, form: str) -> Any:
        form = self.order + form
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        size = self.scalar("Q")
        start = self.take(size)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"a string at byte {start} is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            number = self.scalar(SCALARS[kind])
            # The shortest number that is the same in float32, which is what somebody wrote.
            return float(str(np.float32(number))) if SCALARS[kind] == "f" else number
        if kind != ARRAY or depth > 1:
            raise self.damaged(f"{kind} at byte {self.at} is no type of value")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in SCALARS:
            dtype = np.dtype(SCALARS[inner]).newbyteorder(self.order)
            start = self.take(count * dtype.itemsize)
            numbers = np.frombuffer(self.data, dtype, count, start)
            return [float(str(number)) for number in numbers] if SCALARS[inner] == "f" else numbers.tolist()
        if count > len(self.data) - self.at:
            raise self.damaged(f"an array at byte {self.at} has {count} entries")
        return [self.value(inner, depth + 1) for _ in range(count)]


class GGUFFile:
    """
    A GGUF file, or all parts of one that is split, memory-mapped.

    Attributes:
        path: of the first part.
        metadata: every key with its value; numbers in float32 as the shortest decimal that is the same number.
        tensors: name -> where it lies; nothing is read.

    Raises:
        FileNotFoundError: if it, or one of its parts, is not there.
        ConversionError: if it is damaged, or of a version or a number format that is not known.
    """

    def __init__(self, path: str | Path):
        self.package = gguf_package()
        self.path = Path(path).expanduser()
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._parts: list[_Header] = []
        self._open(self.path)
        count = self.metadata.get("split.count") or 1
        if count > 1:
            self._open_parts(count)
        if self._parts[0].order == ">" and (kinds := sorted({t.kind for t in self.tensors.values()} - set(FLOATS))):
            raise ConversionError(
                f"{self.path} has big-endian tensors of the formats {kinds}, which are read in little-endian order only. "
                "Convert it with `gguf-convert-endian` of the package `gguf`."
            )

    def _open_parts(self, count: int) -> None:
        match = SPLIT_NAME.fullmatch(self.path.name)
        if match is None or int(match["count"]) != count:
            raise ConversionError(
                f"{self.path} is one of {count} parts, but its name does not end in -00001-of-{count:05d}.gguf. Give "
                "the parts their original names, in one folder."
            )
        names = [f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
        self.path = self.path.with_name(names[0])
        self.metadata, self.tensors, self._parts = {}, {}, []
        for name in names:
            self._open(self.path.with_name(name))
        expected = self.metadata.get("split.tensors.count")
        if expected is not None and expected != len(self.tensors):
            raise ConversionError(
                f"The {count} parts of {self.path} have {len(self.tensors)} tensors and should have {expected}. Fetch "
                "them again."
            )

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not a file. Give the path of a GGUF file, with all its parts beside it."
            )
        header = _Header(path)
        tensor_count, key_count = header.scalar("Q"), header.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = header.text()
            if key in metadata:
                raise header.damaged(f"the key {key} stands in it twice")
            metadata[key] = header.value(header.scalar("I"))
        # Of further parts only the numbering is their own.
        self.metadata = {**metadata, **self.metadata}
        infos = [self._tensor_info(header) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise header.damaged(f"`general.alignment` is {alignment!r}")
        start = -(-header.at // alignment) * alignment
        for name, kind, shape, offset, size in infos:
            if name in self.tensors:
                raise header.damaged(f"the tensor {name} stands in it twice")
            if start + offset + size > len(header.data):
                raise ConversionError(
                    f"{path} ends before its tensor {name} does. It was cut off; fetch the file again."
                )
            self.tensors[name] = TensorInfo(kind, shape, start + offset, len(self._parts))
        self._parts.append(header)

    def _tensor_info(self, header: _Header) -> tuple[str, str, tuple[int, ...], int, int]:
        name, dimensions = header.text(), header.scalar("I")
        if dimensions > MAX_DIMENSIONS:
            raise header.damaged(f"the tensor {name} has {dimensions} dimensions")
        shape = tuple(header.scalar("Q") for _ in range(dimensions))[::-1]
        number, offset = header.scalar("I"), header.scalar("Q")
        try:
            kind = self.package.GGMLQuantizationType(number)
        except ValueError as error:
            raise ConversionError(
                f"The tensor {name} of {header.path} has the number format {number}, which this release of the package "
                "`gguf` does not know. Update it."
            ) from error
        block, size = self.package.GGML_QUANT_SIZES[kind]
        elements = int(np.prod([1, *shape], dtype=object))
        if shape and shape[-1] % block:
            raise header.damaged(f"the rows of {name} are no whole blocks of {kind.name}")
        return name, kind.name, shape, offset, elements // block * size

    def load(self, name: str) -> torch.Tensor:
        """One tensor: unquantised values in their own dtype, others as float32."""
        info = self.tensors[name]
        header = self._parts[info.part]
        kind = self.package.GGMLQuantizationType[info.kind]
        block, size = self.package.GGML_QUANT_SIZES[kind]
        elements = int(np.prod(info.shape, dtype=np.int64))
        raw = np.frombuffer(header.data, np.uint8, elements // block * size, info.offset)
        if info.kind in FLOATS:
            # As integers of the width, which torch turns into floats of any kind.
            dtype = FLOATS[info.kind]
            words = raw.view(np.dtype(f"i{dtype.itemsize}").newbyteorder(header.order)).astype(f"i{dtype.itemsize}")
            return torch.from_numpy(words).view(dtype).reshape(info.shape)
        try:
            rows = raw.reshape(*info.shape[:-1], info.shape[-1] // block * size)
            values = self.package.dequantize(rows, kind)
        except (NotImplementedError, IndexError) as error:
            raise ConversionError(
                f"The tensor {name} of {self.path} has the number format {info.kind}, which the package `gguf` does not "
                "turn into floats. Use a file of another quantisation."
            ) from error
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    def header(self, name: str) -> torch.Tensor:
        """Shape and dtype of what `load` gives, as a tensor without values."""
        info = self.tensors[name]
        return torch.empty(info.shape, dtype=FLOATS.get(info.kind, torch.float32), device="meta")

    def paths(self) -> list[Path]:
        """Of all parts, in order."""
        return [part.path for part in self._parts]

    def same_bytes(self, a: str, b: str) -> bool:
        """Whether two tensors are stored alike to the byte."""
        first, second = self.tensors[a], self.tensors[b]
        if (first.kind, first.shape) != (second.kind, second.shape):
            return False
        return torch.equal(self.load(a), self.load(b))

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata.get("general.architecture", ""))

    @cached_property
    def dtype(self) -> torch.dtype:
        """
        One dtype that holds every value: half precision where the file's matrices have one kind of it and the float32
        values beside them (llama.cpp writes norms and biases so) fit, else float32.
        """
        kinds = {info.kind for info in self.tensors.values()}
        halves = kinds & {"F16", "BF16"}
        if len(halves) != 1 or kinds - halves - {"F32"}:
            return torch.float32
        half = FLOATS[halves.pop()]
        for name, info in self.tensors.items():
            if info.kind == "F32" and not name.startswith("rope_"):
                values = self.load(name)
                if not torch.equal(values.to(half).float(), values):
                    return torch.float32
        return half
