"""Writing tensors into safetensors files: by several threads, in little memory, hashed and looked through on the way."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .progress import Progress
from .tensor_files import NAMES_OF_DTYPES, PIECE_BYTES, Unread, bytes_of, is_finite


MAX_SHARD_BYTES = 5_000_000_000
# How much of tensors that are not unread may wait to be written, where they are small.
WAITING_BYTES = 2**26
# What cp writes at a time. Of much larger pieces, Linux takes up to ten times as long to find pages for them.
WRITE_BYTES = 2**17


def write_safetensors(
    tensors: Iterable[tuple[str, torch.Tensor | Unread]],
    headers: Mapping[str, torch.Tensor],
    folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    workers: int | None = None,
    digests: dict[str, str] | None = None,
    progress: Progress | None = None,
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


class _Writing:
    """
    Threads that write tensors. Each takes the next one and reads, hashes, looks through and writes it piece by piece, which
    is work of the processor's outside of Python's lock.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, torch.Tensor | Unread]],
        shards: list[_Shard],
        digests: dict[str, str] | None,
        flushing: "_Flushing",
        bar: Any,
        progress: Progress | None,
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

    def _take(self) -> tuple[str, torch.Tensor | Unread] | None:
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
                memory = bytes_of(piece)
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


def _in_memory(tensor: torch.Tensor | Unread) -> int:
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


def _pieces_of(tensor: torch.Tensor | Unread) -> Iterator[torch.Tensor]:
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
