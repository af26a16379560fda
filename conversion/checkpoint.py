"""Reading and writing checkpoint folders: the files that transformers would load, tensor by tensor, never outside."""

import errno
import json
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
        self._open: dict[str, Mapping[str, torch.Tensor | Unread]] = {}
        self._seen = {path: _state(path) for path in (folder / CONFIG_NAME, folder / self.file)}
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
            self._seen[path] = _state(path)
            self._open[file] = (_Safetensors if file.endswith(".safetensors") else load_state_dict)(path)
        return self._open[file]

    def names(self) -> list[str]:
        return list(self.files)

    def stored(self, name: str) -> "torch.Tensor | Unread":
        """A tensor for whoever needs no values but copies them."""
        return self._tensors_of(self.files[name])[name]

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
            if _state(path) != state:
                raise _changed(path)


def _state(path: Path) -> tuple[int, ...] | None:
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


# How much of a tensor is in memory while it is copied; about what a processor's cache holds.
PIECE_BYTES = 2**22


class Unread:
    """
    A tensor whose values lie in a file.

    Args:
        header: its shape and dtype, as a tensor without values.
        path, state: of the file, and what `_state` said of it when it was opened.
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

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def to(self, dtype: torch.dtype) -> "Unread":
        return Unread(self._stored, self._path, self._state, self._start, dtype)

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
        """
        The values in order, flat, each piece in the same memory as the one before.

        Raises:
            ConversionError: if the file is no longer what was opened.
        """
        left, width = self._stored.numel(), self._stored.element_size()
        buffer = torch.empty(min(left, max(piece_bytes // width, 1)), dtype=self._stored.dtype)
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
                left -= len(piece)
                if _state(self._path) != self._state:
                    raise _changed(self._path)
                yield piece.to(self.dtype)

    def load(self) -> torch.Tensor:
        values = next(self.pieces(self._stored.nbytes), None)
        return torch.empty(self.shape, dtype=self.dtype) if values is None else values.view(self.shape)


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


class _Safetensors(Mapping[str, Unread]):
    """The tensors of one file, none of which is read."""

    def __init__(self, path: Path):
        self._path, self._state = path, _state(path)
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
    finished: Callable[[Path], Any] = lambda path: None,
) -> list[str]:
    """
    Write tensors as they come, with the index that transformers reads; no more than one of them is in memory, and of one
    that is unread a small piece.

    Args:
        tensors: with their names, in any order.
        headers: a tensor of the same shape and dtype for each, without values, in the order of the shards.
        finished: told the path of every file that has all of its bytes.

    Returns:
        the names of tensors with NaN or infinite values.

    Raises:
        OSError: if the disk is full; as soon as that can be seen.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, header in headers.items():
        if shards[-1] and size + header.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = header
        size += header.nbytes
    numbered = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    files = numbered if len(shards) > 1 else [SAFE_WEIGHTS_NAME]
    total_bytes = sum(header.nbytes for header in headers.values())
    _refuse_full_disk(folder, total_bytes)
    streams, places, left = [], {}, [len(shard) for shard in shards]
    written, non_finite = set(), []
    progress = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="Writing weights", delay=1.0)
    try:
        for number, (file, shard) in enumerate(zip(files, shards)):
            streams.append((folder / file).open("wb", buffering=0))
            places |= {name: (number, offset) for name, offset in _write_header(streams[-1], shard).items()}
        with progress, _one_thread(), _Flushing() as flushing:
            for name, tensor in tensors:
                header = headers[name]
                if tensor.shape != header.shape or tensor.dtype != header.dtype or name in written:
                    raise RuntimeError(f"{name} is not the tensor that was announced.")
                number, offset = places[name]
                streams[number].seek(offset)
                all_finite = True
                for piece in _pieces_of(tensor):
                    all_finite = all_finite and is_finite(piece)
                    _write(streams[number], _bytes_of(piece))
                    flushing.after(streams[number], piece.nbytes)
                    progress.update(piece.nbytes)
                written.add(name)
                if not all_finite:
                    non_finite.append(name)
                left[number] -= 1
                if not left[number]:
                    flushing.finish(streams[number])
                    finished(folder / files[number])
        if missing := headers.keys() - written:
            raise RuntimeError(f"{sorted(missing)[0]} was announced and did not come.")
    finally:
        for stream in streams:
            stream.close()
    if len(shards) == 1:
        return non_finite
    weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
    total_parameters = sum(header.numel() for header in headers.values())
    index = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return non_finite


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
        flat = tensor.detach().contiguous().reshape(-1)
        yield from flat.split(max(PIECE_BYTES // flat.element_size(), 1))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinite values."""
    # NaN and infinities come through to the extremes, which are found in one pass without a copy.
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


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
        self._running: Future | None = None
        self._bytes = 0

    def after(self, stream: Any, count: int) -> None:
        """That many bytes were written."""
        self._bytes += count
        if self._bytes >= self.INTERVAL and (self._running is None or self._running.done()):
            self._start(stream)

    def _start(self, stream: Any) -> None:
        self._wait()
        self._bytes = 0
        self._running = self._pool.submit(os.fsync, stream.fileno())

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()

    def finish(self, stream: Any) -> None:
        """The last bytes of a file were written."""
        self._start(stream)

    def __enter__(self) -> "_Flushing":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._pool.shutdown()
        if kind is None:
            self._wait()


def _write_header(stream: Any, headers: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Write the head of a safetensors file; returns where in the file the bytes of each tensor go."""
    # The widest first, so that every tensor is aligned to its dtype.
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


def refuse_occupied(destination: str | Path) -> None:
    """`FileExistsError` if a folder could not become `destination`: asked before long work, and again by `new_folder`."""
    target = Path(destination).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{destination} exists and is not empty. Choose another folder or remove it.")


UNFINISHED = "unfinished"


@contextmanager
def new_folder(destination: str | Path) -> Iterator[Path]:
    """
    A temporary folder beside `destination` that becomes it when the block ends well, and vanishes otherwise, also when
    the process is told to end. What earlier runs left behind when they were killed is named and removed.

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
    _remove_leftovers(target)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.{UNFINISHED}-", dir=place))
    with _held(temporary), _ended_by_signal():
        try:
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    _flush(path)
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


def _remove_leftovers(target: Path) -> None:
    """Remove what runs for the same destination left behind when they were killed; those that still run are held."""
    pattern = re.compile(re.escape(f".{target.name}.{UNFINISHED}-") + r"\w{8}")
    for path in sorted(target.parent.iterdir()):
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with _held(path) as is_abandoned:
                if is_abandoned:
                    logger.warning(f"Removing {path}, which an earlier run left unfinished.")
                    shutil.rmtree(path, ignore_errors=True)


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
