"""Two real processes that work together through gloo."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch

Work = Callable[[int, str], None]
_IMPORTED = ["tests.helpers.run", "tests.helpers.pico", "peft", "transformers.models.llama.modeling_llama"]


def in_two_processes(work: Work, directory: Path) -> None:
    """Runs ``work(rank, directory)``, a function of a module, in two processes with one thread each.

    What it finds it leaves in files of the directory.
    """
    _start(_rank, work, directory)


def under_torchrun(work: Work, directory: Path) -> None:
    """The same, but the processes are not joined yet: they have the environment that torchrun gives, for Lightning."""
    _start(_torchrun_rank, work, directory)


def _start(rank: Callable[..., None], work: Work, directory: Path) -> None:
    # Processes are forked from one that has imported what takes each of them seven seconds, and has done nothing else.
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED)
    arguments = (_free_port(), dict(os.environ), os.getcwd(), work, str(directory))
    torch.multiprocessing.start_processes(rank, arguments, nprocs=2, start_method="forkserver")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _as_the_test(environment: dict[str, str], directory: str) -> None:
    """The server is as the first test found it."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    torch.set_num_threads(1)


def _rank(rank: int, port: int, environment: dict[str, str], cwd: str, work: Work, directory: str) -> None:
    _as_the_test(environment, cwd)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    work(rank, directory)
    torch.distributed.destroy_process_group()


def _torchrun_rank(rank: int, port: int, environment: dict[str, str], cwd: str, work: Work, directory: str) -> None:
    _as_the_test(environment, cwd)
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
    work(rank, directory)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
