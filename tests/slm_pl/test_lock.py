"""One run at a time in a directory."""

import json
import os
import socket
import subprocess

import pytest

from slm_pl import files
from slm_pl.errors import UsageError
from slm_pl.lock import locked
from tests.helpers.run import Drop, alpaca_data, make_module, make_trainer


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
    (run / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid()}))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UsageError, match=f"Another run works in {run}: process {os.getppid()} on .*default_root_dir"):
        make_trainer(run, Drop([1])).prune(make_module(pico_dir), alpaca_data(tmp_path))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    ended = subprocess.Popen(["true"])
    ended.wait()
    (run / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": ended.pid}))
    make_trainer(run, Drop([1])).prune(make_module(pico_dir), alpaca_data(tmp_path))
    assert json.loads((run / "plan.json").read_text())["steps"] == [{"layers": [1], "kind": "drop_layers"}]


def test_what_killed_writers_left_is_removed_and_what_stepped_aside_goes_back(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = files._place()
    assert host.startswith(f"{socket.gethostname()}-")
    for number, name in ((ended.pid, "killed"), (os.getppid(), "alive")):
        (tmp_path / f".t.txt.by-{host}-{number}.{name}").write_text("half")
        (tmp_path / f".export.by-{host}-{number}.{name}").mkdir()
    (tmp_path / f".t.txt.by-another-{ended.pid}.far").write_text("half")
    container = f"{socket.gethostname()}-0000aaaa-1"  # the same name, other processes
    (tmp_path / f".t.txt.by-{container}-{ended.pid}.near").write_text("half")
    aside = tmp_path / f".export.by-{host}-{ended.pid}.x.old"
    aside.mkdir()
    (aside / "config.json").write_text("old")
    files.write_text(tmp_path / "t.txt", "new")
    left = sorted(path.name for path in tmp_path.glob(".t.txt*"))
    others = [f".t.txt.by-another-{ended.pid}.far", f".t.txt.by-{container}-{ended.pid}.near"]
    assert left == sorted([*others, f".t.txt.by-{host}-{os.getppid()}.alive"])
    with pytest.raises(RuntimeError, match="boom"), files.new_directory(tmp_path / "export", overwrite=True):
        raise RuntimeError("boom")
    assert (tmp_path / "export" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.glob(".export*")] == [f".export.by-{host}-{os.getppid()}.alive"]


def test_two_runs_of_one_process_and_a_lock_that_could_not_be_filled(tmp_path, monkeypatch):
    with locked(tmp_path):
        with (
            pytest.raises(UsageError, match=f"Another run works in {tmp_path}: process {os.getpid()}"),
            locked(tmp_path),
        ):
            pytest.fail("the block must not run")
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []

    def full(handle, mode):
        os.close(handle)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", full)
        with pytest.raises(UsageError, match="No space left on device"), locked(tmp_path):
            pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []  # else every later run would be refused
