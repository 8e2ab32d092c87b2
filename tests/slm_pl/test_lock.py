"""One run at a time in a directory."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from slm_pl.errors import UsageError
from slm_pl.lock import locked
from tests.helpers.run import Drop, alpaca_data, make_module, make_trainer

ROOT = Path(__file__).parents[2]
HOLDER = """
import os, sys
from pathlib import Path
from slm_pl.lock import locked
with locked(Path(sys.argv[1])):
    if "child" in sys.argv:
        child = os.fork()
        if not child:
            os.close(1)
            sys.stdin.read()
            os._exit(0)
        print(child, flush=True)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another(directory, *arguments, prefix=()):
    """Another process that holds the lock of a directory; what it said first."""
    command = [*prefix, sys.executable, "-c", HOLDER, str(directory), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    said = []
    for line in process.stdout:
        said.append(line.strip())
        if said[-1] == "held":
            break
    assert said[-1:] == ["held"]
    try:
        yield process, said
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def test_a_run_keeps_others_out_from_its_set_up_to_its_end(pico_dir, tmp_path):
    run = tmp_path / "run"
    told = []

    class Second(Drop):
        def plan(self, model, calibration):
            told.append(json.loads((run / ".lock").read_text()))
            return super().plan(model, calibration)

    make_trainer(run, Second([2])).prune(make_module(pico_dir), alpaca_data(tmp_path))
    assert told == [{"host": socket.gethostname(), "pid": os.getpid()}]
    assert not (run / ".lock").exists()
    with another(run) as (process, _):
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        with pytest.raises(
            UsageError, match=f"Another run works in {run}: process {process.pid} on .*default_root_dir"
        ):
            make_trainer(run, Drop([1])).prune(make_module(pico_dir), alpaca_data(tmp_path))
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
        process.kill()
        process.wait()
        assert (run / ".lock").exists()
        make_trainer(run, Drop([1])).prune(make_module(pico_dir), alpaca_data(tmp_path))
    assert json.loads((run / "plan.json").read_text())["steps"] == [{"layers": [1], "kind": "drop_layers"}]
    assert not (run / ".lock").exists()


def test_a_lock_ends_with_its_process_though_a_child_lives(tmp_path):
    with another(tmp_path, "child") as (process, (child, _)):
        process.kill()
        process.wait()
        os.kill(int(child), 0)  # the worker of a data loader, say
        with locked(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        os.kill(int(child), 9)


def test_the_number_of_a_process_is_not_what_tells(tmp_path):
    # As in two containers of one name: there, both are process 1.
    with another(tmp_path) as (process, _):
        mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        (tmp_path / ".lock").write_text(mine)
        with pytest.raises(UsageError, match=f"process {os.getpid()} on"), locked(tmp_path):
            pytest.fail("the block must not run")
        assert (tmp_path / ".lock").read_text() == mine


def test_what_a_lock_says_keeps_nobody_out(tmp_path):
    texts = ("", "{}", '{"pid": Infinity, "host": 1}', "[" * 100_000, "\0\xff", '{"pid": 1}')
    for text in texts:
        (tmp_path / ".lock").write_text(text)
        with locked(tmp_path):
            pass
        assert not (tmp_path / ".lock").exists()
    with another(tmp_path):
        for text in texts:
            (tmp_path / ".lock").write_text(text)
            with pytest.raises(UsageError, match="a process that has not said which it is"), locked(tmp_path):
                pytest.fail("the block must not run")


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="keeps no locks"), locked(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


def test_two_runs_of_one_process_and_a_lock_that_could_not_be_filled(tmp_path, monkeypatch):
    with locked(tmp_path):
        with (
            pytest.raises(UsageError, match=f"Another run works in {tmp_path}: process {os.getpid()}"),
            locked(tmp_path),
        ):
            pytest.fail("the block must not run")
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []

    def full(handle, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UsageError, match="No space left on device"), locked(tmp_path):
            pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("x")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match=r"Cannot write .*\.lock"), locked(tmp_path / "run"):
        pytest.fail("the block must not run")
    assert (tmp_path / "precious").read_text() == "x"
