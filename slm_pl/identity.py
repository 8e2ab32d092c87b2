"""What decides the figures of a step: the program, the packages under it, the config, and the files that it names."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import slm_pl
from slm_pl.parts import Section

Parts = Mapping[str, str]
"""``program``, ``versions``, ``config`` and ``files``, so that a difference can be named."""

_PACKAGES = ("lm_eval", "peft", "torch", "transformers")
_BIG = 16 * 2**20  # bytes; what is bigger is known by its size and its time, since reading it would take too long
_CARD = "README.md"  # of a model or of data; what was measured may be written into it, and nothing is read from it
# Arguments that may name a directory, and which of its files are looked at.
_DIRECTORIES = {"pretrained": ("*",), "local_data": ("*", "*/*")}


def parts_of(command: str, config: Section) -> dict[str, str]:
    """What decides the figures of a step.

    Args:
        command: The subcommand.
        config: Its config, as it would be wherever the sweep's own files are.
    """
    return {
        "program": f"{slm_pl.__version__} {sources()}",
        "versions": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "config": digest([command, config]),
        "files": digest(list(files_in(config))),
    }


def digest(value: object) -> str:
    """The sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def differences(before: Parts, now: Parts) -> list[str]:
    """Says in words which parts differ."""
    if not before:
        return ["an earlier version of this program"]
    said = {
        "program": "another program (the code of slm_pl or callbacks has changed since)",
        "versions": f"other versions ({_changed(before.get('versions', ''), now['versions'])})",
        "config": "another config",
        "files": "other files under the names that the config gives",
    }
    return [text for name, text in said.items() if before.get(name) != now[name]]


@functools.cache
def sources() -> str:
    """The sha256 of the Python files of this program, as they were when it was first asked for."""
    places: list[str] = []
    for package in ("slm_pl", "callbacks"):
        found = importlib.util.find_spec(package)
        places += [] if found is None else (found.submodule_search_locations or [])
    return sources_of(places)


def sources_of(packages: Sequence[str | os.PathLike[str]]) -> str:
    """The sha256 of the Python files below these directories, wherever they are."""
    whole = hashlib.sha256()
    for package in map(Path, packages):
        for path in sorted(package.rglob("*.py")):
            inside = hashlib.sha256(path.read_bytes()).hexdigest()
            whole.update(f"{package.name}/{path.relative_to(package).as_posix()} {inside}\n".encode())
    return whole.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _changed(before: str, now: str) -> str:
    old = dict(text.split(" ", 1) for text in before.split(", ") if " " in text)
    new = dict(text.split(" ", 1) for text in now.split(", "))
    return ", ".join(f"{name} {old.get(name, '?')} -> {new[name]}" for name in new if old.get(name) != new[name])


def files_in(value: Any, key: str = "") -> Iterator[tuple[str, object]]:
    """The names of files and directories in a config, and what tells their content."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from files_in(one, name)
    elif isinstance(value, list):
        for one in value:
            yield from files_in(one, key)
    elif isinstance(value, str) and os.path.isfile(value):
        yield value, content(value)
    elif isinstance(value, str) and key in _DIRECTORIES and os.path.isdir(value):
        yield value, contents(value, _DIRECTORIES[key])


def contents(directory: str | os.PathLike[str], patterns: Sequence[str] = ("*",)) -> list[tuple[str, str]]:
    """The names of the files of a directory and what tells their content; without its card, and hidden ones."""
    directory = Path(directory)
    found = sorted(path for pattern in patterns for path in directory.glob(pattern) if path.is_file())
    found = [path for path in found if not path.name.startswith(".") and path.name != _CARD]
    return [(path.relative_to(directory).as_posix(), content(path)) for path in found]


def model_content(location: str, revision: str | None) -> object:
    """What tells the content of a model: its files, or its revision on the Hub; if neither is known, equal to nothing.

    Args:
        location: A directory or Hub id.
        revision: The commit, if it is known.
    """
    return contents(location) if os.path.isdir(location) else revision or os.urandom(16).hex()


def content_of(path: str | os.PathLike[str]) -> object:
    """What tells the content of a file, or of a directory and those in it."""
    return contents(path, ("*", "*/*")) if os.path.isdir(path) else content(path)


def content(path: str | os.PathLike[str]) -> str:
    """What tells the content of a file."""
    about = os.stat(path)
    if about.st_size > _BIG:
        return f"{about.st_size} bytes of {about.st_mtime_ns}"
    return _read(os.fspath(path), about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _read(path: str, size: int, time_ns: int) -> str:
    """The sha256 of a file; that of one that cannot be read is of its size and time."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return f"{size} bytes of {time_ns}"
