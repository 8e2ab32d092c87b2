"""Tasks of lm-evaluation-harness 0.4: their names, their files and their data, from the hub or from local files."""

import contextlib
import difflib
import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_pl import identity
from slm_pl.errors import UsageError
from slm_pl.evaluation._surroundings import quiet, same_random_state

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.tasks._index import Entry

SEVEN_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The commonsense tasks that papers on structured pruning report."""

EMBEDDED_TASK = "embedded_docstrings"
"""The task shipped with this package; it needs no download."""

Shots = int | dict[str, int] | None
"""Solved examples in the prompt: of all tasks, or by task or group; None is each task's own number, mostly 0."""

_TASK_FOLDER = Path(__file__).parent / "tasks"
# Reading every task file of the harness takes seconds, so the usual ones are found without.
_STOCK_FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data.

    Args:
        names: What is reported, in the order asked for: tasks and groups.
        tasks: Every task, those of groups among them.
        groups: Groups whose figures are made of their tasks'.
        data: Where each task's questions come from: a hub id, ``local`` or ``embedded``.
    """

    names: list[str]
    tasks: "dict[str, Task]"
    groups: "dict[str, Group]"
    data: dict[str, str]

    def members(self, name: str) -> list[str]:
        """The tasks that stand behind a reported name."""
        if name not in self.groups:
            return [name]
        return [task.task_name for task in self.groups[name].get_all_tasks()]


@contextlib.contextmanager
def loaded_tasks(
    names: Iterable[str], local_data: str | None = None, num_fewshot: Shots = None
) -> Iterator[LoadedTasks]:
    """Builds tasks and their data; the files it makes of local data are there while the block runs.

    Args:
        names: Names of tasks, groups and tags of the harness, paths of task files (YAML), or ``embedded_docstrings``.
        local_data: Directory with ``<task>/<split>.jsonl`` in the columns of the hub's data sets.
        num_fewshot: Solved examples in the prompt.

    Raises:
        UsageError: If a task is unknown, or its data cannot be read or fetched.
    """
    with quiet(), tempfile.TemporaryDirectory(prefix="slm_pl_tasks_") as folder:
        yield _load(list(dict.fromkeys(names)), Path(folder), local_data, num_fewshot)


def task_prompts(task: str, local_data: str | None = None, limit: int | None = None) -> list[str]:
    """What a task asks a model, without solved examples: one text for each question.

    Args:
        task: As in :func:`loaded_tasks`. Where a question is asked with each choice filled in, it is the first one's
            text; of a group, those of all its tasks.
        local_data: As in :func:`loaded_tasks`.
        limit: Only the first so many questions.

    Raises:
        UsageError: If the task is unknown, or its data cannot be read or fetched.
    """
    with same_random_state(), loaded_tasks([task], local_data, 0) as loaded:
        prompts: list[str] = []
        for one in loaded.tasks.values():
            one.build_all_requests(limit=limit, rank=0, world_size=1)
            of_question: dict[int, str] = {}
            for instance in one.instances:
                if instance.doc_id is not None:
                    of_question.setdefault(instance.doc_id, str(instance.args[0]))
            prompts += of_question.values()
    return prompts[:limit]


def requests_sha256(instances: "Iterable[Instance]") -> str:
    """Hash of everything that a task asks: kind of request, contexts and continuations, in order."""
    digest = hashlib.sha256()
    for instance in instances:
        digest.update(json.dumps([instance.request_type, *instance.args], default=str).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class TaskFile:
    """A task as its file describes it.

    Args:
        name: Of the task.
        path: Of the file.
        config: What it says, functions unresolved.
    """

    name: str
    path: Path
    config: Mapping[str, Any]

    @property
    def own_data(self) -> bool:
        """Whether the task makes its data with a program of its own."""
        return "class" in self.config or "custom_dataset" in self.config

    def splits(self) -> dict[str, str]:
        """Names of the data's splits by their role."""
        return {role: self.config[role] for role in _SPLITS if self.config.get(role)}

    def asked_split(self) -> str | None:
        """The split whose questions are asked."""
        splits = self.splits()
        return splits.get("test_split") or splits.get("validation_split")

    def shots(self, asked: int | None) -> int:
        """How many solved examples stand in the prompt; as for the harness, a task that says 0 means it."""
        own = self.config.get("num_fewshot")
        return int(own or 0) if asked is None or own == 0 else asked

    def example_split(self) -> str | None:
        """The split that solved examples are drawn from."""
        splits = self.splits()
        order = ("fewshot_split", "training_split", "validation_split", "test_split")
        return next((splits[role] for role in order if role in splits), None)


def check_tasks(names: Iterable[str], local_data: str | None = None, num_fewshot: Shots = None) -> None:
    """Finds what is unknown or lacking without reading any data.

    Raises:
        UsageError: If a task is unknown, or local data lack a file.
    """
    names = list(dict.fromkeys(names))
    _check_shots(names, num_fewshot)
    if local_data is None and all(name == EMBEDDED_TASK or name in _STOCK_FILES for name in names):
        return  # there is nothing to find, and the harness's imports would count as memory of what is measured next
    with quiet(), tempfile.TemporaryDirectory(prefix="slm_pl_tasks_") as folder:
        found = _find(names)
        local = None if local_data is None else Path(local_data)
        _write_task_files(found, _shots(names, found, num_fewshot), Path(folder), local)


def task_files(names: Iterable[str]) -> dict[str, TaskFile]:
    """The files of tasks and of every task in groups and tags, by the tasks' names; the embedded task has none here.

    Args:
        names: As in :func:`loaded_tasks`.

    Raises:
        UsageError: If a name is unknown.
    """
    return _find([name for name in names if name != EMBEDDED_TASK]).files


@dataclass(frozen=True)
class _Found:
    """Where asked names lead: what is reported, and the files of tasks and groups."""

    names: list[str]
    files: dict[str, TaskFile]
    groups: dict[str, Path]
    asked_as: dict[str, str]  # the asked name behind a task


@functools.cache
def _index() -> "Mapping[str, Entry]":
    """Every task, group and tag of the harness; reading their files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def _find(names: list[str]) -> _Found:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    stock_folder = Path(lm_eval.tasks.__file__).parent
    reported: list[str] = []
    files: dict[str, TaskFile] = {}
    asked_as: dict[str, str] = {}
    groups: dict[str, Path] = {}

    def add(name: str, path: Path, asked: str) -> None:
        if name in files and asked_as[name] != asked:
            raise UsageError(f"The task {name!r} is asked for twice, as {asked_as[name]!r} and as {asked!r}. Name one.")
        files[name] = TaskFile(name, path, load_yaml(path, resolve_func=False))
        asked_as[name] = asked

    def add_entry(name: str, asked: str) -> None:
        index = _index()
        kind, path = index[name].kind.name, index[name].yaml_path
        if kind == "GROUP":
            config = index[name].cfg or {}
            assert path is not None
            groups[name] = path
            for child in config.get("task", []):
                inner = child if isinstance(child, str) else child.get("task") or child.get("group")
                if not isinstance(inner, str) or inner not in index:
                    raise UsageError(
                        f"The group {asked!r} defines tasks inside its own file, which is not supported. Name its "
                        "tasks one by one; `lm_eval ls tasks` lists them."
                    )
                add_entry(inner, asked)
        elif kind == "TAG":
            for inner in sorted(index[name].tags):
                add_entry(inner, asked)
        else:
            assert path is not None
            add(name, path, asked)

    for name in names:
        if name == EMBEDDED_TASK:
            reported.append(name)
        elif name in _STOCK_FILES and (path := stock_folder / _STOCK_FILES[name]).is_file():
            add(name, path, name)
            reported.append(name)
        elif name.endswith((".yaml", ".yml")):
            task = _name_in(Path(name))
            add(task, Path(name).resolve(), name)
            reported.append(task)
        else:
            index = _index()
            if name not in index:
                raise UsageError(_unknown_task(name, list(index)))
            add_entry(name, name)
            kind = index[name].kind.name
            aggregated = kind == "GROUP" and (index[name].cfg or {}).get("aggregate_metric_list")
            of_name = [task for task, asked in asked_as.items() if asked == name]
            reported += [name] if aggregated or kind in ("TASK", "PY_TASK") else of_name
    return _Found(list(dict.fromkeys(reported)), files, groups, asked_as)


def _name_in(path: Path) -> str:
    """The task's name in a file that the user made."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise UsageError(f"There is no task file {path}. Give the path of a YAML file as lm-eval reads them.")
    try:
        config = load_yaml(path.resolve(), resolve_func=False)
    except Exception as error:
        raise UsageError(f"The task file {path} cannot be read: {_reason(error)}.") from error
    name = config.get("task") if isinstance(config, dict) else None
    if not isinstance(name, str) or "group" in config or not re.fullmatch(r"[\w.-]+", name):
        raise UsageError(
            f"The task file {path} has no `task: NAME` of letters, digits, _, . and -; a file of one task of lm-eval "
            "is needed."
        )
    return name


def task_content(path: str) -> list[object]:
    """What tells the content of a task file that the user made: its includes, functions and data files with it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(path).resolve(), resolve_func=False)
    functions = identity.contents(Path(path).resolve().parent, ("*.py",))
    return [json.dumps(config, sort_keys=True, default=str), functions, list(identity.files_in(config))]


def _load(names: list[str], folder: Path, local_data: str | None, num_fewshot: Shots) -> LoadedTasks:
    from lm_eval.tasks import TaskManager

    found = _find(names)
    shots = _shots(names, found, num_fewshot)
    local = None if local_data is None else Path(local_data)
    _write_task_files(found, shots, folder, local)
    manager = TaskManager(include_path=[str(_TASK_FOLDER), str(folder)], include_defaults=False)
    tasks: dict[str, Task] = {}
    groups: dict[str, Group] = {}
    for name in found.names:
        # Whatever goes wrong here is the data's fault: the task files are the harness's own, or were read before.
        try:
            loaded = manager.load([name])
        except Exception as error:
            raise UsageError(_unreadable(name, local if name != EMBEDDED_TASK else None, error)) from error
        tasks |= loaded["tasks"]
        groups |= loaded.get("groups", {})
    for name, task in tasks.items():
        # As lm-eval's command line: a number that a task's file sets to 0 is never overwritten.
        own = task.get_config("num_fewshot")
        if own != 0:
            asked = shots.get(name)
            task.set_config(key="num_fewshot", value=asked if asked is not None else own or 0)
        task.set_fewshot_seed(seed=1234)
    return LoadedTasks(found.names, tasks, groups, {name: _origin(name, found.files, local) for name in tasks})


def _shots(names: list[str], found: _Found, num_fewshot: Shots) -> dict[str, int | None]:
    """The number of solved examples that was asked for, by task."""
    _check_shots(names, num_fewshot)
    if not isinstance(num_fewshot, dict):
        return dict.fromkeys((*found.files, EMBEDDED_TASK), num_fewshot)
    return {name: num_fewshot.get(found.asked_as.get(name, name)) for name in (*found.files, EMBEDDED_TASK)}


def _check_shots(names: list[str], num_fewshot: Shots) -> None:
    unknown = [name for name in num_fewshot if name not in names] if isinstance(num_fewshot, dict) else []
    if unknown:
        raise UsageError(f"num_fewshot names {', '.join(unknown)}, but the tasks are {', '.join(names)}.")


def _origin(name: str, files: Mapping[str, TaskFile], local: Path | None) -> str:
    if name == EMBEDDED_TASK:
        return "embedded"
    if local is not None:
        return "local"
    config = files[name].config
    return "/".join(str(part) for part in (config.get("dataset_path"), config.get("dataset_name")) if part) or "own"


def _write_task_files(found: _Found, shots: Mapping[str, int | None], folder: Path, local_data: Path | None) -> None:
    """Writes a task file for each task that includes its own and, given local data, reads them instead of the hub's.

    In lm-eval a task file with a stock task's name takes its place. JSON is YAML, so no quoting can go wrong.
    """
    overlay: dict[str, object]
    for name, path in found.groups.items():
        overlay = {"include": str(path), "group": name}
        (folder / f"group_{name}.yaml").write_text(json.dumps(overlay), encoding="utf-8")
    lacking: list[str] = []
    for name, file in found.files.items():
        overlay = {"include": str(file.path), "task": name}
        if local_data is not None:
            if file.own_data:
                raise UsageError(
                    f"Task {name!r} makes its data with its own program, so it cannot read local_data. Leave it out, "
                    "or leave local_data out."
                )
            splits = file.splits()
            paths = {split: local_data / name / f"{split}.jsonl" for split in splits.values()}
            # The splits that the stock task uses: another one must never stand in for them unnoticed.
            needed = {file.asked_split(), file.example_split() if file.shots(shots.get(name)) else None} - {None}
            absent = [str(paths[split]) for split in splits.values() if split in needed and not paths[split].is_file()]
            if absent:
                lacking += dict.fromkeys(absent)
                continue
            present = {split: str(path.resolve()) for split, path in paths.items() if path.is_file()}
            overlay |= {
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": present, "cache_dir": str(folder / "cache")},
                **{role: split if split in present else None for role, split in splits.items()},
            }
        (folder / f"{name}.yaml").write_text(json.dumps(overlay), encoding="utf-8")
    if lacking:
        raise UsageError(
            f"local_data {str(local_data)!r} lacks {', '.join(lacking)}. Each task needs "
            "<local_data>/<task>/<split>.jsonl with the columns of its data set on the hub; `main.py data --tasks … "
            "--output DIR` on a connected machine makes them. Put the files there, leave those tasks out, or leave "
            "local_data out to download them."
        )


def _unknown_task(name: str, known_names: list[str]) -> str:
    close = difflib.get_close_matches(name, [*known_names, EMBEDDED_TASK], n=3)
    hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return (
        f"Zero-shot evaluation got the unknown task {name!r}. {hint}Allowed are "
        f"{', '.join((*SEVEN_TASKS, EMBEDDED_TASK))}, every task and group that `lm_eval ls tasks` lists, and the path "
        "of a task file (YAML)."
    )


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


def _unreadable(name: str, local_data: Path | None, error: Exception) -> str:
    if name == EMBEDDED_TASK:
        return f"The task {name!r} cannot be made from this Python's standard library: {_reason(error)}."
    if local_data is not None:
        return (
            f"The files in {local_data / name} cannot be used for the task {name!r} ({_reason(error)}). They must be "
            "JSON lines with the columns of its data set on the hub."
        )
    return (
        f"The data of the task {name!r} cannot be fetched ({_reason(error)}). On a machine without network give "
        f"local_data: a directory with {name}/<split>.jsonl in the columns of the hub's data set, which `main.py data "
        f"--tasks {name} --output DIR` makes on a connected one."
    )
