"""Reads a sweep's YAML: puts parts in the place of their paths, and sections on top of each other."""

import json
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, get_loader

from slm_pl.errors import UsageError

Section = dict[str, Any]
"""A section of a config of fit, prune or test. The parser of that subcommand says what is in it."""


class SweepFile(ActionConfigFile):
    """``--config`` of a sweep: the whole of it, parts included, goes through the parser."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: str) -> None:
        """Called by the parser; text that is no path is read as YAML."""
        if not value.lstrip().startswith("{"):
            value = json.dumps(read(Path(value)))
        ActionConfigFile.apply_config(parser, cfg, dest, value)


def read(path: Path) -> Section:
    """The sweep of a YAML file, whole.

    A string that ends in ``.yaml`` is a part, relative to the file that names it, except in ``init_args``: there it is
    an argument. ``recovery`` may be a list of sections, of which later ones win.

    Raises:
        UsageError: If the file or one of its parts cannot be read, or if it is no mapping.
    """
    content = _read_part(path, ())
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds {_kind(content)}; a sweep is a mapping, see configs/sweeps/quickstart.yaml.")
    if isinstance(content.get("recovery"), list):
        sections: Section = {}
        for section in content["recovery"]:
            if not isinstance(section, dict):
                raise UsageError(f"recovery of {path} lists {_kind(section)}; it takes sections, or paths of them.")
            sections = merge(sections, section)
        content["recovery"] = sections
    return content


def merge(base: Section, over: Section) -> Section:
    """A section with another on top of it; of another class, the other takes its place."""
    if "class_path" in over and base.get("class_path") != over["class_path"]:
        return over
    both = {
        key: merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }
    return {**base, **both}


def _read_part(path: Path, within: tuple[Path, ...]) -> Any:
    if path.resolve() in within:
        raise UsageError(f"{path} is a part of itself: {' -> '.join(map(str, within))}. Take it out of one of them.")
    try:
        # The loader of the subcommands: to YAML 1.1 as it is, 1e-4 would be a text.
        content = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except OSError as error:
        named = f", which {within[-1]} names," if within else ""
        raise UsageError(
            f"Cannot read {path}{named}: {error.strerror or error}. A path of a part is relative to the file that "
            "names it."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML that can be read: {error}") from error
    return _inline(content, path.parent, (*within, path.resolve()))


def _inline(value: Any, directory: Path, within: tuple[Path, ...]) -> Any:
    if isinstance(value, str) and value.endswith(".yaml"):
        return _read_part(directory / value, within)
    if isinstance(value, list):
        return [_inline(one, directory, within) for one in value]
    if isinstance(value, dict):
        return {key: one if key == "init_args" else _inline(one, directory, within) for key, one in value.items()}
    return value


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
