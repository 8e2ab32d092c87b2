"""Two real processes that work together through gloo."""

import socket
from collections.abc import Callable
from pathlib import Path

import torch


def in_two_processes(work: Callable[[int, str], None], directory: Path) -> None:
    """Runs ``work(rank, directory)``, a function of a module, in two processes with one thread each.

    What it finds it leaves in files of the directory.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, work, str(directory)), nprocs=2)


def _rank(rank: int, port: int, work: Callable[[int, str], None], directory: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    work(rank, directory)
    torch.distributed.destroy_process_group()
