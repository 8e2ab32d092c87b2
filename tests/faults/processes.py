"""Commands as real processes that end where a fault says; for the scripts and tests of this folder."""

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from tests.helpers.forked import CONTEXT, AsHere

# What changes a directory: a kill in front of any of them is one between two states of the disk.
_CHANGES = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "shutil.rmtree",
    "os.truncate",
    "os.chmod",
    "os.link",
)
_REMOVALS = ("os.remove", "os.rmdir", "shutil.rmtree")


@dataclass
class AtFileEvent:
    """SIGKILL in front of the ``number``-th change below a directory; a number below 1 only notes them.

    Args:
        below: The directory.
        number: Which change.
        log: Where every change is noted, one in a line.
    """

    below: str
    number: int
    log: str

    def __call__(self) -> None:
        seen = 0
        log = open(self.log, "w", buffering=1)  # noqa: SIM115  to the end of the process

        def watch(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event not in _CHANGES or not arguments:
                return
            path = arguments[0]
            if not isinstance(path, str | os.PathLike) or not os.path.abspath(os.fspath(path)).startswith(self.below):
                return
            if event == "open" and not _writes(arguments):
                return
            seen += 1
            log.write(f"{event} {os.path.relpath(os.fspath(path), self.below)}\n")
            if 0 < self.number <= seen:
                self.happen(seen, event, os.fspath(path))

        sys.addaudithook(watch)

    def happen(self, seen: int, event: str, path: str) -> None:
        """Called in front of this change and of all after it."""
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class DiskFails(AtFileEvent):
    """From the ``number``-th change on, the disk says ``failure`` (an ``errno``); it still removes files."""

    failure: int = 0

    def happen(self, seen: int, event: str, path: str) -> None:
        """Refuses the change."""
        if event not in _REMOVALS:
            raise OSError(self.failure, os.strerror(self.failure), path)


@dataclass
class Vanish(AtFileEvent):
    """At the ``number``-th change, another file, ``path``, is removed."""

    path: str = ""

    def happen(self, seen: int, event: str, path: str) -> None:
        """Removes it once."""
        if seen == self.number:
            os.unlink(self.path)


def _writes(arguments: tuple) -> bool:
    mode, flags = (*arguments[1:], None, None)[:2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _command(arguments: list[str], log: str, fault: Callable[[], None] | None) -> None:
    """``main.py`` with these arguments in this process; what it says goes to a file."""
    from slm_pl.cli import main

    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if fault is not None:
        fault()
    main(arguments)


def start(arguments: list[str], log: Path, fault: Callable[[], None] | None = None):
    """Begins a command in a process of its own."""
    process = CONTEXT.Process(target=AsHere(_command), args=(arguments, str(log), fault))
    process.start()
    return process


def finish(arguments: list[str], log: Path, fault: Callable[[], None] | None = None, seconds: float = 300) -> int:
    """Runs a command to its end, or until a fault ends it; its exit code."""
    process = start(arguments, log, fault)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{arguments} did not end in {seconds} s:\n{log.read_text()[-2000:]}")
    return process.exitcode


CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


def fit_config(model: str, rows: str, run: Path) -> dict:
    """Search, plan, surgery, twelve training steps with a checkpoint after each second one, merge and export."""
    checkpoints = {"dirpath": str(run / "checkpoints"), "enable_version_counter": False}
    return {
        "model": {"pretrained": model, "warmup_steps": 2, "learning_rate": 1e-2},
        "data": {
            "path": rows,
            "val_size": 4,
            "batch_size": 2,
            "global_batch_size": 4,
            "calibration": {"samples": 2},
            "fitting": [{"samples": 2, "sequence_length": 32}],
        },
        "trainer": {
            **_quiet(run),
            "max_epochs": 2,
            "val_check_interval": 0.5,
            "num_sanity_val_steps": 0,
            "callbacks": [
                {
                    "class_path": "callbacks.SlidingWindowMerging",
                    "init_args": {"remove_layers": 2, "consolidation": "least_squares"},
                },
                {
                    "class_path": "callbacks.ExportCheckpoint",
                    "init_args": {"output_dir": str(run / "export"), "compressed_dir": str(run / "compressed")},
                },
                {"class_path": CHECKPOINT, "init_args": {**checkpoints, "every_n_train_steps": 2, "save_last": True}},
                {"class_path": CHECKPOINT, "init_args": {**checkpoints, "monitor": "val/loss", "filename": "best"}},
            ],
        },
    }


def prune_config(model: str, run: Path) -> dict:
    """Search by loss, plan, surgery, export."""
    export = {"class_path": "callbacks.ExportCheckpoint", "init_args": {"output_dir": str(run / "export")}}
    method = {"class_path": "callbacks.SLEB", "init_args": {"remove_layers": 2}}
    return {
        "model": {"pretrained": model},
        "data": {"calibration": {"samples": 2}},
        "trainer": {**_quiet(run), "callbacks": [method, export]},
    }


def measure_config(model: str, run: Path) -> dict:
    """Perplexity of two texts, distance, zero-shot accuracy and speed."""
    texts = [{"sequence_length": length, "max_tokens": 512} for length in (16, 32)]
    protocol = {"prompt_tokens": 4, "new_tokens": [2, 3], "repeats": 2, "warmup": 1}
    hooks = [
        {"class_path": "callbacks.Perplexity", "init_args": {"texts": texts}},
        {"class_path": "callbacks.Drift", "init_args": {"texts": texts[:1]}},
        {"class_path": "callbacks.ZeroShot", "init_args": {"tasks": ["embedded_docstrings"], "limit": 4}},
        {"class_path": "callbacks.Efficiency", "init_args": protocol},
    ]
    return {"model": {"pretrained": model}, "trainer": {**_quiet(run), "callbacks": hooks}}


def sweep_config(model: str, run: Path) -> dict:
    """One method at one size and the dense model, compressed, measured and compared by processes of their own."""
    trainer = _quiet(run)
    del trainer["default_root_dir"]
    return {
        "output_dir": str(run),
        "model": {"pretrained": model},
        "data": {"class_path": "slm_pl.data.AlpacaDataModule", "init_args": {"calibration": {"samples": 2}}},
        "trainer": trainer,
        "methods": {"sleb": {"class_path": "callbacks.SLEB"}},
        "ratios": [0.2],
        "measure": [
            {"class_path": "callbacks.Perplexity", "init_args": {"texts": [{"sequence_length": 16, "max_tokens": 512}]}}
        ],
    }


def _quiet(run: Path) -> dict:
    return {
        "default_root_dir": str(run),
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def write(config: dict, path: Path) -> str:
    """Writes a config; its path as an argument."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return str(path)


def write_inputs(directory: Path) -> tuple[str, str]:
    """A pico model and two dozen instruction rows."""
    from tests.helpers.pico import pico_model
    from tests.helpers.tokenizer import pico_tokenizer

    directory.mkdir(parents=True, exist_ok=True)
    model, rows = directory / "model", directory / "rows.jsonl"
    pico_model(bos_token_id=0, eos_token_id=1, pad_token_id=2).save_pretrained(model)
    pico_tokenizer().save_pretrained(model)
    lines = [json.dumps({"instruction": f"Say {n}", "output": f"number {n} " * (n % 5 + 1)}) for n in range(28)]
    rows.write_text("\n".join(lines))
    return str(model), str(rows)


def jumping_clock() -> None:
    """The time of day goes an hour back and a day on, again and again, while a command runs."""
    true, calls = time.time, itertools.count()
    time.time = lambda: true() + (-3600, 86400, 0)[next(calls) % 3]
    true_ns = time.time_ns
    time.time_ns = lambda: true_ns() + (-3600, 86400, 0)[next(calls) % 3] * 10**9
