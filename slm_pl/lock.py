"""One run, or one sweep, at a time in a directory."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from slm_pl import files
from slm_pl.errors import UsageError

_NAME = ".lock"
_HELD: set[int] = set()
"""Descriptors of this process' locks."""
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(directory: Path, what: str = "run", option: str = "--trainer.default_root_dir") -> Iterator[None]:
    """Keeps others out of a directory, which is made if need be; one that stays empty goes again.

    The system holds the lock (``flock``), on the file ``.lock``, which tells the host and the process for people. It
    ends with the process, however that ends, and it counts wherever the directory is seen: in another container, and on
    another host if their file system keeps locks for all of them.

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
    try:
        handle = _take(path, what, option)
        try:
            os.ftruncate(handle, 0)
            os.write(handle, own.encode())
        except BaseException:
            _release(path, handle)
            raise
    except OSError as error:
        raise UsageError(
            f"Cannot write {path}: {error.strerror or error}. Give {option} a directory that you can write to."
        ) from error
    try:
        yield
    finally:
        _release(path, handle)
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()  # if nothing was written


def _take(path: Path, what: str, option: str) -> int:
    """The descriptor of the file, locked."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        _HELD.add(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            _close(handle)
            raise _taken(path, what, option) from error
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                _close(handle)
                raise
            rank_zero_warn(
                f"The file system of {path.parent} keeps no locks ({error.strerror}), so nothing keeps a second {what} "
                "out of it. Start one at a time there."
            )
            return handle
        # Whoever had it may have removed the file between these two: then the lock is of a file without a name.
        if _is(path, handle):
            return handle
        _close(handle)


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _release(path: Path, handle: int) -> None:
    """Removes the file while it is locked, unless somebody put another in its place."""
    if _is(path, handle):
        path.unlink(missing_ok=True)
    _close(handle)


def _close(handle: int) -> None:
    _HELD.discard(handle)
    os.close(handle)


def _close_all() -> None:
    """In a child process: a lock lasts until the last one that has the file open is gone."""
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_close_all)


def _taken(path: Path, what: str, option: str) -> UsageError:
    who = "a process that has not said which it is"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        record = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {int(record['pid'])} on {str(record['host'])[:100]}"
    return UsageError(
        f"Another {what} works in {path.parent}: {who}. Wait for it, or give another {option}. If its machine went "
        f"down and the file system still keeps the lock for it, remove {path} and run this again."
    )
