"""Zero-shot accuracy through lm-evaluation-harness 0.4 on a model that is already in memory."""

import contextlib
import copy
import difflib
import json
import logging
import math
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from slm_pl.errors import UsageError
from slm_pl.evaluation._model import device_of, evaluation_mode

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

SEVEN_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The commonsense tasks that papers on structured pruning report."""

EMBEDDED_TASK = "embedded_docstrings"
"""The task shipped with this package; it needs no download."""

_LENGTH_NORMALISED = ("hellaswag", "arc_challenge", "openbookqa")
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
# lm-eval tries 64 sequences of the model's full context to find a batch size, which takes minutes on a CPU.
_CPU_BATCH_SIZE = 8


@dataclass(frozen=True)
class TaskResult:
    """One task's accuracy.

    Args:
        metric: The metric that papers report for this task: ``acc``, or ``acc_norm`` (normalised by length).
        value: Its value, 0 to 1.
        stderr: Its standard error; not a number for a single question.
        n: Questions asked.
        all: Every metric of the task by name.
        stderrs: Their standard errors by name.
        num_fewshot: Solved examples in the prompt.
        version: The harness's version of the task.
        requests_sha256: Hash of everything that was asked, contexts and continuations: figures compare if it is equal.
        data: Where the questions come from: a hub id, ``local`` or ``embedded``.
    """

    metric: str
    value: float
    stderr: float
    n: int
    all: dict[str, float]
    stderrs: dict[str, float] = field(default_factory=dict)
    num_fewshot: int = 0
    version: str | None = None
    requests_sha256: str | None = None
    data: str | None = None


@dataclass(frozen=True)
class ZeroShotResult:
    """Accuracy on several tasks and its protocol.

    Args:
        harness: Name and version of the harness; figures of the old harness (before 0.4) do not compare.
        tasks: Results by task name, in the order asked for.
        mean: Plain mean of the tasks' values.
        mean_stderr: Its standard error, ``sqrt(sum(stderr ** 2)) / tasks``.
        num_fewshot: Solved examples in the prompt; None where the tasks differ in it.
        limit: Most questions of a task that were asked, or None for all.
        batch_size: Requests of one forward pass, or ``auto``.
        dtype: In which the model computed.
        chat_template: Whether the questions were put into the tokenizer's chat template.
    """

    harness: str
    tasks: dict[str, TaskResult]
    mean: float
    mean_stderr: float
    num_fewshot: int | None = 0
    limit: int | None = None
    batch_size: int | str = "auto"
    dtype: str | None = None
    chat_template: bool = False


def zero_shot(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Iterable[str] = SEVEN_TASKS,
    local_data: str | None = None,
    limit: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
) -> ZeroShotResult:
    """Asks multiple-choice questions without solved examples and compares the choices' likelihoods.

    Args:
        model: A causal language model of transformers, plain or wrapped by PEFT, on whatever device it is.
        tokenizer: Its tokenizer.
        tasks: Names of lm-eval tasks, or ``embedded_docstrings``.
        local_data: Directory with ``<task>/<split>.jsonl`` in the columns of the hub's data sets. Every stock task then
            reads its file there, with its stock prompt, processing and metrics, and nothing is downloaded. Without it
            the tasks' data come from the hub.
        limit: Ask only the first so many questions of each task.
        batch_size: Requests of one forward pass; ``auto`` is lm-eval's own search on a GPU and 8 on a CPU.

    Returns:
        Accuracy of each task with its standard error, and the mean.

    Raises:
        UsageError: If a task is unknown, its data cannot be read or fetched, or a number is out of range.
    """
    names = list(dict.fromkeys(tasks))
    if not names:
        raise UsageError(f"Zero-shot evaluation got no tasks. Name at least one, for example {', '.join(SEVEN_TASKS)}.")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if isinstance(value, int) and value < 1:
            raise UsageError(f"Zero-shot evaluation got {name} {value}; allowed is 1 or more.")
    if isinstance(batch_size, str) and batch_size != "auto":
        raise UsageError(f"Zero-shot evaluation got batch_size {batch_size!r}; allowed is 'auto' or a number from 1.")
    if batch_size == "auto" and device_of(model).type != "cuda":
        batch_size = _CPU_BATCH_SIZE

    with (
        _quiet(),
        _same_random_state(),
        evaluation_mode(model),
        tempfile.TemporaryDirectory(prefix="slm_pl_tasks_") as folder,
    ):
        from lm_eval import __version__ as harness_version
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        loaded = _load_tasks(names, Path(folder), Path(local_data) if local_data is not None else None)
        for task in loaded.values():
            task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)
        # A copy of the tokenizer, because HFLM gives the one it gets a padding token.
        harness_model = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        _seed()
        # What simple_evaluate runs between reading its arguments and describing the machine, which takes seconds and
        # writes git's complaints to the terminal outside of a repository.
        output = evaluate(lm=harness_model, task_dict={"tasks": loaded}, limit=limit, log_samples=False)

    results = {
        name: _task_result(name, output["results"][name], int(output["n-samples"][name]["effective"])) for name in names
    }
    k = len(results)
    return ZeroShotResult(
        harness=f"lm_eval {harness_version}",
        tasks=results,
        mean=sum(result.value for result in results.values()) / k,
        mean_stderr=math.sqrt(sum(result.stderr**2 for result in results.values())) / k,
        num_fewshot=0,
        limit=limit,
        batch_size=batch_size,
    )


def task_prompts(task: str, local_data: str | None = None, limit: int | None = None) -> list[str]:
    """What a task asks a model, without solved examples: one text for each question.

    Args:
        task: As in :func:`zero_shot`. Where a question is asked with each choice filled in, it is the first one's text.
        local_data: As in :func:`zero_shot`.
        limit: Only the first so many questions.

    Raises:
        UsageError: If the task is unknown, or its data cannot be read or fetched.
    """
    with _quiet(), _same_random_state(), tempfile.TemporaryDirectory(prefix="slm_pl_tasks_") as folder:
        loaded = _load_tasks([task], Path(folder), Path(local_data) if local_data is not None else None)[task]
        loaded.set_config(key="num_fewshot", value=0)
        loaded.set_fewshot_seed(seed=1234)
        loaded.build_all_requests(limit=limit, rank=0, world_size=1)
        prompts: dict[int, str] = {}
        for instance in loaded.instances:
            if instance.doc_id is not None:
                prompts.setdefault(instance.doc_id, str(instance.args[0]))
    return list(prompts.values())


def _task_result(name: str, output: Mapping[str, object], n: int) -> TaskResult:
    """Reads lm-eval's ``{"acc,none": 0.5, "acc_stderr,none": 0.1, …}``; a standard error may be the text "N/A"."""
    metrics: dict[str, float] = {}
    stderrs: dict[str, float] = {}
    for key, value in output.items():
        metric, comma, _filter = key.partition(",")
        if not comma:
            continue
        number = float(value) if isinstance(value, int | float) else math.nan
        if metric.endswith("_stderr"):
            stderrs.setdefault(metric.removesuffix("_stderr"), number)
        else:
            metrics.setdefault(metric, number)
    preferred = "acc_norm" if name in _LENGTH_NORMALISED else "acc"
    metric = preferred if preferred in metrics else next(iter(metrics))
    return TaskResult(metric=metric, value=metrics[metric], stderr=stderrs.get(metric, math.nan), n=n, all=metrics)


def _load_tasks(names: list[str], folder: Path, local_data: Path | None) -> "dict[str, Task]":
    """Builds the tasks and their data.

    Args:
        names: Task names.
        folder: An empty directory for task files that override the stock ones, and for what is made of local data.
        local_data: As in :func:`zero_shot`.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    stock_folder = Path(lm_eval.tasks.__file__).parent
    stock = {name: stock_folder / _STOCK_FILES[name] for name in names if name in _STOCK_FILES}
    usual = all(name == EMBEDDED_TASK or (name in stock and stock[name].is_file()) for name in names)
    if not usual:
        index = TaskManager(include_path=[str(_TASK_FOLDER)]).task_index
        for name in names:
            if name not in index or index[name].kind.name not in ("TASK", "PY_TASK"):
                raise UsageError(_unknown_task(name, list(index), known=name in index))
            path = index[name].yaml_path
            assert path is not None
            stock[name] = path
    stock.pop(EMBEDDED_TASK, None)
    _write_task_files(stock, folder, local_data)

    manager = TaskManager(include_path=[str(_TASK_FOLDER), str(folder)], include_defaults=False)
    loaded: dict[str, Task] = {}
    for name in names:
        # Whatever goes wrong here is the data's fault: the task files are the harness's own.
        try:
            loaded |= manager.load([name])["tasks"]
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(_unreadable(name, local_data if name in stock else None, error)) from error
    return loaded


def _write_task_files(stock: Mapping[str, Path], folder: Path, local_data: Path | None) -> None:
    """Writes a task file for each stock task that includes it and, given local data, reads them instead of the hub's.

    In lm-eval a task file with a stock task's name takes its place. JSON is YAML, so no quoting can go wrong.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    lacking: list[str] = []
    for name, path in stock.items():
        overlay: dict[str, object] = {"include": str(path), "task": name}
        if local_data is not None:
            config = load_yaml(path, resolve_func=False)
            if "class" in config or "custom_dataset" in config:
                raise UsageError(
                    f"Task {name!r} makes its data with its own program, so it cannot read local_data. Leave it out, "
                    "or leave local_data out."
                )
            keys = ("training_split", "validation_split", "test_split")
            splits = {key: config[key] for key in keys if config.get(key)}
            files = {split: local_data / name / f"{split}.jsonl" for split in splits.values()}
            # The split that the stock task asks: another one must never stand in for it unnoticed.
            asked = splits.get("test_split") or splits.get("validation_split")
            if asked is not None and not files[asked].is_file():
                lacking.append(str(files[asked]))
                continue
            present = {split: str(file.resolve()) for split, file in files.items() if file.is_file()}
            overlay |= {
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": present, "cache_dir": str(folder / "cache")},
                **{key: split if split in present else None for key, split in splits.items()},
            }
        (folder / f"{name}.yaml").write_text(json.dumps(overlay), encoding="utf-8")
    if lacking:
        raise UsageError(
            f"local_data {str(local_data)!r} lacks {', '.join(lacking)}. Each task needs "
            "<local_data>/<task>/<split>.jsonl with the columns of its data set on the hub; put the files there, leave "
            "those tasks out, or leave local_data out to download them."
        )


def _unknown_task(name: str, known_names: list[str], known: bool) -> str:
    if known:
        return (
            f"Zero-shot evaluation got {name!r}, which is a group of lm-eval tasks. Name the group's tasks one by one; "
            f"`lm_eval ls tasks` lists them."
        )
    close = difflib.get_close_matches(name, [*known_names, EMBEDDED_TASK], n=3)
    hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return (
        f"Zero-shot evaluation got the unknown task {name!r}. {hint}Allowed are "
        f"{', '.join((*SEVEN_TASKS, EMBEDDED_TASK))} and every task that `lm_eval ls tasks` lists."
    )


def _unreadable(name: str, local_data: Path | None, error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if name == EMBEDDED_TASK:
        return f"The task {name!r} cannot be made from this Python's standard library: {reason}."
    if local_data is not None:
        return (
            f"The files in {local_data / name} cannot be used for the task {name!r} ({reason}). They must be JSON "
            "lines with the columns of its data set on the hub."
        )
    return (
        f"The data of the task {name!r} cannot be fetched ({reason}). On a machine without network give local_data: a "
        f"directory with {name}/<split>.jsonl in the columns of the hub's data set."
    )


def _seed() -> None:
    """Seeds as lm-eval's command line does."""
    import numpy

    random.seed(0)
    numpy.random.seed(1234)
    torch.manual_seed(1234)


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    """Gives the caller's random states back: lm-eval seeds Python, numpy and torch."""
    import numpy

    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences lm-eval's log below errors and datasets' bars; lm-eval's own progress bar stays."""
    import datasets

    # Imported here because importing the harness sets its log level.
    import lm_eval.models.huggingface  # noqa: F401

    logger = logging.getLogger("lm_eval")
    level = logger.level
    had_bars = datasets.utils.are_progress_bars_disabled() is False
    logger.setLevel(logging.ERROR)
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bars:
            datasets.utils.enable_progress_bars()
