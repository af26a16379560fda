"""What a conversion would take, from the headers of its source alone: of a Hub id, nothing else is fetched."""

import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_safetensors_file_metadata, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, NotASafetensorsRepoError
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from . import tensor_writer
from .casting import as_dtype, cast_headers
from .checkpoint import fetching, weight_map
from .companions import HUB_PATTERNS, model_folder, modules_of, root_of
from .errors import ConversionError
from .foreign import is_foreign
from .gguf_source import is_gguf
from .opened_variant import OpenedVariant, open_variant
from .record import is_hub_id, weight_files
from .rules import Identity
from .tensor_files import Safetensors


# Large enough that opening and flushing files do not decide.
SAMPLE_BYTES = 256_000_000


@dataclass
class Plan:
    """
    What a conversion would take.

    Attributes:
        source: as the caller named it.
        model_type: the native type.
        tensors, parameters: how many of the result.
        read_bytes: of the source's weights.
        written: file of weights -> bytes of its tensors.
        rebuilt: the tensors of the result that more than change their names.
        largest_bytes: of the tensors that one step has in memory as a whole, with what it makes of them; 0 if none.
        free_bytes: of the destination's disk.
        bytes_per_second: of the result, as a sample took that was written there; 0 if none was.
        notes: what would be noted of the source.
    """

    source: str
    model_type: str
    tensors: int
    parameters: int
    read_bytes: int
    written: dict[str, int]
    rebuilt: int
    largest_bytes: int
    free_bytes: int
    bytes_per_second: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def write_bytes(self) -> int:
        return sum(self.written.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        lines = [
            f"**{self.model_type} -> variant**: {self.tensors} tensors, {self.parameters:,} parameters. Nothing is written.",
            f"- Reads {_gigabytes(self.read_bytes)}; writes {_gigabytes(self.write_bytes)} in {len(self.written)} files",
            f"- {_gigabytes(self.free_bytes)} are free there" + ("" if self.fits else ": NOT ENOUGH"),
            f"- {self.rebuilt} tensors are rebuilt, the others copied in small pieces"
            + (f"; the largest step has {_gigabytes(self.largest_bytes)} in memory" if self.rebuilt else ""),
        ]
        if self.bytes_per_second:
            minutes = self.write_bytes / self.bytes_per_second / 60
            lines.append(
                f"- About {minutes:.1f} minutes: a sample was read, hashed and written there at "
                f"{self.bytes_per_second / 1e6:.0f} MB/s"
            )
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])

    @property
    def fits(self) -> bool:
        """Whether the destination's disk has room."""
        return self.write_bytes <= self.free_bytes


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"


def plan(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    ignore_keys: Iterable[str] = (),
    max_shard_bytes: int = tensor_writer.MAX_SHARD_BYTES,
    workers: int | None = None,
    measure: bool = True,
) -> Plan:
    """
    What `convert` with the same arguments would take; it refuses what that refuses from names and headers.

    Args:
        source: a folder, a Hub id, of which only headers and small files are fetched, or a GGUF file.
        destination: the folder to create; where it would stand, a sample is written and removed.
        dtype, ignore_keys, max_shard_bytes, workers: as in `convert`.
        measure: write the sample, of 256 MB.

    Raises:
        as `convert`, before any weight is read; ConversionError for a repository without safetensors files.
    """
    if is_foreign(source):
        raise ConversionError(
            f"{source} is of another code base, whose files have no headers. Convert it without a plan."
        )
    target_dtype = as_dtype(dtype)
    place = _existing(Path(destination).expanduser().absolute())
    with _at_hand(source) as folder:
        opened = open_variant(folder, ignore_keys)
        if opened.native is None:
            raise ConversionError(f"{source} is a variant already. There is nothing to convert.")
        translation = opened.native.translation(opened.skeleton)
        header = opened.native.layout.header
        # In the order in which they are written.
        headers = translation.headers(header) | {name: opened.header(name) for name in opened.apart}
        headers = cast_headers(headers, target_dtype)
        shards = tensor_writer.in_shards(headers, max_shard_bytes)
        rebuilt = [step for step in translation.steps if type(step.rule.op) is not Identity]
        held = [
            sum(header(name).nbytes for name in step.sources) + sum(headers[name].nbytes for name in step.targets)
            for step in rebuilt
        ]
        made = Plan(
            source=str(source),
            model_type=opened.model_type,
            tensors=len(headers),
            parameters=sum(tensor.numel() for tensor in headers.values()),
            read_bytes=_stored(opened),
            written={file: sum(tensor.nbytes for tensor in inside.values()) for file, inside in shards.items()},
            rebuilt=sum(len(step.targets) for step in rebuilt),
            largest_bytes=max(held, default=0),
            free_bytes=shutil.disk_usage(place).free,
            notes=list(opened.native.notes),
        )
        for file, size in _of_modules(opened):
            made.written[file] = size
            made.read_bytes += size
    sample = min(SAMPLE_BYTES, made.write_bytes)
    # It is read from there as well.
    if measure and 2 * sample < made.free_bytes:
        made.bytes_per_second = _speed(place, sample, workers)
    return made


def _of_modules(opened: OpenedVariant) -> Iterator[tuple[str, int]]:
    """Weights of a sentence encoder's other modules, which are copied, with the bytes of their tensors."""
    if is_gguf(opened.source):
        return
    root = root_of(opened.path)
    for module in modules_of(root):
        if root / module == opened.path:
            continue
        for path in sorted((root / module).rglob(SAFE_WEIGHTS_NAME)):
            size = sum(tensor.header.nbytes for tensor in Safetensors(path).values())
            yield path.relative_to(root).as_posix(), size
        for path in sorted((root / module).rglob(WEIGHTS_NAME)):
            if not path.with_name(SAFE_WEIGHTS_NAME).is_file():
                # A pickle has no header, and little beside its tensors.
                yield path.with_name(SAFE_WEIGHTS_NAME).relative_to(root).as_posix(), path.stat().st_size


def _stored(opened: OpenedVariant) -> int:
    if is_gguf(opened.source):
        return os.path.getsize(opened.source)
    return sum(path.stat().st_size for path in weight_files(opened.path))


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


@contextmanager
def _at_hand(source: str | Path) -> Iterator[str | Path]:
    """A source that is here; of one on the Hub a folder that has headers, and holes where the weights are."""
    if not is_hub_id(source):
        yield source
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with fetching(source):
            try:
                small = Path(snapshot_download(str(source), allow_patterns=[*HUB_PATTERNS]))
                # Links of the cache become files.
                shutil.copytree(small, folder, dirs_exist_ok=True)
                model = model_folder(folder)
                within = "" if model == folder else f"{model.relative_to(folder).as_posix()}/"
                index = model / SAFE_WEIGHTS_INDEX_NAME
                files = set(map(str, weight_map(index).values())) if index.is_file() else {SAFE_WEIGHTS_NAME}
                for file in sorted(files):
                    if Path(file).name == file:
                        described = parse_safetensors_file_metadata(str(source), within + file)
                        _write_hollow(model / file, described)
                for module in modules_of(folder):
                    if (folder / module).is_dir() and folder / module != model:
                        _fetch_module(str(source), f"{module}/{SAFE_WEIGHTS_NAME}", folder)
            except (EntryNotFoundError, NotASafetensorsRepoError) as error:
                raise ConversionError(
                    f"{source} has no safetensors files, whose headers alone can be fetched. Download it, and plan the "
                    "folder."
                ) from error
        yield folder


def _fetch_module(source: str, file: str, folder: Path) -> None:
    """The header of a module's weights; many modules have none."""
    with suppress(EntryNotFoundError):
        _write_hollow(folder / file, parse_safetensors_file_metadata(source, file))


def _write_hollow(path: Path, described: Any) -> None:
    entries = {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": list(entry.data_offsets)}
        for name, entry in described.tensors.items()
    }
    header = json.dumps(entries | ({"__metadata__": described.metadata} if described.metadata else {})).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + max((entry["data_offsets"][1] for entry in entries.values()), default=0))


def _speed(place: Path, size: int, workers: int | None) -> float:
    """Bytes in a second on the way that tensors go which only change their names."""
    with tempfile.TemporaryDirectory(dir=place, prefix=".hf-variants-plan-") as name:
        folder = Path(name)
        part = torch.rand(max(size // 32, 4))
        save_file({str(number): part.clone() for number in range(8)}, folder / "sample.safetensors")
        tensors = Safetensors(folder / "sample.safetensors")
        (folder / "written").mkdir()
        digests: dict[str, str] = {}
        headers = {name: tensor.header for name, tensor in tensors.items()}
        start = time.perf_counter()
        tensor_writer.write_safetensors(tensors.items(), headers, folder / "written", workers=workers, digests=digests)
        return sum(header.nbytes for header in headers.values()) / (time.perf_counter() - start)
