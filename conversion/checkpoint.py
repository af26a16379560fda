"""Reading and writing checkpoint folders: the files that transformers would load, tensor by tensor, never outside."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

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
        self._open: dict[str, Any] = {}
        self.files = self._files()

    def _files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if not self.file.endswith(".json"):
            return dict.fromkeys(self._tensors_of(self.file).keys(), self.file)
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
            present = set(self._tensors_of(file).keys())
            claimed = {name for name, where in weight_map.items() if where == file}
            if present != claimed:
                raise ConversionError(
                    f"{file} and {self.file} disagree about {sorted(present ^ claimed)[:5]}. "
                    "The checkpoint is damaged or two were mixed; fetch it again."
                )
        return weight_map

    def _tensors_of(self, file: str) -> Any:
        """What maps names to the tensors of a file: a safetensors handle, or the state dict in a pickle."""
        if file not in self._open:
            path = self.folder / file
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing. The checkpoint is incomplete; fetch it again.")
            self._open[file] = (_safetensors if file.endswith(".safetensors") else _unpickled)(path)
        return self._open[file]

    def names(self) -> list[str]:
        return list(self.files)

    def header(self, name: str) -> torch.Tensor:
        """Shape and dtype of a tensor, as one without values."""
        tensors = self._tensors_of(self.files[name])
        if isinstance(tensors, dict):
            return tensors[name].to("meta")
        entry = tensors.get_slice(name)
        return torch.empty(entry.get_shape(), dtype=dtype_of(entry.get_dtype()), device="meta")

    def dtype(self) -> torch.dtype:
        """What transformers takes for the dtype of the model where the config does not say: of the first float."""
        first = next(iter(self.files.values()), None)
        dtypes = [self.header(name).dtype for name, file in self.files.items() if file == first]
        return next((dtype for dtype in dtypes if dtype in FLOATS), torch.float32)

    def __call__(self, name: str) -> torch.Tensor:
        tensors = self._tensors_of(self.files[name])
        return tensors[name] if isinstance(tensors, dict) else tensors.get_tensor(name)


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


def _safetensors(path: Path) -> Any:
    with path.open("rb") as stream:
        if int.from_bytes(stream.read(8), "little") > MAX_HEADER_BYTES:
            raise ConversionError(f"{path.name} has an impossible header. The file is damaged; fetch it again.")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ConversionError(f"{path.name} is not a readable safetensors file ({error}). Fetch it again.") from error


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a pickle, mapped from the file; also one that a trainer has wrapped together with its own state."""
    try:
        # Only zipped files can be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # the unpickler meets damage with errors of every kind
        unsafe = isinstance(error, pickle.UnpicklingError)
        why = "holds other objects than tensors, and could run code" if unsafe else f"cannot be read ({error})"
        raise ConversionError(
            f"{path.name} {why}. Load it where you trust it, and save the model's state dict as safetensors."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ConversionError(
            f"{path.name} holds a {type(content).__name__}, no state dict. Save the model's state dict."
        )
    if strange := [name for name, value in content.items() if not isinstance(value, torch.Tensor)]:
        raise ConversionError(
            f"{path.name} holds {strange[0]!r}, which is no tensor. Save the model's state dict by itself."
        )
    return dict(content)


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
    tensors: Iterable[tuple[str, torch.Tensor]],
    headers: Mapping[str, torch.Tensor],
    folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """
    Write tensors as they come, with the index that transformers reads; no more than one of them is in memory.

    Args:
        tensors: with their names, in any order.
        headers: a tensor of the same shape and dtype for each, without values, in the order of the shards.
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
    streams, places, left = [], {}, [len(shard) for shard in shards]
    written = set()
    try:
        for number, (file, shard) in enumerate(zip(files, shards)):
            streams.append((folder / file).open("wb"))
            places |= {name: (number, offset) for name, offset in _write_header(streams[-1], shard).items()}
        progress = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="Writing weights", delay=1.0)
        with progress:
            for name, tensor in tensors:
                header = headers[name]
                if tensor.shape != header.shape or tensor.dtype != header.dtype or name in written:
                    raise RuntimeError(f"{name} is not the tensor that was announced.")
                number, offset = places[name]
                streams[number].seek(offset)
                streams[number].write(_bytes_of(tensor))
                written.add(name)
                progress.update(header.nbytes)
                left[number] -= 1
                if not left[number]:
                    _close(streams[number])
        if missing := headers.keys() - written:
            raise RuntimeError(f"{sorted(missing)[0]} was announced and did not come.")
    finally:
        for stream in streams:
            stream.close()
    if len(shards) == 1:
        return
    weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
    total_parameters = sum(header.numel() for header in headers.values())
    index = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


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
    stream.write(len(text).to_bytes(8, "little") + text)
    start = 8 + len(text)
    return {name: start + entries[name]["data_offsets"][0] for name in headers}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The values as they lie in a file, without a copy where they lie so already."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())


def _close(stream: Any) -> None:
    """Flush a file to the disk itself: a name that appears stands for bytes that stay."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


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
