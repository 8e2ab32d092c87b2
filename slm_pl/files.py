"""Files and directories that are either whole or absent."""

import contextlib
import errno
import functools
import glob
import os
import re
import shutil
import socket
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from slm_pl.errors import UsageError

_OWNED, _ASIDE = "by-", ".old"
"""In temporary names: in front of the host and process that write, and at the end of what stepped aside."""
_LONG = 7 * 24 * 3600  # seconds
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
"""How writing to a file that is open fails, where that is no fault of this program."""


def cache_directory() -> Path:
    """Where what is made once is kept: converted models, tokenised text, figures.

    ``$SLM_PL_CACHE``, else ``slm_pl`` under ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    own = os.environ.get("SLM_PL_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slm_pl"


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes ``content`` to ``path`` under a temporary name and moves it into place.

    Raises:
        UsageError: If the directory cannot be made or written.
    """
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes ``text`` as UTF-8; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary file beside ``path`` that takes its place when the block ends without an error.

    Raises:
        UsageError: If the directory cannot be made or written.
    """
    with scratch(path) as temporary:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        sync(temporary)
        os.replace(temporary, path)
    sync_entries(Path(path).parent)


@contextlib.contextmanager
def scratch(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary file beside ``path``, to fill and to read for as long as the block lasts.

    Raises:
        UsageError: If the directory cannot be made or written. Failures of the block that are clearly others are left
            as they are: of another file, which the error names, or of a network.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_prefix(path), delete=False) as file:
            temporary = Path(file.name)
    except OSError as error:
        raise UsageError(_unwritable(path.parent, error)) from error
    try:
        yield temporary
    except OSError as error:
        if not _of_writing(error, temporary):
            raise
        raise UsageError(_unwritable(path.parent, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _of_writing(error: OSError, temporary: Path) -> bool:
    """Whether an error may be one of writing this file; what names another file, or is of a network, is not."""
    if error.filename is not None:
        return str(error.filename) == str(temporary)
    # Of writing to a file that is open, the error names none, and numpy's has no number.
    return error.errno in _WRITING if error.errno is not None else type(error) is OSError


def make_directory(path: str | os.PathLike[str]) -> None:
    """Makes a directory and those above it.

    Raises:
        UsageError: If it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(_unwritable(Path(path), error)) from error


def check_output_directory(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuses early, before any work, a directory that :func:`new_directory` would refuse at the end.

    Raises:
        UsageError: If the directory is not empty and ``overwrite`` is false, or if it cannot be written.
    """
    path = Path(path)
    remove_abandoned(path)
    try:
        if path.exists() and not path.is_dir():
            raise UsageError(f"The output directory {path} is a file. Give the path of a directory.")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise UsageError(
                f"The output directory {path} exists and is not empty. Give another, or pass --overwrite to replace it."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(_unwritable(path, error)) from error


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary directory beside ``path`` that takes its place when the block ends without an error.

    Args:
        path: The directory to make.
        overwrite: Replace a directory that is there; it stays untouched until the new one is whole.

    Yields:
        The directory to fill.

    Raises:
        UsageError: As :func:`check_output_directory`.
    """
    path = Path(path)
    if path.is_symlink():  # where it leads is replaced, on the disk that it is on
        path = path.resolve()
    check_output_directory(path, overwrite)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path)))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        sync(temporary)
        if overwrite and path.exists():
            # A directory cannot be replaced in one step: the old one steps aside first.
            aside = temporary.with_name(f"{temporary.name}{_ASIDE}")
            os.replace(path, aside)
            try:
                os.replace(temporary, path)
            except BaseException:
                os.replace(aside, path)
                raise
            # Where a file of it is still read, a network's file system may not let it go: the next run removes it.
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(temporary, path)  # fails if another process has filled the directory in the meantime
        sync_entries(path.parent)
    except Exception as error:
        if disk_failure(error) is None:
            raise
        raise UsageError(_unwritable(path, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Has the disk write a file, or all that is in a directory, so that it outlasts a power failure, too."""
    if path.is_dir():
        for inside in path.iterdir():
            sync(inside)
        sync_entries(path)
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_entries(directory: Path) -> None:
    """The same for the names in a directory; some file systems have no such thing."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_abandoned(path: Path) -> None:
    """Removes what processes that were killed had begun to write in the place of a path.

    Of this host, since its last boot, it is known which have ended; what others left goes when nothing in it changed
    for a week. A directory that had stepped aside for its successor goes back wherever that was.
    """
    begun = f".{path.name}.{_OWNED}"
    own = f"{begun}{_place()}-"
    for left in path.parent.glob(f"{glob.escape(begun)}*"):
        number = left.name.removeprefix(own).partition(".")[0]
        ours = left.name.startswith(own) and number.isdecimal()
        ended = _ended(int(number)) if ours else None
        with contextlib.suppress(OSError):
            if left.name.endswith(_ASIDE) and not path.exists() and ended is not False:
                os.replace(left, path)
            elif ended if ended is not None else is_stale(left):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)
                else:
                    left.unlink()


def is_stale(path: Path) -> bool:
    """Whether nothing was made, changed or removed in a file or directory for a week."""
    return time.time() - max(one.lstat().st_mtime for one in [path, *path.rglob("*")]) > _LONG


def _ended(number: int) -> bool:
    """Whether a process of this host, and of this container, has ended."""
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass  # another user's, or no process' number
    return False


def _place() -> str:
    """Where a process number means one process: containers may share a host's name, and machines one another's."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        parts += [boot[:8], str(os.stat("/proc/self/ns/pid").st_ino)]
    return "-".join(parts)


def _prefix(path: Path) -> str:
    """Of the temporary name of a file or directory: it says whose it is."""
    return f".{path.name}.{_OWNED}{_place()}-{os.getpid()}."


def check_archive(path: str | os.PathLike[str], advice: str) -> None:
    """Refuses a file of ``torch.save`` that is not as it was written, before anything is read from it.

    It is a zip archive with a checksum for each tensor, which torch does not look at. A file that has not changed since
    this process looked at it is not read again.

    Args:
        path: The file.
        advice: What to do then.

    Raises:
        UsageError: If it is damaged.
    """
    try:
        about = os.stat(path)
        flaw = _flaw(os.path.realpath(path), about.st_size, about.st_mtime_ns, about.st_ino)
    except OSError as error:
        flaw = str(error)
    if flaw is not None:
        raise UsageError(f"The checkpoint {path} is damaged ({flaw}). {advice}")


@functools.lru_cache(maxsize=256)
def _flaw(path: str, size: int, time_ns: int, number: int) -> str | None:
    """What is wrong with an archive; size, time and inode tell whether it is still the same."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        torch._C.PyTorchFileReader(path)  # which is more particular about some fields
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        return str(error)
    return None if bad is None else f"its part {bad}"


def disk_failure(error: BaseException) -> str | None:
    """What a disk, or the rights on it, said no to; None for other failures.

    The writers of safetensors and of checkpoints have errors of their own for it.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is not None and type(error).__name__ == "SafetensorError":
        return os.strerror(int(number[1]))
    if isinstance(error, RuntimeError) and "inline_container.cc" in str(error):
        return "the file could not be written to its end"
    return None


def _unwritable(path: Path, error: Exception) -> str:
    reason = disk_failure(error)
    return f"Cannot write to {path}: {reason}. Give a directory on a disk that you can write to and that has room."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
