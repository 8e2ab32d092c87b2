"""Reads a YAML that is put together from parts: of a run, or of a sweep."""

import json
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, get_loader
from jsonargparse import Path as ParserPath

from slm_pl.documents import check_yaml
from slm_pl.errors import UsageError

Section = dict[str, Any]
"""A section of a config of fit, prune or test. The parser of that subcommand says what is in it."""


class PartsFile(ActionConfigFile):
    """``--config``: the whole of it, parts included, goes through the parser."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: str) -> None:
        """Called by the parser; text in braces is no path, but what a file would hold."""
        if value.lstrip().startswith("{"):
            ActionConfigFile.apply_config(parser, cfg, dest, value)
            return
        # What is still added to a list is added to that of the config before, by the parser.
        content = json.dumps(read(Path(value), settled=False))
        with ParserPath(value, mode="fr").relative_path_context():  # for the paths in init_args
            ActionConfigFile.apply_config(parser, cfg, dest, content)


def read(path: Path, settled: bool = True) -> Section:
    """What a YAML file says, whole.

    * A string that ends in ``.yaml`` is a part that stands in its place, relative to the file that names it, except in
      ``init_args``: there it is an argument, and as a section relative to the file that was given.
    * ``parts: [a.yaml, b.yaml]`` at the top are files of the same kind that this one lies on top of, later ones on top
      of earlier ones. A key with a plus, ``callbacks+``, adds to the list that is below instead of taking its place.
    * ``recovery`` of a sweep may be a list of sections, of which later ones win.

    Args:
        path: The file.
        settled: Make a list of what would be added to one, and found none; else its key keeps its plus.

    Raises:
        UsageError: If the file or one of its parts cannot be read, or if it is no mapping.
    """
    content = _read_part(path, ())
    content = _settled(content) if settled else content
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds {_kind(content)}; a config is a mapping, see configs/quickstart.yaml.")
    if isinstance(content.get("recovery"), list):
        sections: Section = {}
        for section in content["recovery"]:
            if not isinstance(section, dict):
                raise UsageError(f"recovery of {path} lists {_kind(section)}; it takes sections, or paths of them.")
            sections = merge(sections, section)
        content["recovery"] = sections
    return content


def merge(base: Section, over: Section, arguments: bool = False) -> Section:
    """A section with another on top of it; of another class, the other takes its place.

    Where only one of them says the class, the keys of the other are arguments of it.

    Args:
        base: What is below.
        over: What lies on top.
        arguments: These are arguments of a class, in which a key with a plus that has no list is one like others.

    Raises:
        UsageError: If a key with a plus has something else than lists to put together.
    """
    if "class_path" in over and "class_path" in base and base["class_path"] != over["class_path"]:
        return over
    if base and ("class_path" in over) != ("class_path" in base):
        base, over = (part if {"class_path", "init_args"} & set(part) else {"init_args": part} for part in (base, over))
    both = dict(base)
    for key, value in over.items():
        adds = isinstance(key, str) and key.endswith("+") and (isinstance(value, list) or not arguments)
        name = key.removesuffix("+") if adds else key
        below = both.get(name)
        if key != name:
            known = key if key in both or not isinstance(below, list) else name
            if not isinstance(value, list) or not isinstance(below, list | None):
                raise UsageError(f"{key} adds {_kind(value)} to {_kind(below)}; it takes lists.")
            both[known] = [*both.get(known, []), *value]
            continue
        if isinstance(both.get(f"{key}+"), list):
            del both[f"{key}+"]  # what takes the place of a list also does so with what was to be added to it
        if isinstance(value, dict):
            both[name] = merge(below if isinstance(below, dict) else {}, value, arguments or name == "init_args")
        else:
            both[name] = value
    return both


def _read_part(path: Path, within: tuple[Path, ...]) -> Any:
    if path.resolve() in within:
        raise UsageError(f"{path} is a part of itself: {' -> '.join(map(str, within))}. Take it out of one of them.")
    try:
        # The loader of the subcommands: to YAML 1.1 as it is, 1e-4 would be a text.
        content = get_loader("yaml")(path.read_text(encoding="utf-8"))
        check_yaml(content)
    except OSError as error:
        named = f", which {within[-1]} names," if within else ""
        raise UsageError(
            f"Cannot read {path}{named}: {error.strerror or error}. A path of a part is relative to the file that "
            "names it."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no YAML that can be read: {error}") from error
    content = _inline(content, path.parent, (*within, path.resolve()))
    if not isinstance(content, dict) or "parts" not in content:
        return content
    below = content.pop("parts")
    if not isinstance(below, list) or not all(isinstance(part, dict) for part in below):
        raise UsageError(f"parts of {path} is {below!r}; it takes a list of paths of configs.")
    whole: Section = {}
    for part in [*below, content]:
        whole = merge(whole, part)
    return whole


def _settled(value: Any) -> Any:
    """Without keys with a plus that found no list to add to: they are the list."""
    if isinstance(value, list):
        return [_settled(one) for one in value]
    if isinstance(value, dict):
        return {
            key.removesuffix("+") if isinstance(key, str) else key: one if key == "init_args" else _settled(one)
            for key, one in merge({}, value).items()
        }
    return value


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
