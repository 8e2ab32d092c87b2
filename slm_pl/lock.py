"""One run, or one sweep, at a time in a directory."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from slm_pl import files
from slm_pl.errors import UsageError

_NAME = ".lock"
_HELD: set[Path] = set()
"""Those of this process: its number does not tell its runs apart."""


@contextlib.contextmanager
def locked(directory: Path, what: str = "run", option: str = "--trainer.default_root_dir") -> Iterator[None]:
    """Keeps others out of a directory, which is made if need be; one that stays empty goes again.

    ``.lock`` in it tells the host and the process. One that a killed process on this host left is taken over; of
    another host nobody here can tell whether its process lives.

    Args:
        directory: Where one process is to write.
        what: What it does there, for messages.
        option: How the user gives another directory.

    Raises:
        UsageError: If another process has it, or if it cannot be written.
    """
    made = not directory.exists()
    files.make_directory(directory)
    path = directory / _NAME
    own = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    if path.resolve() in _HELD:
        raise _taken(path, own, what, option)
    try:
        if not _take(path, own):
            _set_aside(path, what, option)
            if not _take(path, own):
                raise _taken(path, _read(path), what, option)
    except OSError as error:
        raise UsageError(
            f"Cannot write {path}: {error.strerror or error}. Give {option} a directory that you can write to."
        ) from error
    _HELD.add(path.resolve())
    try:
        yield
    finally:
        _HELD.discard(path.resolve())
        if _read(path) == own:  # else somebody removed it, and another may have begun
            path.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()  # if nothing was written


def _take(path: Path, own: str) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "w") as file:
            file.write(own)
    except BaseException:
        path.unlink(missing_ok=True)  # an empty one would keep everybody out
        raise
    return True


def _set_aside(path: Path, what: str, option: str) -> None:
    """Removes a lock that a process of this host left when it was killed.

    Raises:
        UsageError: If it is another's.
    """
    text = _read(path)
    if text is None:  # just released
        return
    if not _is_stale(text):
        raise _taken(path, text, what, option)
    # Of several that see a stale lock, one can move it; a slow one may even move the new lock of a fast one.
    aside = path.with_name(f"{_NAME}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        moved = _read(aside)
        if moved != text:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()
        if moved != text:
            raise _taken(path, moved, what, option)


def _is_stale(text: str) -> bool:
    try:
        record = json.loads(text)
        host, number = str(record["host"]), int(record["pid"])
    except (ValueError, TypeError, KeyError):
        return False
    # After a restart of a container, numbers come again.
    return (host, number) == (socket.gethostname(), os.getpid()) or files.ended(host, number)


def _taken(path: Path, text: str | None, what: str, option: str) -> UsageError:
    try:
        record = json.loads(text or "")
        who = f"process {record['pid']} on {record['host']}"
    except (ValueError, TypeError, KeyError):
        who = "a process that has not said which it is"
    return UsageError(
        f"Another {what} works in {path.parent}: {who}. Wait for it, or give another {option}. If that process has "
        f"ended (it was killed, or its machine went down), remove {path} and run this again."
    )


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
