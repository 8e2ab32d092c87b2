import errno
import os
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest

from slm_pl import files
from slm_pl.errors import UsageError


@pytest.fixture
def umask_027():
    old = os.umask(0o027)
    yield
    os.umask(old)


def content(directory: Path) -> dict[str, str]:
    """Every file below a directory, hidden ones too."""
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def fill(target: Path, name: str, text: str, error: BaseException | None = None, overwrite: bool = False) -> None:
    """Makes a directory with one file in it, or fails after writing the file."""
    with files.new_directory(target, overwrite) as directory:
        (directory / name).write_text(text)
        if error is not None:
            raise error


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_write_makes_parents_and_replaces(tmp_path):
    files.write_bytes(tmp_path / "a" / "b" / "c.bin", b"\x00\xff")
    files.write_text(tmp_path / "t.txt", "old")
    files.write_text(tmp_path / "t.txt", "Größe\n")
    assert (tmp_path / "a" / "b" / "c.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "t.txt").read_bytes() == b"Gr\xc3\xb6\xc3\x9fe\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "t.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_while_a_file_is_written_is_told_with_its_place(tmp_path, number):
    for how in (files.scratch, files.new_file):
        for named in (False, True):

            def write(how=how, named=named) -> None:
                with how(tmp_path / "t.txt") as temporary:
                    temporary.write_text("half")
                    raise OSError(number, os.strerror(number), *[str(temporary)] * named)  # as open() and write() do

            with pytest.raises(UsageError, match=f"Cannot write to {tmp_path}: {os.strerror(number)}"):
                write()
            assert content(tmp_path) == {}


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/rows.jsonl"),
        OSError(errno.ENOSPC, "No space left on device", "/other/cache/blob"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError("a library's own"),
    ],
)
def test_what_fails_elsewhere_while_a_file_is_written_is_not_told_of_its_place(tmp_path, error):
    for how in (files.scratch, files.new_file):
        with pytest.raises(type(error)) as caught, how(tmp_path / "t.txt"):
            raise error
        assert caught.value is error
    assert content(tmp_path) == {}


@pytest.mark.usefixtures("umask_027")
def test_permissions_follow_the_umask(tmp_path):
    files.write_text(tmp_path / "t.txt", "x")
    with files.new_directory(tmp_path / "d") as directory:
        (directory / "inside").write_text("x")
    assert mode(tmp_path / "t.txt") == 0o640
    assert mode(tmp_path / "d") == 0o750
    assert os.umask(0o027) == 0o027  # asking for the mask did not change it


def test_failing_write_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_text("old")

    def full(source, target):
        assert Path(source).read_text() == "new"  # it fails at the last moment
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UsageError, match=f"Cannot write to {tmp_path}: No space left on device"):
            files.write_text(path, "new")
    assert content(tmp_path) == {"t.txt": "old"}
    with pytest.raises(TypeError):
        files.write_bytes(path, "not bytes")  # type: ignore[arg-type]
    assert content(tmp_path) == {"t.txt": "old"}


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "chmod", interrupt)
        with pytest.raises(KeyboardInterrupt):
            files.write_text(tmp_path / "t.txt", "new")
    assert content(tmp_path) == {}


def test_unwritable_place_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "x.txt", tmp_path / "file" / "y" / "x.txt", Path("/proc/nowhere/x.txt")):
        with pytest.raises(UsageError, match="Cannot write to .*Give a directory"):
            files.write_text(path, "new")
        with pytest.raises(UsageError, match="Cannot write to .*Give a directory"):
            files.check_output_directory(path, overwrite=True)
        with pytest.raises(UsageError, match="Cannot write to .*Give a directory"), files.new_directory(path):
            pytest.fail("the block must not run")
    assert content(tmp_path) == {"file": "x"}


def test_new_directory_appears_whole(tmp_path):
    target = tmp_path / "runs" / "export"
    with files.new_directory(target) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "a").write_text("1")
        assert not target.exists()
    assert content(tmp_path) == {"runs/export/sub/a": "1"}
    assert os.listdir(tmp_path / "runs") == ["export"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), UsageError("no")])
def test_error_inside_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        fill(tmp_path / "new", "half", "x", error)
    assert list(tmp_path.iterdir()) == []


def test_disk_error_inside_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="No space left"):
        fill(tmp_path / "new", "half", "x", OSError(28, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_the_whole_directory_and_an_error_keeps_the_old(tmp_path):
    old = tmp_path / "export"
    (old / "sub").mkdir(parents=True)
    (old / "sub" / "stale").write_text("old")
    with pytest.raises(RuntimeError, match="boom"):
        fill(old, "half", "x", RuntimeError("boom"), overwrite=True)
    assert content(tmp_path) == {"export/sub/stale": "old"}
    with files.new_directory(old, overwrite=True) as directory:
        (directory / "fresh").write_text("new")
        assert content(old) == {"sub/stale": "old"}  # until the new one is whole
    assert content(tmp_path) == {"export/fresh": "new"}
    assert os.listdir(tmp_path) == ["export"]


@pytest.mark.parametrize("failing", [1, 2])
def test_failing_swap_puts_the_old_directory_back(tmp_path, monkeypatch, failing):
    old = tmp_path / "export"
    old.mkdir()
    (old / "a").write_text("old")
    replace, calls = os.replace, []

    def replace_once_less(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_once_less)
        with pytest.raises(UsageError, match="Input/output error"):
            fill(old, "a", "new", overwrite=True)
    assert content(tmp_path) == {"export/a": "old"}
    assert os.listdir(tmp_path) == ["export"]


def test_what_is_there_is_refused_without_overwrite(tmp_path):
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir()
    (full / "a").write_text("old")
    empty.mkdir()
    file.write_text("x")
    with pytest.raises(UsageError, match="exists and is not empty.*--overwrite"), files.new_directory(full):
        pytest.fail("the block must not run")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is a file. Give the path of a directory"):
            files.check_output_directory(file, overwrite)
    with files.new_directory(empty) as directory:
        (directory / "b").write_text("new")
    files.check_output_directory(full, overwrite=True)
    assert content(tmp_path) == {"full/a": "old", "file": "x", "empty/b": "new"}


def test_what_appears_meanwhile_is_not_replaced_unasked(tmp_path):
    target = tmp_path / "export"

    def race() -> None:
        with files.new_directory(target) as directory:
            (directory / "a").write_text("mine")
            fill(target, "a", "of another process")

    with pytest.raises(UsageError, match="Directory not empty"):
        race()
    assert content(tmp_path) == {"export/a": "of another process"}


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
    old = tmp_path / ".t.txt.by-another-7.long_ago"
    old.write_text("half")
    os.utime(old, (time.time() - 8 * 24 * 3600,) * 2)
    files.write_text(tmp_path / "t.txt", "new")
    left = sorted(path.name for path in tmp_path.glob(".t.txt*"))
    others = [f".t.txt.by-another-{ended.pid}.far", f".t.txt.by-{container}-{ended.pid}.near"]
    assert left == sorted([*others, f".t.txt.by-{host}-{os.getppid()}.alive"])
    with pytest.raises(RuntimeError, match="boom"), files.new_directory(tmp_path / "export", overwrite=True):
        raise RuntimeError("boom")
    assert (tmp_path / "export" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.glob(".export*")] == [f".export.by-{host}-{os.getppid()}.alive"]


def test_what_stepped_aside_goes_back_also_after_a_restart(tmp_path):
    aside = tmp_path / f".export.by-{files._place()[:-1]}x-{os.getppid()}.x.old"
    aside.mkdir()
    (aside / "config.json").write_text("old")
    with pytest.raises(UsageError, match="exists and is not empty"):
        files.check_output_directory(tmp_path / "export", overwrite=False)
    assert content(tmp_path) == {"export/config.json": "old"}


def test_a_link_to_a_directory_stays_one(tmp_path):
    elsewhere = tmp_path / "scratch" / "export"
    elsewhere.mkdir(parents=True)
    (elsewhere / "a").write_text("old")
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "export"
    link.symlink_to(elsewhere)
    fill(link, "b", "new", overwrite=True)
    assert link.is_symlink()
    assert content(elsewhere) == {"b": "new"}
    assert [path.name for path in (*elsewhere.parent.iterdir(), *link.parent.iterdir())] == ["export", "export"]


def test_what_has_its_proper_name_is_on_the_disk(tmp_path, monkeypatch):
    """Not only in memory: a power failure may come right after the move."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle):
        calls.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.partition(".by-")[0])
        fsync(handle)

    def note_move(source, target):
        calls.append(f"move {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_move)
    files.write_text(tmp_path / "t.txt", "new")
    assert calls == [".t.txt", "move t.txt", tmp_path.name]
    calls.clear()
    fill(tmp_path / "export", "a", "new")
    assert calls == ["a", ".export", "move export", tmp_path.name]


def test_what_is_replaced_and_does_not_go_is_left(tmp_path, monkeypatch):
    """As on a network's file system, while somebody reads a file of it (which this machine has not)."""
    target = tmp_path / "export"
    with files.new_directory(target) as directory:
        (directory / "old").write_text("old")
    remove = os.rmdir

    def busy(path, *rest, **options):
        if str(path).endswith(".old"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)
        remove(path, *rest, **options)

    monkeypatch.setattr(os, "rmdir", busy)
    with files.new_directory(target, overwrite=True) as directory:
        (directory / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name.rpartition(".")[2] for path in tmp_path.iterdir() if path != target] == ["old"]
