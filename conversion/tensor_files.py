"""Tensors as they lie in safetensors files: known by their headers, read piece by piece, hashed as they pass."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .errors import ConversionError


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}
# A header larger than this is no header; the format's own limit is 100 MB.
MAX_HEADER_BYTES = 100_000_000
# How much of a tensor is in memory while it is copied; what the cache of one core holds, in which it is read, hashed, looked
# at and written.
PIECE_BYTES = 2**20


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype for the one of a safetensors header."""
    if name not in DTYPES:
        raise ConversionError(
            f"The dtype {name} is none that torch computes with. Use the checkpoint before it was packed."
        )
    return DTYPES[name]


def state_of(path: Path) -> tuple[int, ...] | None:
    """What differs after a file was written to or replaced."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def changed(path: Path) -> ConversionError:
    return ConversionError(
        f"{path} changed while it was read, so that the result would be of two checkpoints. Run it again when nothing "
        "writes there any more."
    )


class Unread:
    """
    A tensor whose values lie in a file.

    Args:
        header: its shape and dtype, as a tensor without values.
        path, state: of the file, and what `state_of` said of it when it was opened.
        start: where in the file its bytes begin; they are little-endian, in row-major order.
        dtype: to which the values are cast once they are read; by default none.
    """

    def __init__(
        self,
        header: torch.Tensor,
        path: Path,
        state: tuple[int, ...] | None,
        start: int,
        dtype: torch.dtype | None = None,
    ):
        self.header = header if dtype is None else header.to(dtype)
        self.shape, self.dtype = self.header.shape, self.header.dtype
        self._stored, self._path, self._state, self._start = header, path, state, start
        self._digests: dict[str, str] | None = None
        self._name = ""

    def note_digest(self, digests: dict[str, str], name: str) -> None:
        """Have the SHA-256 of the stored bytes put into `digests` under a name when they are read."""
        self._digests, self._name = digests, name

    @property
    def is_hashed(self) -> bool:
        """Whether the bytes come out as they are stored, and their SHA-256 is noted."""
        return self._digests is not None and self.dtype is self._stored.dtype

    @property
    def digest(self) -> str:
        """SHA-256 of the stored bytes, after they were read."""
        assert self._digests is not None
        return self._digests[self._name]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def to(self, dtype: torch.dtype) -> "Unread":
        cast = Unread(self._stored, self._path, self._state, self._start, dtype)
        cast._digests, cast._name = self._digests, self._name
        return cast

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
        """
        The values in order, flat, each piece in the same memory as the one before.

        Raises:
            ConversionError: if the file is no longer what was opened.
        """
        left, width = self._stored.numel(), self._stored.element_size()
        buffer = torch.empty(min(left, max(piece_bytes // width, 1)), dtype=self._stored.dtype)
        # Of the same file as it was, once is enough.
        hashed = None if self._digests is None or self._name in self._digests else hashlib.sha256()
        # Read, not mapped: of a mapped file that is cut, a process dies.
        with self._path.open("rb", buffering=0) as stream:
            stream.seek(self._start)
            while left:
                piece = buffer[:left]
                memory = bytes_of(piece)
                while memory:
                    if not (count := stream.readinto(memory)):
                        raise changed(self._path)
                    memory = memory[count:]
                if hashed is not None:
                    hashed.update(bytes_of(piece))
                left -= len(piece)
                if state_of(self._path) != self._state:
                    raise changed(self._path)
                yield piece.to(self.dtype)
        if hashed is not None and self._digests is not None:
            self._digests[self._name] = hashed.hexdigest()

    def load(self) -> torch.Tensor:
        # To the end, which is where the digest is noted.
        values = list(self.pieces(max(self._stored.nbytes, 1)))
        return values[0].view(self.shape) if values else torch.empty(self.shape, dtype=self.dtype)


class Safetensors(Mapping[str, Unread]):
    """The tensors of one file, none of which is read."""

    def __init__(self, path: Path):
        self._path, self._state = path, state_of(path)
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ConversionError(f"{path.name} has an impossible header. The file is damaged; fetch it again.")
            header = stream.read(length)
        try:
            # It checks that header and file fit each other; and transformers goes by its order of names.
            with safe_open(path, framework="pt") as opened:
                entries = json.loads(header)
                self._entries = {name: entries[name] for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConversionError(
                f"{path.name} is not a readable safetensors file ({error}). Fetch it again."
            ) from error
        self._start = 8 + length

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> Unread:
        entry = self._entries[name]
        header = torch.empty(entry["shape"], dtype=dtype_of(entry["dtype"]), device="meta")
        return Unread(header, self._path, self._state, self._start + entry["data_offsets"][0])


TensorSource = Callable[[str], torch.Tensor]
StoredSource = Callable[[str], torch.Tensor | Unread]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The values as they lie in a file, without a copy where they lie so already."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinite values."""
    # NaN and infinities come through to the extremes, which are found in one pass without a copy.
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))
