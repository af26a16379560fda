"""What transformers' testers import and its source archive does not ship: processes for the distributed ones."""

import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


__all__ = [
    "_get_distributed_backend",
    "_get_distributed_device_type",
    "_get_rank_device",
    "_set_rank_device",
    "_start_rank_processes",
    "run_distributed",
]

# Where one rank fails before a barrier, the others wait there, which gloo allows for half an hour.
SECONDS = 120


class ExportTesterMixin:
    """Export has tests of its own, in tests/tools/test_compile.py."""


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _serve(rank: int, tasks: mp.Queue, ends: mp.Queue) -> None:
    import hf_variants  # noqa: F401 (registers the classes in this process)

    while True:
        function, args = tasks.get()
        try:
            function(rank, *args)
            ends.put((rank, None))
        except Exception:
            ends.put((rank, traceback.format_exc()))
        finally:
            torch.use_deterministic_algorithms(False)


class Ranks:
    """Processes that run one test after another, since importing takes longer than the tests."""

    started: dict[int, "Ranks"] = {}

    def __init__(self, size: int):
        context = mp.get_context("spawn")
        self.tasks, self.ends = [context.Queue() for _ in range(size)], context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, tasks, self.ends), daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable, args: tuple) -> None:
        """`function(rank, *args)` on every rank. Raises what the first failing rank raised, or after `SECONDS`."""
        for tasks in self.tasks:
            tasks.put((function, args))
        deadline = time.monotonic() + SECONDS
        for done in range(len(self.tasks)):
            try:
                rank, error = self.ends.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                error = f"{len(self.tasks) - done} of {len(self.tasks)} ranks did not end within {SECONDS} s."
                raise TimeoutError(error) from None
            if error:
                raise RuntimeError(f"Rank {rank}:\n{error}")

    def end(self) -> None:
        for process in self.processes:
            process.kill()


def _start_rank_processes(function: Callable, args: tuple = (), nprocs: int = 2) -> None:
    if nprocs not in Ranks.started:
        Ranks.started[nprocs] = Ranks(nprocs)
    try:
        Ranks.started[nprocs].run(function, args)
    except Exception:
        # The others may still wait for the rank that failed.
        Ranks.started.pop(nprocs).end()
        raise


def _in_a_group(rank: int, function: Callable, world_size: int, file: str, args: tuple) -> None:
    _set_rank_device(rank)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable:
    """A function of a rank and more, as one that runs in `world_size` processes which form a group."""

    def decorate(function: Callable) -> Callable:
        def run(*args) -> None:
            with tempfile.TemporaryDirectory() as folder:
                _start_rank_processes(_in_a_group, (function, world_size, f"{folder}/store", args), world_size)

        return run

    return decorate
