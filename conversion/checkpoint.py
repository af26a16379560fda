"""Reading and writing checkpoint folders: safetensors only, shard by shard, never outside the folder."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .companions import HUB_PATTERNS
from .errors import ConversionError


# A header larger than this is no header; the format's own limit is 100 MB.
MAX_HEADER_BYTES = 100_000_000
MAX_SHARD_BYTES = 5_000_000_000


def resolve_folder(source: str | Path) -> Path:
    """
    The local folder of a checkpoint: `source` itself, or the downloaded snapshot of a Hub id.

    Raises:
        FileNotFoundError: if there is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or len(Path(source).parts) != 2:
        raise FileNotFoundError(
            f"{source} is not a folder and not a Hub id. Give a folder with a config.json, or owner/name."
        )
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.safetensors", "README.md", *HUB_PATTERNS]))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{source} is no folder here and could not be fetched from the Hub. Check the name and the connection."
        ) from error


class SafetensorsReader:
    """
    The tensors of a folder by name, loaded one at a time.

    Args:
        folder (`Path`): holds `model.safetensors`, or an index and its shards.

    Raises:
        FileNotFoundError: if there are no safetensors.
        ConversionError: for an index that points outside the folder, duplicate names or a broken file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = self._files()
        self._open: dict[str, safe_open] = {}

    def _files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index_path = self.folder / SAFE_WEIGHTS_INDEX_NAME
        if not index_path.is_file():
            if not (self.folder / SAFE_WEIGHTS_NAME).is_file():
                raise FileNotFoundError(
                    f"{self.folder} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}. "
                    "Load the checkpoint with transformers and save it again, which writes safetensors."
                )
            return dict.fromkeys(self._names_in(SAFE_WEIGHTS_NAME), SAFE_WEIGHTS_NAME)
        weight_map = json.loads(index_path.read_text()).get("weight_map", {})
        for file in sorted(set(weight_map.values()), key=str):
            # transformers follows such paths; a malicious index could read any file of this machine.
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ConversionError(
                    f"{SAFE_WEIGHTS_INDEX_NAME} names the file {file!r}, which is not a plain safetensors file of its "
                    "folder. Do not trust this checkpoint."
                )
            present = set(self._names_in(file))
            claimed = {name for name, where in weight_map.items() if where == file}
            if present != claimed:
                raise ConversionError(
                    f"{file} and {SAFE_WEIGHTS_INDEX_NAME} disagree about {sorted(present ^ claimed)[:5]}. "
                    "The checkpoint is damaged or two were mixed; fetch it again."
                )
        return weight_map

    def _names_in(self, file: str) -> list[str]:
        path = self.folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing. The checkpoint is incomplete; fetch it again.")
        with path.open("rb") as stream:
            if int.from_bytes(stream.read(8), "little") > MAX_HEADER_BYTES:
                raise ConversionError(f"{file} has an impossible header. The file is damaged; fetch it again.")
        try:
            with safe_open(path, framework="pt") as handle:
                return list(handle.keys())
        except SafetensorError as error:
            raise ConversionError(f"{file} is not a readable safetensors file ({error}). Fetch it again.") from error

    def names(self) -> list[str]:
        return list(self.files)

    def dtype(self) -> torch.dtype:
        """Of the first floating-point tensor."""
        tensors = (self(name) for name in self.files)
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)

    def __call__(self, name: str) -> torch.Tensor:
        file = self.files[name]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        return self._open[file].get_tensor(name)


def write_safetensors(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, total: int, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors as they come, a shard at a time, with the index that transformers reads."""
    shards: list[list[str]] = []
    current: dict[str, torch.Tensor] = {}
    size = total_bytes = total_parameters = 0

    def flush() -> None:
        nonlocal current, size
        save_file(current, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(current))
        current, size = {}, 0

    for name, tensor in tqdm(tensors, total=total, unit="tensor", desc="Writing weights", delay=1.0):
        nbytes = tensor.numel() * tensor.element_size()
        if current and size + nbytes > max_shard_bytes:
            flush()
        current[name] = tensor
        size += nbytes
        total_bytes += nbytes
        total_parameters += tensor.numel()
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / SAFE_WEIGHTS_NAME)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def refuse_occupied(destination: str | Path) -> None:
    """`FileExistsError` if a folder could not become `destination`: asked before long work, and again by `new_folder`."""
    target = Path(destination).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{destination} exists and is not empty. Choose another folder or remove it.")


@contextmanager
def new_folder(destination: str | Path) -> Iterator[Path]:
    """
    A temporary folder beside `destination` that becomes it when the block ends well, and vanishes otherwise.

    Raises:
        FileExistsError: if `destination` exists and is not empty.
    """
    target = Path(destination).expanduser()
    refuse_occupied(destination)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.chmod(0o755)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


TensorSource = Callable[[str], torch.Tensor]
