"""The weights of a checkpoint folder: the files that transformers would load, tensor by tensor, and none outside."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from .companions import HUB_PATTERNS, model_folder, modules_of
from .errors import ConversionError
from .json_files import read_config_values, read_object
from .pickles import load_state_dict
from .tensor_files import FLOATS, Safetensors, Unread, changed, state_of


# Files of tensors that are given by themselves; their config.json lies beside them.
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
# The order in which transformers looks for weights. A file with a variant in its name (model.fp16.safetensors) is none.
SETS_OF_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def resolve_folder(source: str | Path) -> Path:
    """
    The local folder of a checkpoint: `source` itself, the folder of a file of weights or of an index, or the downloaded
    snapshot of a Hub id, with the one set of weights that transformers would load.

    Raises:
        FileNotFoundError: if there is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return model_folder(path)
    if path.is_file() and (path.suffix in WEIGHT_FILES or is_index(path.name)):
        return path.parent
    if path.exists() or len(Path(source).parts) != 2:
        raise FileNotFoundError(
            f"{source} is not a folder and not a Hub id. Give a folder with a config.json, or owner/name."
        )
    with fetching(source):
        folder = Path(snapshot_download(str(source), allow_patterns=[*HUB_PATTERNS, "README.md"]))
        modules = list(modules_of(folder))
        if modules:
            names = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)
            snapshot_download(str(source), allow_patterns=[f"{module}/{name}" for module in modules for name in names])
        model = model_folder(folder)
        within = "" if model == folder else f"{model.relative_to(folder).as_posix()}/"
        for name in sets_of_weights(model):
            # The indexes are among the small files.
            if not is_index(name):
                snapshot_download(str(source), allow_patterns=[within + name])
            if (model / name).is_file():
                if is_index(name):
                    shards = sorted({within + str(file) for file in weight_map(model / name).values()})
                    snapshot_download(str(source), allow_patterns=shards)
                break
        return model


@contextmanager
def fetching(source: str | Path) -> Iterator[None]:
    """Around requests to the Hub: what goes wrong there, in a sentence."""
    try:
        yield
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{source} is no folder here and could not be fetched from the Hub. Check the name and the connection."
        ) from error


def sets_of_weights(folder: Path) -> tuple[str, ...]:
    """The files or indexes among which the weights of a folder are looked for, first things first, as transformers does."""
    if not (folder / CONFIG_NAME).is_file():
        return SETS_OF_WEIGHTS
    named = read_config_values(folder / CONFIG_NAME).get("transformers_weights")
    if named is None:
        return SETS_OF_WEIGHTS
    if not (
        isinstance(named, str) and is_inside(named) and named.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise ConversionError(
            f"`transformers_weights` in {folder / CONFIG_NAME} is {str(named)[:200]!r}, and must name a safetensors file or "
            "its index in that folder. Correct it, or remove it to have the file with the usual name read."
        )
    return (named,)


def is_index(file: str) -> bool:
    """Whether a file, by its name, lists the files that weights are in; one may have a variant in it."""
    return file.endswith(".json") and ".index." in file


def is_inside(file: str) -> bool:
    """Whether a file's name, put after a folder's, stays in that folder."""
    path = PurePosixPath(file)
    strange = path.is_absolute() or PureWindowsPath(file).drive or "\\" in file
    return bool(path.parts) and not strange and ".." not in path.parts and len(file) <= 255


def weight_map(index: Path) -> dict[str, Any]:
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
        notes: where an index says something else than the files that it names.
        digests: tensor name -> SHA-256 of its bytes, of those that were read since `hash_what_is_read`; `None` before.

    Raises:
        FileNotFoundError: if there are no weights.
        ConversionError: for an index that points outside the folder, two values for one name or a broken file.
    """

    def __init__(self, folder: Path, file: str | None = None):
        self.folder = folder
        sets = sets_of_weights(folder) if file is None else SETS_OF_WEIGHTS
        present = [name for name in dict.fromkeys((*sets, *SETS_OF_WEIGHTS)) if (folder / name).is_file()]
        if file is None and sets != SETS_OF_WEIGHTS and sets[0] not in present:
            raise FileNotFoundError(
                f"`transformers_weights` in {folder / CONFIG_NAME} names {sets[0]!r}, which is missing. Fetch it, or "
                "remove the key to have the file with the usual name read."
            )
        if file is None and not present:
            raise FileNotFoundError(
                f"{folder} has no weights: no {', '.join(SETS_OF_WEIGHTS)}. Give the folder of a checkpoint with its "
                "weights, or load the model with transformers and save it again."
            )
        self.file = file or present[0]
        self.others = [name for name in present if name != self.file]
        self.notes: list[str] = []
        self.digests: dict[str, str] | None = None
        self._open: dict[str, Mapping[str, torch.Tensor | Unread]] = {}
        self._seen = {path: state_of(path) for path in (folder / CONFIG_NAME, folder / self.file)}
        self.files = self._files()

    def _files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if not is_index(self.file):
            return dict.fromkeys(self._tensors_of(self.file), self.file)
        named = weight_map(self.folder / self.file)
        for file in sorted(set(map(str, named.values()))):
            # transformers follows such paths; a malicious index could read any file of this machine.
            if not is_inside(file) or not file.endswith(WEIGHT_FILES):
                raise ConversionError(
                    f"{self.file} names the file {file[:200]!r}, which is no file of weights in its folder. Do not "
                    "trust this checkpoint."
                )
            if not (self.folder / file).is_file():
                raise FileNotFoundError(
                    f"{self.folder / self.file} names {file[:200]!r}, which is missing. The checkpoint is incomplete; "
                    "fetch it again."
                )
        return self._in_files(named)

    def _in_files(self, weight_map: Mapping[str, Any]) -> dict[str, str]:
        """
        The same by what the files of an index hold: transformers reads them whole, and the index only for their names.

        Raises:
            ConversionError: if two of them have other values for one name.
        """
        files: dict[str, str] = {}
        for file in sorted(set(weight_map.values())):
            for name in self._tensors_of(file):
                if name in files and not self._are_equal(name, files[name], file):
                    raise ConversionError(
                        f"{files[name]} and {file} have different values for {name}, and {self.file} names both files. Two "
                        "checkpoints were mixed; fetch one of them again into an empty folder."
                    )
                files.setdefault(name, file)
        right = {name: file for name, file in weight_map.items() if name in self._tensors_of(file)}
        if differing := sorted({*files, *weight_map} - right.keys()):
            some = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
            self.notes.append(f"Read what the files hold, as transformers does; {self.file} says otherwise of {some}")
        # In the order of the index, which older files keep.
        return {name: files[name] for name in weight_map if name in files} | files

    def _are_equal(self, name: str, *files: str) -> bool:
        first, second = (self._tensors_of(file)[name] for file in files)
        a, b = (tensor.load() if isinstance(tensor, Unread) else tensor for tensor in (first, second))
        return a.dtype == b.dtype and torch.equal(a, b)

    def _tensors_of(self, file: str) -> Mapping[str, torch.Tensor | Unread]:
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

    def stored(self, name: str) -> torch.Tensor | Unread:
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
                raise changed(path)


def weights_of(source: str | Path, folder: Path) -> Weights:
    """The weights of a source that `resolve_folder` found in `folder`: its own file, or what transformers would load."""
    path = Path(source).expanduser()
    return Weights(folder, path.name if path.is_file() else None)


def refuse_adapter(folder: Path) -> None:
    """
    `ConversionError` if an adapter lies beside a model: transformers applies it when it loads the model.

    A place for what converts adapters to take over.
    """
    if (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / CONFIG_NAME).is_file():
        raise ConversionError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG_NAME}) and no model. Merge it into its base (`merge_and_unload` of "
            "peft) and give the result, or convert it as an adapter (`hf-variants convert`)."
        )
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ConversionError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG_NAME}) beside the model, and transformers applies it on loading. "
            f"Merge it (`merge_and_unload` of peft) and convert the result, or move {ADAPTER_CONFIG_NAME} elsewhere to "
            "convert the model without it."
        )
