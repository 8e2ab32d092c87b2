"""Runs that are killed or asked to stop, as real processes of the command line, and go on."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.faults import processes


def start(config: Path, *arguments: str, fault: Callable[[], None] | None = None):
    return processes.start(["fit", "--config", str(config), *arguments], config.with_name("log.txt"), fault)


def finish(config: Path, *arguments: str, fault: Callable[[], None] | None = None) -> int:
    return processes.finish(["fit", "--config", str(config), *arguments], config.with_name("log.txt"), fault)


def write_config(directory: Path, pico_dir: Path, rows: Path) -> Path:
    """A run of 20 optimizer steps with dropout, a checkpoint after each, and one of the best validation loss."""
    directory.mkdir(exist_ok=True)
    checkpoints = {"dirpath": str(directory / "checkpoints"), "enable_version_counter": False}
    callback = "lightning.pytorch.callbacks.ModelCheckpoint"
    config = {
        "model": {"pretrained": str(pico_dir), "warmup_steps": 2, "learning_rate": 1e-2},
        "data": {
            "path": str(rows),
            "val_size": 4,
            "batch_size": 2,
            "global_batch_size": 4,
            "calibration": {"samples": 2},
        },
        "trainer": {
            "default_root_dir": str(directory),
            "accelerator": "cpu",
            "logger": False,
            "max_epochs": 4,
            "val_check_interval": 0.5,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "callbacks.SlidingWindowMerging", "init_args": {"remove_layers": 2}},
                {
                    "class_path": "callbacks.ExportCheckpoint",
                    "init_args": {
                        "output_dir": str(directory / "export"),
                        "compressed_dir": str(directory / "compressed"),
                    },
                },
                {"class_path": callback, "init_args": {**checkpoints, "every_n_train_steps": 1, "save_last": True}},
                {"class_path": callback, "init_args": {**checkpoints, "monitor": "val/loss", "filename": "best"}},
            ],
        },
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory / "config.yaml"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"instruction": f"Say {n}", "output": f"number {n} " * (n % 5 + 1)}) + "\n" for n in range(24)
        )
    )
    return path


@pytest.fixture(scope="module")
def whole(pico_dir, rows, tmp_path_factory) -> tuple[Path, float]:
    """The directory of an uninterrupted run, and how long it took."""
    config = write_config(tmp_path_factory.mktemp("whole") / "run", pico_dir, rows)
    finish(config.with_name("config.yaml"), "--print_config")  # the first process waits for the preloading
    began = time.monotonic()
    assert finish(config) == 0, config.with_name("log.txt").read_text()[-2000:]
    return config.parent, time.monotonic() - began


def assert_the_same(run: Path, whole: Path) -> None:
    """Equal losses at every step, equal weights, and nothing half-written left behind."""
    states = [torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (run, whole)]
    assert states[0]["global_step"] == states[1]["global_step"] == 20
    assert states[0]["history"] == states[1]["history"]
    assert [step for step, _ in states[0]["history"]["train/loss"]] == list(range(1, 21))
    for name, value in states[1]["state_dict"].items():
        assert torch.equal(states[0]["state_dict"][name], value), name
    exports = [(path / "export" / "model.safetensors").read_bytes() for path in (run, whole)]
    assert exports[0] == exports[1]
    assert [path.name for path in run.rglob("*.partial")] == []


def partly(times: int) -> None:
    """SIGKILL in the middle of the ``times``-th write of a checkpoint file."""
    from lightning.fabric.plugins.io import torch_io

    atomic, calls = torch_io._atomic_save, itertools.count(1)

    def save(checkpoint: dict, path: str) -> None:
        atomic(checkpoint, path)
        if next(calls) == times:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch_io._atomic_save = save


def after(times: int) -> None:
    """SIGKILL just after the ``times``-th checkpoint was moved into place."""
    from slm_pl import trainer

    replace, calls = trainer._replace, itertools.count(1)

    def move(partial: Path, path: Path) -> None:
        replace(partial, path)
        if next(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer._replace = move


class Fault:
    """Something that pickles."""

    def __init__(self, kind: str, times: int) -> None:
        self.kind, self.times = kind, times

    def __call__(self) -> None:
        {"partly": partly, "after": after}[self.kind](self.times)


@pytest.mark.parametrize("kind", ["partly", pytest.param("after", marks=pytest.mark.long)])
def test_killed_while_a_checkpoint_is_written(whole, pico_dir, rows, tmp_path, kind):
    config = write_config(tmp_path / "run", pico_dir, rows)
    for times in (3, 9):
        assert finish(config, "--ckpt_path", "last", fault=Fault(kind, times)) == -signal.SIGKILL
    plan = (config.parent / "plan.json").read_bytes()
    assert finish(config, "--ckpt_path", "last") == 0, config.with_name("log.txt").read_text()[-2000:]
    assert (config.parent / "plan.json").read_bytes() == plan
    log = config.with_name("log.txt").read_text()
    assert log.count("resuming with the plan") == 2  # the search ran in the first process only
    assert_the_same(config.parent, whole[0])


@pytest.mark.long
def test_killed_at_a_dozen_random_moments(whole, pico_dir, rows, tmp_path):
    config = write_config(tmp_path / "run", pico_dir, rows)
    generator = random.Random(1)
    killed = 0
    while killed < 12:
        process = start(config, "--ckpt_path", "last", "--trainer.max_epochs", "4")
        process.join(generator.uniform(0.2, 1.1) * whole[1])
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
        else:
            assert process.exitcode == 0, config.with_name("log.txt").read_text()[-2000:]
            assert_the_same(config.parent, whole[0])
            # begin again: nothing that the last runs left may stand in the way
            config = write_config(tmp_path / f"run{killed}", pico_dir, rows)
    assert finish(config, "--ckpt_path", "last") == 0, config.with_name("log.txt").read_text()[-2000:]
    assert_the_same(config.parent, whole[0])


def test_sigterm_saves_and_ends(whole, pico_dir, rows, tmp_path):
    config = write_config(tmp_path / "run", pico_dir, rows)
    process = start(config)
    wait_for(config.parent / "checkpoints" / "last.ckpt")
    process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    log = config.with_name("log.txt").read_text()
    assert "Asked to stop, so this run ends after optimizer step" in log
    assert "Traceback" not in log
    assert not (config.parent / "export").exists()
    stopped = torch.load(config.parent / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"after optimizer step {stopped}." in log
    assert finish(config, "--ckpt_path", "last") == 0
    assert_the_same(config.parent, whole[0])


class UnderSlurm:
    """The environment of a SLURM job of one task, with a stand-in for ``scontrol`` that notes what it is asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self) -> None:
        program = self.directory / "scontrol"
        program.write_text(f'#!/bin/sh\necho "$@" >> {self.directory}/asked\n')
        program.chmod(0o755)
        names = {"JOB_ID": "77", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1"}
        names |= {"PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NODELIST": "localhost", "NODELIST": "localhost"}
        os.environ |= {f"SLURM_{name}": value for name, value in names.items()}
        os.environ["PATH"] = f"{self.directory}:{os.environ['PATH']}"


@pytest.mark.long
def test_slurm_requeues_a_job_that_is_about_to_end(whole, pico_dir, rows, tmp_path):
    config = write_config(tmp_path / "run", pico_dir, rows)
    process = start(config, fault=UnderSlurm(tmp_path))
    wait_for(config.parent / "checkpoints" / "last.ckpt")
    os.kill(process.pid, signal.SIGUSR1)
    process.join()
    assert process.exitcode == 128 + signal.SIGUSR1, config.with_name("log.txt").read_text()[-2000:]
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert finish(config, "--ckpt_path", "last", fault=UnderSlurm(tmp_path)) == 0
    assert_the_same(config.parent, whole[0])


@pytest.mark.long
def test_sigterm_stops_two_processes_together(pico_dir, rows, tmp_path):
    """As a scheduler sends it: to the process that it started, which started the other one."""
    config = write_config(tmp_path / "run", pico_dir, rows)
    words = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "400"]
    command = [sys.executable, "main.py", "fit", "--config", str(config), *words]
    root = Path(__file__).resolve().parents[2]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(
            command,
            cwd=root,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            wait_for(config.parent / "checkpoints" / "last.ckpt")
            process.terminate()
            assert process.wait(60) == 128 + signal.SIGTERM, (tmp_path / "log.txt").read_text()[-3000:]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    said = (tmp_path / "log.txt").read_text()
    assert said.count("Asked to stop, so this run ends after optimizer step") == 1
    assert "Traceback" not in said
    step = torch.load(config.parent / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"after optimizer step {step}." in said


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


def test_last_begins_where_there_is_no_checkpoint(pico_dir, rows, tmp_path):
    config = write_config(tmp_path / "run", pico_dir, rows)
    assert finish(config, "--ckpt_path", "last", "--trainer.max_steps", "1") == 0
    assert "There is no checkpoint in" in config.with_name("log.txt").read_text()
