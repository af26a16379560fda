"""Reading and writing checkpoint folders: the files that transformers would load, tensor by tensor, never outside."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)

from .companions import HUB_PATTERNS
from .errors import ConversionError
from .json_files import read_object
from .pickles import load_state_dict


try:
    import fcntl
except ImportError:  # no such module on Windows
    fcntl = None

logger = logging.get_logger(__name__)

# A header larger than this is no header; the format's own limit is 100 MB.
MAX_HEADER_BYTES = 100_000_000
MAX_SHARD_BYTES = 5_000_000_000


# Files of tensors that are given by themselves; their config.json lies beside them.
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
# The order in which transformers looks for weights. A file with a variant in its name (model.fp16.safetensors) is none.
SETS_OF_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def resolve_folder(source: str | Path) -> Path:
    """
    The local folder of a checkpoint: `source` itself, the folder of a file of weights, or the downloaded snapshot of a
    Hub id, with the one set of weights that transformers would load.

    Raises:
        FileNotFoundError: if there is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix in WEIGHT_FILES:
        return path.parent
    if path.exists() or len(Path(source).parts) != 2:
        raise FileNotFoundError(
            f"{source} is not a folder and not a Hub id. Give a folder with a config.json, or owner/name."
        )
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=[*HUB_PATTERNS, "README.md"]))
        for name in SETS_OF_WEIGHTS:
            # The indexes are among the small files.
            is_index = name.endswith(".json")
            if not is_index:
                snapshot_download(str(source), allow_patterns=[name])
            if (folder / name).is_file():
                if is_index:
                    shards = sorted({str(file) for file in _weight_map(folder / name).values()})
                    snapshot_download(str(source), allow_patterns=shards)
                break
        return folder
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{source} is no folder here and could not be fetched from the Hub. Check the name and the connection."
        ) from error


def _weight_map(index: Path) -> dict[str, Any]:
    """Tensor name -> file name, as an index says."""
    content = read_object(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} has no `weight_map` of tensors. The checkpoint is damaged; fetch it again.")
    if not isinstance(content.get("metadata", {}), dict):
        raise ConversionError(f"`metadata` in {index} is no map. The checkpoint is damaged; fetch it again.")
    return weight_map


class Weights:
    """
    The tensors of a checkpoint by name, loaded one at a time.

    Args:
        folder (`Path`): of the checkpoint.
        file (`str`, *optional*): the one file, or the index, to read; by default what transformers would load.

    Attributes:
        files: tensor name -> name of the file that holds it.
        file: the file or index that was read.
        others: names of further sets of weights in the folder, which transformers leaves alone as well.
        digests: tensor name -> SHA-256 of its bytes, of those that were read since `hash_what_is_read`; `None` before.

    Raises:
        FileNotFoundError: if there are no weights.
        ConversionError: for an index that points outside the folder, duplicate names or a broken file.
    """

    def __init__(self, folder: Path, file: str | None = None):
        self.folder = folder
        present = [name for name in SETS_OF_WEIGHTS if (folder / name).is_file()]
        if file is None and not present:
            raise FileNotFoundError(
                f"{folder} has no weights: no {', '.join(SETS_OF_WEIGHTS)}. Give the folder of a checkpoint with its "
                "weights, or load the model with transformers and save it again."
            )
        self.file = file or present[0]
        self.others = [name for name in present if name != self.file]
        self.digests: dict[str, str] | None = None
        self._open: dict[str, Mapping[str, torch.Tensor | Unread]] = {}
        self._seen = {path: state_of(path) for path in (folder / CONFIG_NAME, folder / self.file)}
        self.files = self._files()

    def _files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if not self.file.endswith(".json"):
            return dict.fromkeys(self._tensors_of(self.file), self.file)
        weight_map = _weight_map(self.folder / self.file)
        suffix = ".safetensors" if "safetensors" in self.file else ".bin"
        for file in sorted(set(map(str, weight_map.values()))):
            # transformers follows such paths; a malicious index could read any file of this machine.
            if Path(file).name != file or not file.endswith(suffix) or len(file) > 255:
                raise ConversionError(
                    f"{self.file} names the file {file[:200]!r}, which is not a plain {suffix} file of its folder. Do not "
                    "trust this checkpoint."
                )
            if not (self.folder / file).is_file():
                raise FileNotFoundError(
                    f"{self.folder / self.file} names {file[:200]!r}, which is missing. The checkpoint is incomplete; "
                    "fetch it again."
                )
            present = set(self._tensors_of(file))
            claimed = {name for name, where in weight_map.items() if where == file}
            if present != claimed:
                raise ConversionError(
                    f"{file} and {self.file} disagree about {sorted(present ^ claimed)[:5]}. "
                    "The checkpoint is damaged or two were mixed; fetch it again."
                )
        return weight_map

    def _tensors_of(self, file: str) -> "Mapping[str, torch.Tensor | Unread]":
        """The tensors of a file by name: those of a safetensors file unread, those of a pickle mapped from it."""
        if file not in self._open:
            path = self.folder / file
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing. The checkpoint is incomplete; fetch it again.")
            self._seen[path] = state_of(path)
            self._open[file] = (Safetensors if file.endswith(".safetensors") else load_state_dict)(path)
        return self._open[file]

    def names(self) -> list[str]:
        return list(self.files)

    def stored(self, name: str) -> "torch.Tensor | Unread":
        """A tensor for whoever needs no values but copies them."""
        stored = self._tensors_of(self.files[name])[name]
        if isinstance(stored, Unread) and self.digests is not None:
            stored.note_digest(self.digests, name)
        return stored

    def hash_what_is_read(self) -> bool:
        """Have `digests` filled as tensors pass by on their way elsewhere; whether the files allow it."""
        if all(file.endswith(".safetensors") for file in self.files.values()):
            self.digests = {}
        return self.digests is not None

    def header(self, name: str) -> torch.Tensor:
        """Shape and dtype of a tensor, as one without values."""
        stored = self.stored(name)
        return stored.header if isinstance(stored, Unread) else stored.to("meta")

    def dtype(self) -> torch.dtype:
        """What transformers takes for the dtype of the model where the config does not say: of the first float."""
        first = next(iter(self.files.values()), None)
        dtypes = [self.header(name).dtype for name, file in self.files.items() if file == first]
        return next((dtype for dtype in dtypes if dtype in FLOATS), torch.float32)

    def __call__(self, name: str) -> torch.Tensor:
        stored = self.stored(name)
        return stored.load() if isinstance(stored, Unread) else stored

    def refuse_changed(self) -> None:
        """`ConversionError` if config or weights are no longer the files that were opened."""
        for path, state in self._seen.items():
            if state_of(path) != state:
                raise _changed(path)


def state_of(path: Path) -> tuple[int, ...] | None:
    """What differs after a file was written to or replaced."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _changed(path: Path) -> ConversionError:
    return ConversionError(
        f"{path} changed while it was read, so that the result would be of two checkpoints. Run it again when nothing "
        "writes there any more."
    )


# How much of a tensor is in memory while it is copied; what the cache of one core holds, in which it is read, hashed, looked
# at and written.
PIECE_BYTES = 2**20


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
        hashed = None if self._digests is None else hashlib.sha256()
        # Read, not mapped: of a mapped file that is cut, a process dies.
        with self._path.open("rb", buffering=0) as stream:
            stream.seek(self._start)
            while left:
                piece = buffer[:left]
                memory = _bytes_of(piece)
                while memory:
                    if not (count := stream.readinto(memory)):
                        raise _changed(self._path)
                    memory = memory[count:]
                if hashed is not None:
                    hashed.update(_bytes_of(piece))
                left -= len(piece)
                if state_of(self._path) != self._state:
                    raise _changed(self._path)
                yield piece.to(self.dtype)
        if hashed is not None and self._digests is not None:
            self._digests[self._name] = hashed.hexdigest()

    def load(self) -> torch.Tensor:
        # To the end, which is where the digest is noted.
        values = list(self.pieces(max(self._stored.nbytes, 1)))
        return values[0].view(self.shape) if values else torch.empty(self.shape, dtype=self.dtype)


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype for the one of a safetensors header."""
    if name not in DTYPES:
        raise ConversionError(
            f"The dtype {name} is none that torch computes with. Use the checkpoint before it was packed."
        )
    return DTYPES[name]


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


def weights_of(source: str | Path, folder: Path) -> Weights:
    """The weights of a source that `resolve_folder` found in `folder`: its own file, or what transformers would load."""
    path = Path(source).expanduser()
    return Weights(folder, path.name if path.is_file() else None)


def refuse_adapter(folder: Path) -> None:
    """
    `ConversionError` if an adapter lies beside a model: transformers applies it when it loads the model.

    A place for what converts adapters to take over.
    """
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ConversionError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG_NAME}) beside the model, and transformers applies it on loading. "
            f"Merge it (`merge_and_unload` of peft) and convert the result, or move {ADAPTER_CONFIG_NAME} elsewhere to "
            "convert the model without it."
        )


def write_safetensors(
    tensors: Iterable[tuple[str, "torch.Tensor | Unread"]],
    headers: Mapping[str, torch.Tensor],
    folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    workers: int | None = None,
    digests: dict[str, str] | None = None,
    progress: "Progress | None" = None,
) -> list[str]:
    """
    Write tensors as they come, with the index that transformers reads. In memory are no more of them than there are
    workers, in all some 64 MB or one tensor, and of one that is unread a small piece.

    Args:
        tensors: with their names, in any order.
        headers: a tensor of the same shape and dtype for each, without values, in the order of the shards.
        workers: how many threads read, hash, look through and write; by default one for each of up to four cores.
        digests: filled with the SHA-256 of the bytes of each.
        progress: of an earlier run, whose finished files stay, and of this one.

    Returns:
        the names of tensors with NaN or infinite values.

    Raises:
        OSError: if the disk is full; as soon as that can be seen.
    """
    shards = [_Shard(folder / file, inside) for file, inside in in_shards(headers, max_shard_bytes).items()]
    kept = {} if progress is None else progress.kept
    written = {name: digest for entry in kept.values() for name, digest in entry.tensors.items()}
    non_finite = {name for entry in kept.values() for name in entry.non_finite}
    if digests is not None:
        digests |= written
    to_write = [shard for shard in shards if shard.path.name not in kept]
    total_bytes = sum(header.nbytes for header in headers.values())
    left_bytes = sum(header.nbytes for shard in to_write for header in shard.headers.values())
    _refuse_full_disk(folder, left_bytes)
    bar = tqdm(
        total=total_bytes,
        initial=total_bytes - left_bytes,
        unit="B",
        unit_scale=True,
        desc="Writing weights",
        delay=1.0,
    )
    try:
        with bar, _one_thread(), _Flushing() as flushing:
            writing = _Writing(tensors, to_write, digests, flushing, bar, progress, written.keys())
            non_finite |= writing.run(workers or _cores())
    finally:
        for shard in to_write:
            shard.close()
    if missing := [name for shard in to_write for name in shard.headers if name not in writing.written]:
        raise RuntimeError(f"{sorted(missing)[0]} was announced and did not come.")
    named = [name for name in headers if name in non_finite]
    if len(shards) == 1:
        return named
    weight_map = {name: shard.path.name for shard in shards for name in shard.headers}
    total_parameters = sum(header.numel() for header in headers.values())
    index = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return named


def _cores() -> int:
    """How many threads write by default: more than four are faster than most disks."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 4)


class _Shard:
    """A file of tensors, which are written in any order and by several threads; it is open from the first to the last."""

    def __init__(self, path: Path, headers: dict[str, torch.Tensor]):
        self.path, self.headers = path, headers
        self.left = len(headers)
        self._stream: Any = None
        self._places: dict[str, int] = {}

    def open(self) -> None:
        if self._stream is None:
            self._stream = self.path.open("wb", buffering=0)
            self._places = _write_header(self._stream, self.headers)

    @contextmanager
    def at(self, name: str) -> Iterator[Any]:
        """A stream of its own at the place of a tensor."""
        with self.path.open("r+b", buffering=0) as stream:
            stream.seek(self._places[name])
            yield stream

    def flush(self) -> None:
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def in_shards(headers: Mapping[str, torch.Tensor], max_shard_bytes: int) -> dict[str, dict[str, torch.Tensor]]:
    """File name -> the tensors that go into it, in their order."""
    groups: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, header in headers.items():
        if groups[-1] and size + header.nbytes > max_shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = header
        size += header.nbytes
    if len(groups) == 1:
        return {SAFE_WEIGHTS_NAME: groups[0]}
    return {f"model-{n + 1:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups)}


# How much of tensors that are not unread may wait to be written, where they are small.
WAITING_BYTES = 2**26


class _Writing:
    """
    Threads that write tensors. Each takes the next one and reads, hashes, looks through and writes it piece by piece, which
    is work of the processor's outside of Python's lock.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, "torch.Tensor | Unread"]],
        shards: list[_Shard],
        digests: dict[str, str] | None,
        flushing: "_Flushing",
        bar: Any,
        progress: "Progress | None",
        kept: Set[str],
    ):
        self.written: set[str] = set()
        self._tensors = iter(tensors)
        self._shards = {name: shard for shard in shards for name in shard.headers}
        self._digests, self._flushing, self._bar = digests, flushing, bar
        self._progress, self._kept = progress, kept
        self._non_finite: set[str] = set()
        self._turn, self._noting = threading.Condition(), threading.Lock()
        self._waiting = 0
        self._stopped = False

    def run(self, workers: int) -> set[str]:
        """Write everything; returns the names of tensors with NaN or infinite values."""
        with ThreadPoolExecutor(workers) as pool:
            running = [pool.submit(self._work) for _ in range(workers)]
            try:
                wait(running, return_when=FIRST_EXCEPTION)
            finally:
                with self._turn:
                    self._stopped = True
                    self._turn.notify_all()
        for future in running:
            future.result()
        return self._non_finite

    def _work(self) -> None:
        try:
            while (size := self._write_next()) is not None:
                with self._turn:
                    self._waiting -= size
                    self._turn.notify_all()
        except BaseException:
            self._stopped = True
            raise

    def _take(self) -> tuple[str, "torch.Tensor | Unread"] | None:
        """The next tensor, when those that wait to be written leave memory for it; `None` at the end."""
        with self._turn:
            while self._waiting >= WAITING_BYTES and not self._stopped:
                self._turn.wait()
            for name, tensor in self._tensors if not self._stopped else ():
                # Of a file that an earlier run finished.
                if name in self._kept:
                    continue
                shard = self._shards[name]
                header = shard.headers[name]
                if tensor.shape != header.shape or tensor.dtype != header.dtype or name in self.written:
                    raise RuntimeError(f"{name} is not the tensor that was announced.")
                self.written.add(name)
                shard.open()
                self._waiting += _in_memory(tensor)
                return name, tensor
        return None

    def _write_next(self) -> int | None:
        """Write one tensor; how much memory it took, or `None` if there is none."""
        taken = self._take()
        if taken is None:
            return None
        name, tensor = taken
        shard = self._shards[name]
        is_hashed = isinstance(tensor, Unread) and tensor.is_hashed
        hashed = hashlib.sha256() if self._digests is not None and not is_hashed else None
        all_finite = True
        with shard.at(name) as stream:
            for piece in _pieces_of(tensor):
                if self._stopped:
                    return None
                memory = _bytes_of(piece)
                if hashed is not None:
                    hashed.update(memory)
                all_finite = all_finite and is_finite(piece)
                _write(stream, memory)
                with self._noting:
                    self._flushing.after(shard, len(memory))
                    self._bar.update(len(memory))
        with self._noting:
            if self._digests is not None:
                self._digests[name] = tensor.digest if hashed is None else hashed.hexdigest()
            if not all_finite:
                self._non_finite.add(name)
            shard.left -= 1
            if not shard.left:
                self._flushing.finish(shard, self._note_finished)
        return _in_memory(tensor)

    def _note_finished(self, shard: _Shard) -> None:
        """All bytes of a file are on the disk."""
        shard.close()
        if self._progress is not None and self._digests is not None:
            with self._noting:
                tensors = {name: self._digests[name] for name in shard.headers}
                self._progress.add(shard.path.name, tensors, sorted(self._non_finite.intersection(tensors)))


def _in_memory(tensor: "torch.Tensor | Unread") -> int:
    """How much of it is there before it is read."""
    return 0 if isinstance(tensor, Unread) else tensor.nbytes


@contextmanager
def _one_thread() -> Iterator[None]:
    """
    Have torch compute in the thread that calls it.

    Its threads wait for each other at the end of every piece, however short; where others keep the cores busy, hashes for
    example, that takes longer than the pieces.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _refuse_full_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(
            f"The weights take {size:,} bytes, and {folder.parent} has {free:,} left. Free some space, or write to "
            "another disk."
        )


def _pieces_of(tensor: "torch.Tensor | Unread") -> Iterator[torch.Tensor]:
    """The values in row-major order, flat."""
    if isinstance(tensor, Unread):
        yield from tensor.pieces()
    elif tensor.numel():
        tensor = tensor.detach()
        is_transposed = tensor.ndim == 2 and not tensor.is_contiguous() and tensor.t().is_contiguous()
        if is_transposed:
            yield from _rows_of_transposed(tensor)
            return
        flat = tensor.contiguous().reshape(-1)
        yield from flat.split(max(PIECE_BYTES // flat.element_size(), 1))


def _rows_of_transposed(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values of a matrix that lies in memory column by column, some rows at a time, in the same memory."""
    rows, columns = tensor.shape
    count = min(max(PIECE_BYTES // (columns * tensor.element_size()), 1), rows)
    # torch transposes a matrix fast if that is all of a piece of memory, and faster still what a cache holds.
    lying = torch.empty(columns, count, dtype=tensor.dtype)
    standing = torch.empty(count, columns, dtype=tensor.dtype)
    for first in range(0, rows, count):
        some = tensor[first : first + count]
        if len(some) < count:
            lying, standing = lying.new_empty(columns, len(some)), standing[: len(some)]
        lying.copy_(some.t())
        standing.copy_(lying.t())
        yield standing.reshape(-1)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinite values."""
    # NaN and infinities come through to the extremes, which are found in one pass without a copy.
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))


# What cp writes at a time. Of much larger pieces, Linux takes up to ten times as long to find pages for them.
WRITE_BYTES = 2**17


def _write(stream: Any, memory: memoryview) -> None:
    while memory:
        memory = memory[stream.write(memory[:WRITE_BYTES]) :]


class _Flushing:
    """
    Has the system write files to the disk while more is written to them, so that there is little to wait for at the end:
    a name that appears stands for bytes that stay.
    """

    INTERVAL = 2**26

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._running: list[Future] = []
        self._bytes = 0

    def after(self, shard: _Shard, count: int) -> None:
        """That many bytes were written."""
        self._bytes += count
        if self._bytes >= self.INTERVAL and all(future.done() for future in self._running):
            self._start(shard.flush)

    def _start(self, flush: Callable[[], None]) -> None:
        self._bytes = 0
        waiting = []
        for future in self._running:
            if future.done():
                future.result()
            else:
                waiting.append(future)
        self._running = [*waiting, self._pool.submit(flush)]

    def finish(self, shard: _Shard, then: Callable[[_Shard], None]) -> None:
        """The last bytes of a file were written; `then` is told when they are on the disk."""

        def flush() -> None:
            shard.flush()
            then(shard)

        self._start(flush)

    def __enter__(self) -> "_Flushing":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._pool.shutdown()
        if kind is None:
            for future in self._running:
                future.result()


def _write_header(stream: Any, headers: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Write the head of a safetensors file; returns where in the file the bytes of each tensor go."""
    # As safetensors orders them: the widest first, so that every tensor is aligned to its dtype, then by name.
    ordered = sorted(headers.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, header in ordered:
        entries[name] = {
            "dtype": NAMES_OF_DTYPES[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [offset, offset + header.nbytes],
        }
        offset += header.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _write(stream, memoryview(len(text).to_bytes(8, "little") + text))
    start = 8 + len(text)
    return {name: start + entries[name]["data_offsets"][0] for name in headers}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The values as they lie in a file, without a copy where they lie so already."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())


UNFINISHED = "unfinished"


def _is_leftover(path: Path, target: Path) -> bool:
    """Whether it is what a run for `target` was in when it was killed."""
    is_named_so = re.fullmatch(re.escape(f".{target.name}.{UNFINISHED}-") + r"\w{8}", path.name)
    return bool(is_named_so) and path.is_dir() and not path.is_symlink()


def refuse_occupied(destination: str | Path) -> None:
    """`FileExistsError` if a folder could not become `destination`: asked before long work, and again by `new_folder`."""
    target = Path(destination).expanduser()
    if target.exists() and (
        not target.is_dir() or any(not _is_leftover(path, target.resolve()) for path in target.iterdir())
    ):
        raise FileExistsError(f"{destination} exists and is not empty. Choose another folder or remove it.")


@contextmanager
def new_folder(destination: str | Path, task: str | None = None) -> Iterator[Path]:
    """
    A temporary folder beside `destination` that becomes it when the block ends well, and vanishes otherwise, also when
    the process is told to end. What earlier runs left behind when they were killed is named and removed, or gone on with.

    Args:
        task: what is done, as `Progress` knows it, where an earlier run of the same may be gone on with; the folder then
            holds its progress, and files of which only that says whether they are whole.

    Raises:
        FileExistsError: if `destination` exists and is not empty.
    """
    target = Path(destination).expanduser()
    refuse_occupied(destination)
    # Such a folder cannot be replaced: it is filled.
    stays = target.is_dir() and (os.path.ismount(target) or target.samefile(os.curdir))
    target = target.resolve()
    place = target if stays else target.parent
    place.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        temporary = _leftover(target, place, task, held)
        if temporary is None:
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.{UNFINISHED}-", dir=place))
            held.enter_context(_held(temporary))
        held.enter_context(_ended_by_signal())
        try:
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    _flush(path)
            (temporary / PROGRESS).unlink(missing_ok=True)
            _flush(temporary)
            if stays:
                # What makes it a checkpoint comes last.
                for path in sorted(temporary.iterdir(), key=lambda path: path.name == CONFIG_NAME):
                    path.rename(target / path.name)
                temporary.rmdir()
            else:
                if target.exists():
                    target.rmdir()
                temporary.chmod(0o755)
                temporary.rename(target)
            _flush(place)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _flush(path: Path) -> None:
    """Have the system write a file or the entries of a folder to the disk, where it can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder as this process's own, until it ends in whatever way; whether that was possible."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _leftover(target: Path, place: Path, task: str | None, held: ExitStack) -> Path | None:
    """
    What a run of the same task left behind when it was killed, in which to go on, held from now on. Those that runs of
    other tasks left for the destination are removed; those of runs that still go on are held by them.
    """
    found: Path | None = None
    inside = target.iterdir() if target.is_dir() else ()
    for path in sorted([*target.parent.iterdir(), *inside]):
        if not _is_leftover(path, target):
            continue
        with ExitStack() as until_here:
            if not until_here.enter_context(_held(path)):
                continue
            if found is None and task is not None and path.parent == place and Progress.task_in(path) == task:
                logger.warning(f"Going on in {path}, which an earlier run left unfinished.")
                found = path
                held.enter_context(until_here.pop_all())
            else:
                logger.warning(f"Removing {path}, which an earlier run left unfinished.")
                shutil.rmtree(path, ignore_errors=True)
    return found


PROGRESS = "progress.json"


class Finished(NamedTuple):
    """A file of weights that has all of its bytes: SHA-256 of its tensors', and which of them have NaN or infinities."""

    tensors: dict[str, str]
    non_finite: list[str]


class Progress:
    """
    What of a task is on the disk already, so that a run goes on where one that was killed stopped.

    Args:
        folder: in which the task is done. What an earlier run finished there stays, after a look at the hashes of its
            bytes; whatever else it left is removed.
        task: of which the same value stands for the same bytes in every file.
        files: that are to be written, with the tensors of each.
        digests: of the source's tensors; they are noted as well.

    Attributes:
        kept: what was there already.
        source: SHA-256 of the source's tensors that the earlier run read.
    """

    def __init__(
        self,
        folder: Path,
        task: str,
        files: Mapping[str, Mapping[str, torch.Tensor]],
        digests: dict[str, str] | None = None,
    ):
        self._folder, self._task, self._digests = folder, task, digests
        self.source: dict[str, str] = {}
        self.kept = self._keep(files)
        self._files = dict(self.kept)
        self._write()

    @staticmethod
    def task_in(folder: Path) -> str | None:
        """The task of the run that left a folder, if it says so."""
        try:
            return json.loads((folder / PROGRESS).read_text(encoding="utf-8"))["task"]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _keep(self, files: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Finished]:
        known = self._read()
        kept = {
            name: known[name] for name, headers in files.items()
            if name in known and self._is_whole(self._folder / name, headers, known[name].tensors)
        }  # fmt: skip
        for path in self._folder.iterdir():
            if path.name in kept:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        if known:
            logger.warning(f"{len(kept)} of {len(files)} files of weights are there, with the hashes that were noted.")
        return kept

    def _read(self) -> dict[str, Finished]:
        if self.task_in(self._folder) != self._task:
            return {}
        content = json.loads((self._folder / PROGRESS).read_text(encoding="utf-8"))
        try:
            self.source = dict(content["source"])
            return {name: Finished(dict(tensors), list(names)) for name, (tensors, names) in content["files"].items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            return {}

    @staticmethod
    def _is_whole(path: Path, headers: Mapping[str, torch.Tensor], digests: Mapping[str, str]) -> bool:
        try:
            tensors = Safetensors(path)
        except (OSError, ValueError):
            return False
        if tensors.keys() != headers.keys() or digests.keys() != headers.keys():
            return False
        found: dict[str, str] = {}
        with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"Hashing {path.name}", delay=1.0) as bar:
            for name, header in headers.items():
                stored = tensors[name]
                if stored.shape != header.shape or stored.dtype != header.dtype:
                    return False
                stored.note_digest(found, name)
                for piece in stored.pieces():
                    bar.update(piece.nbytes)
        return found == dict(digests)

    def add(self, file: str, tensors: dict[str, str], non_finite: list[str]) -> None:
        """A file has all of its bytes, and they are on the disk."""
        self._files[file] = Finished(tensors, non_finite)
        self._write()

    def _write(self) -> None:
        source = self.source | (self._digests or {})
        content = {"task": self._task, "source": source, "files": self._files}
        new = self._folder / f"{PROGRESS}.new"
        with new.open("w", encoding="utf-8") as stream:
            json.dump(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(self._folder / PROGRESS)


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, where nobody else handles it."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


TensorSource = Callable[[str], torch.Tensor]
StoredSource = Callable[[str], torch.Tensor | Unread]
