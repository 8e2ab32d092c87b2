"""Files and directories that are either whole or absent."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slm_pl.errors import UsageError


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
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UsageError(_unwritable(path.parent, error)) from error
    finally:
        if temporary is not None:
            os.unlink(temporary)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes ``text`` as UTF-8; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


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
    check_output_directory(path, overwrite)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if overwrite and path.exists():
            # A directory cannot be replaced in one step: the old one steps aside first.
            aside = temporary.with_name(f"{temporary.name}.old")
            os.replace(path, aside)
            try:
                os.replace(temporary, path)
            except BaseException:
                os.replace(aside, path)
                raise
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)  # fails if another process has filled the directory in the meantime
    except OSError as error:
        raise UsageError(_unwritable(path, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"Cannot write to {path}: {reason}. Give a directory on a disk that you can write to and that has room."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
