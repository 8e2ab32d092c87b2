"""Two real processes that work together through gloo."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch

from tests.helpers.forked import AsHere

Work = Callable[[int, str], None]


def in_two_processes(work: Work, directory: Path) -> None:
    """Runs ``work(rank, directory)``, a function of a module, in two processes with one thread each.

    What it finds it leaves in files of the directory.
    """
    _start(_rank, work, directory)


def under_torchrun(work: Work, directory: Path) -> None:
    """The same, but the processes are not joined yet: they have the environment that torchrun gives, for Lightning."""
    _start(_torchrun_rank, work, directory)


def _start(rank: Callable[..., None], work: Work, directory: Path) -> None:
    arguments = (_free_port(), work, str(directory))
    torch.multiprocessing.start_processes(AsHere(rank), arguments, nprocs=2, start_method="forkserver")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(rank: int, port: int, work: Work, directory: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    work(rank, directory)
    torch.distributed.destroy_process_group()


def _torchrun_rank(rank: int, port: int, work: Work, directory: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    torch.set_num_threads(1)
    work(rank, directory)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
