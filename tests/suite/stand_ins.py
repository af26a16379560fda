"""What transformers' testers import and its source archive does not ship: processes for the distributed ones."""

import contextlib
import os
import socket

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


def _start_rank_processes(function, args=(), nprocs: int = 2) -> None:
    mp.spawn(function, args=args, nprocs=nprocs)


def _in_a_group(rank: int, function, world_size: int, port: int, args: tuple) -> None:
    import hf_variants  # noqa: F401 (registers the classes in this process)

    _set_rank_device(rank)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_distributed(world_size: int):
    """A function of a rank and more, as one that runs in `world_size` processes which form a group."""

    def decorate(function):
        def run(*args) -> None:
            with contextlib.closing(socket.socket()) as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            mp.spawn(_in_a_group, args=(function, world_size, port, args), nprocs=world_size)

        return run

    return decorate
