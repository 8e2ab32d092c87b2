"""Short runs of ``tests.faults``: commands are killed between two changes of files, or their disk fails, and go on."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.disk import FAILURES, can_mount, fail_at, fail_over, fill, said_once, size
from tests.faults.kill import kill_once, outcome, stages, whole
from tests.faults.processes import (
    AtFileEvent,
    Vanish,
    finish,
    fit_config,
    jumping_clock,
    measure_config,
    prune_config,
    write,
    write_inputs,
)


@pytest.mark.long
def test_commands_are_killed_and_go_on(tmp_path):
    generator = random.Random(7)
    for stage in stages(tmp_path, ["fit", "prune"]):
        doing, killed = kill_once(stage, 1, generator, tmp_path)
        assert killed
        assert doing != "before anything was written"
        assert outcome(stage.run) == stage.outcome


@pytest.mark.long
@pytest.mark.parametrize("victim", ["first", "second"])
def test_where_one_of_two_processes_dies_the_other_ends_with_the_cause(victim, tmp_path):
    model, rows = write_inputs(tmp_path / "inputs")
    config = fit_config(model, rows, tmp_path / "run")
    config["trainer"] |= {"devices": 2, "strategy": "ddp", "max_epochs": 500}
    arguments = ["fit", "--config", write(config, tmp_path / "config.yaml")]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        first = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "main.py"), *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    second = None
    try:
        _wait(lambda: (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() or first.poll() is not None, log)
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        (second,) = [int(child) for child in children if b"main.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
        os.kill(first.pid if victim == "first" else second, signal.SIGKILL)
        code = first.wait(60)
        _wait(lambda: not _runs(second), log)
    finally:
        first.kill()
        first.wait()
        if second is not None and _runs(second):
            os.kill(second, signal.SIGKILL)
    assert code == (-signal.SIGKILL if victim == "first" else 1)
    said = log.read_text()
    assert "error: Another process of this run has ended or does not answer" in said
    assert "Traceback" not in said, said[-4000:]
    whole(tmp_path / "run")


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait(happened: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + 90
    while not happened():
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.05)


@pytest.mark.long
def test_a_disk_that_fails_loses_nothing(tmp_path):
    generator = random.Random(3)
    (stage,) = stages(tmp_path, ["prune"])
    for failure in FAILURES.values():
        fail_at(stage, generator.randint(stage.events // 4, stage.events // 2), failure, tmp_path)
    fail_over(stage, stage.events // 2, tmp_path)
    if can_mount():
        assert "No space left" in fill(stage, size(stage.run) // 2, tmp_path)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    place = tmp_path_factory.mktemp("fitted")
    (stage,) = stages(place, ["fit"])
    return place, stage


@pytest.mark.long
@pytest.mark.parametrize("read", [False, True])
def test_rows_that_vanish_are_named_or_were_read_before(read, fitted, tmp_path):
    place, stage = fitted
    rows, kept = place / "inputs" / "rows.jsonl", tmp_path / "rows.jsonl"
    shutil.copy(rows, kept)
    shutil.rmtree(stage.run)
    log, at = tmp_path / "log.txt", stage.events // 3 if read else 1  # the lock, before the rows are read
    code = finish(stage.arguments, log, Vanish(str(stage.run), at, str(tmp_path / "events.txt"), str(rows)))
    assert not rows.exists()
    shutil.copy(kept, rows)
    if not read:
        assert code == 1
        assert str(rows) in said_once(log)
        assert finish(stage.arguments, log) == 0
    assert outcome(stage.run) == stage.outcome


@pytest.mark.long
@pytest.mark.parametrize("role", ["calibration", "measured"])
def test_a_text_that_vanishes_is_named(role, tmp_path):
    model, _ = write_inputs(tmp_path / "inputs")
    text, run, log = tmp_path / "text.txt", tmp_path / "run", tmp_path / "log.txt"
    text.write_text("So many words of a text that is gone when it is read. " * 50)
    if role == "calibration":
        command, config = "prune", prune_config(model, run)
        config["data"]["calibration"]["source"] = str(text)
    else:
        command, config = "test", measure_config(model, run)
        asked = {"source": str(text), "sequence_length": 16, "max_tokens": 64}
        config["trainer"]["callbacks"][0]["init_args"]["texts"] = [asked]
    arguments = [command, "--config", write(config, tmp_path / "config.yaml")]
    assert finish(arguments, log, Vanish(str(run), 1, str(tmp_path / "events.txt"), str(text))) == 1
    assert str(text) in said_once(log)
    assert not list(run.rglob("results.json"))
    assert not list(run.rglob("config.json"))


@pytest.mark.long
def test_a_clock_that_jumps_changes_nothing(fitted, tmp_path):
    _, stage = fitted
    shutil.rmtree(stage.run)
    assert finish(stage.arguments, tmp_path / "log.txt", jumping_clock) == 0
    assert outcome(stage.run) == stage.outcome


@pytest.mark.long
def test_a_clock_that_was_put_back_repeats_steps_and_changes_nothing(fitted, tmp_path):
    _, stage = fitted
    shutil.rmtree(stage.run)
    at = AtFileEvent(str(stage.run), stage.events // 2, str(tmp_path / "events.txt"))
    assert finish(stage.arguments, tmp_path / "log.txt", at) == -signal.SIGKILL
    checkpoints = sorted((stage.run / "checkpoints").glob("[!.]*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert len(checkpoints) > 1
    for hours, path in enumerate(reversed(checkpoints)):  # the oldest seems to be the newest
        os.utime(path, (1e9 + 3600 * hours, 1e9 + 3600 * hours))
    assert finish(stage.arguments, tmp_path / "log.txt") == 0
    assert outcome(stage.run) == stage.outcome
