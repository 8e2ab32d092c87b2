"""One sweep at a time in a directory."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from slm_pl import files
from slm_pl.errors import UsageError

_NAME = ".lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other sweeps out of a directory, which is made if need be.

    ``.lock`` in it tells the host and the process. One that a killed sweep on this host left is taken over; of another
    host nobody here can tell whether its process lives.

    Raises:
        UsageError: If another sweep has it, or if it cannot be written.
    """
    files.make_directory(directory)
    path = directory / _NAME
    own = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    try:
        if not _take(path, own):
            _set_aside(path)
            if not _take(path, own):
                raise _taken(path, _read(path))
    except OSError as error:
        raise UsageError(
            f"Cannot write {path}: {error.strerror or error}. Give an output_dir that you can write to."
        ) from error
    try:
        yield
    finally:
        if _read(path) == own:  # else somebody removed it, and another sweep may have begun
            path.unlink(missing_ok=True)


def _take(path: Path, own: str) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        file.write(own)
    return True


def _set_aside(path: Path) -> None:
    """Removes a lock that a process of this host left when it was killed.

    Raises:
        UsageError: If it is another's.
    """
    text = _read(path)
    if text is None:  # just released
        return
    if not _is_stale(text):
        raise _taken(path, text)
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
            raise _taken(path, moved)


def _is_stale(text: str) -> bool:
    try:
        record = json.loads(text)
        host, number = str(record["host"]), int(record["pid"])
    except (ValueError, TypeError, KeyError):
        return False
    if host != socket.gethostname():
        return False
    if number == os.getpid():  # after a restart of a container, numbers come again
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # another user's
    return False


def _taken(path: Path, text: str | None) -> UsageError:
    try:
        record = json.loads(text or "")
        who = f"process {record['pid']} on {record['host']}"
    except (ValueError, TypeError, KeyError):
        who = "a process that has not said which it is"
    return UsageError(
        f"Another sweep works in {path.parent}: {who}. Wait for it, or give another output_dir. If that process has "
        f"ended (it was killed, or its machine went down), remove {path} and run this again."
    )


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
