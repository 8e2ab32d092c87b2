"""``slm_pl.sha256`` of a checkpoint, in the form of ``sha256sum``: whether its files are as they were written."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slm_pl import files
from slm_pl.console import progress
from slm_pl.errors import UsageError

SUMS = "slm_pl.sha256"
"""A name of our own: a ``SHA256SUMS`` that came with a model may be of any form, and name what was not fetched."""
_BLOCK = 1 << 22
_WORTH_A_BAR = 2**30  # bytes


def write_sums(directory: str | os.PathLike[str], left_out: Iterable[str] = ()) -> None:
    """Writes the sums of all files of a directory, not those below it.

    Args:
        directory: It is whole already.
        left_out: Files that people may change, such as a model card.
    """
    directory, apart = Path(directory), {SUMS, *left_out}
    found = [path for path in sorted(directory.iterdir()) if path.is_file() and path.name not in apart]
    sums = _all_sums(found, f"Sums of {directory.name}")
    files.write_text(directory / SUMS, "".join(f"{one}  {path.name}\n" for path, one in zip(found, sums, strict=True)))


def check_sums(directory: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Refuses files that are not as ``slm_pl.sha256`` says; a directory without one passes.

    A file that has not changed since this process looked at it is not read again.

    Args:
        directory: Of a checkpoint.
        wanted: Which of the names in it to look at.

    Raises:
        UsageError: With the file's name, if one is missing or has another content, or if ``slm_pl.sha256`` is damaged.
    """
    directory = Path(directory)
    listed = directory / SUMS
    if not listed.is_file():
        return
    expected: dict[str, str] = {}
    for line in listed.read_bytes().decode(errors="replace").splitlines():
        digest, gap, name = line.partition("  ")
        if not gap or len(digest) != 64 or not name or Path(name).name != name:
            raise UsageError(f"{listed} is damaged: it has the line {line[:90]!r}. Get the checkpoint again.")
        if wanted(name):
            expected[name] = digest
    for name in expected:
        if not (directory / name).is_file():
            raise UsageError(f"{directory} lacks the file {name}, which {SUMS} names. Get the whole checkpoint.")
    paths = [directory / name for name in expected]
    for path, found in zip(paths, _all_sums(paths, f"Checking {directory.name}"), strict=True):
        if found != expected[path.name]:
            raise UsageError(
                f"{path} is not as it was written: its content does not fit {SUMS}. It was damaged, or edited by hand. "
                f"Get it again; if you changed it on purpose, delete its line from {SUMS}."
            )


def _all_sums(paths: list[Path], title: str) -> list[str]:
    if sum(path.stat().st_size for path in paths) < _WORTH_A_BAR:
        return [_sum_of(path) for path in paths]
    with progress(title, len(paths)) as advance, ThreadPoolExecutor(os.cpu_count()) as threads:

        def one(path: Path) -> str:
            found = _sum_of(path)
            advance(path.name)
            return found

        return list(threads.map(one, paths))


def _sum_of(path: Path) -> str:
    about = path.stat()
    return _read(os.fspath(path.resolve()), about.st_size, about.st_mtime_ns, about.st_ino)


@functools.lru_cache(maxsize=4096)
def _read(path: str, size: int, time_ns: int, number: int) -> str:
    """The sha256 of a file; size, time and inode tell whether it is still the same."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
