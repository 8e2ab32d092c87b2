"""Accuracy on tasks of lm-evaluation-harness 0.4, asked of a model that is already in memory."""

import contextlib
import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from slm_pl.errors import UsageError
from slm_pl.evaluation import answers
from slm_pl.evaluation._model import device_of, evaluation_mode
from slm_pl.evaluation._ranks import together, world
from slm_pl.evaluation._surroundings import same_random_state, seed
from slm_pl.evaluation.harness import (
    SEVEN_TASKS,
    LoadedTasks,
    Shots,
    loaded_tasks,
    requests_sha256,
)

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerBase

_LENGTH_NORMALISED = ("hellaswag", "arc_challenge", "openbookqa")
SHARES = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "brier_acc", "em", "exact_match", "mc1", "mc2"})
"""Metrics of lm-eval, without the filter's name, that are shares between 0 and 1 of right answers."""

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
        all: Every metric of the task by name, ``metric,filter`` where the task reads answers in several ways.
        stderrs: Their standard errors by name.
        num_fewshot: Solved examples in the prompt; None for a group whose tasks differ in it.
        version: The harness's version of the task.
        requests_sha256: Hash of everything that was asked, contexts and continuations: figures compare if it is equal.
        data: Where the questions come from: a hub id, ``local`` or ``embedded``.
        subtasks: Of a group, the value of each task.
    """

    metric: str
    value: float
    stderr: float
    n: int
    all: dict[str, float]
    stderrs: dict[str, float] = field(default_factory=dict)
    num_fewshot: int | None = 0
    version: str | None = None
    requests_sha256: str | None = None
    data: str | None = None
    subtasks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ZeroShotResult:
    """Accuracy on several tasks and its protocol.

    Args:
        harness: Name and version of the harness; figures of the old harness (before 0.4) do not compare.
        tasks: Results by task name, in the order asked for.
        mean: Plain mean of the values of ``mean_of``.
        mean_stderr: Its standard error, ``sqrt(sum(stderr ** 2)) / tasks``.
        num_fewshot: Solved examples in the prompt; None where the tasks differ in it.
        limit: Most questions of a task that were asked, or None for all.
        batch_size: Requests of one forward pass, or ``auto``.
        dtype: In which the model computed.
        chat_template: Whether the questions were put into the tokenizer's chat template.
        mean_of: The tasks in the mean: the seven commonsense tasks where all of them were asked, else all tasks whose
            figure is a share of right answers.
        cached: Whether these figures were found in the cache, measured before with the same weights and questions.
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
    mean_of: list[str] = field(default_factory=list)
    cached: bool = False


Samples = dict[str, list[dict[str, Any]]]
"""By task, one record a question as lm-eval logs them: document, arguments, answers, metrics, hashes."""


def zero_shot(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Iterable[str] = SEVEN_TASKS,
    local_data: str | None = None,
    limit: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    num_fewshot: Shots = None,
    chat_template: bool = False,
    on_samples: Callable[[Samples], None] | None = None,
    cache: bool = False,
) -> ZeroShotResult:
    """Asks the tasks' questions, all in one pass, with the figures that lm-eval's command line gives.

    Where processes work together (``torch.distributed``), each asks its share of every task's questions, and all return
    the figures of the whole.

    Args:
        model: A causal language model of transformers, plain or wrapped by PEFT, on whatever device it is.
        tokenizer: Its tokenizer.
        tasks: Names of lm-eval tasks, groups or tags, paths of task files, or ``embedded_docstrings``.
        local_data: Directory with ``<task>/<split>.jsonl`` in the columns of the hub's data sets. Every task then
            reads its file there, with its stock prompt, processing and metrics, and nothing is downloaded. Without it
            the tasks' data come from the hub.
        limit: Ask only the first so many questions of each task.
        batch_size: Requests of one forward pass; ``auto`` is lm-eval's own search on a GPU and 8 on a CPU.
        num_fewshot: Solved examples in the prompt, of all tasks or by name; None is each task's own number, mostly 0.
        chat_template: Put the questions into the tokenizer's chat template.
        on_samples: Called on the first process with every question, answer and metric.
        cache: Look for these figures in the cache directory, and leave them there. They are found again if weights,
            tokenizer, tasks, questions, right answers, batch size, device, threads and versions are the same.

    Returns:
        Accuracy of each task with its standard error, and the mean.

    Raises:
        UsageError: If a task is unknown, its data cannot be read or fetched, or a number is out of range.
    """
    names = list(dict.fromkeys(tasks))
    check_arguments(names, limit, batch_size, num_fewshot)
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise UsageError("Zero-shot evaluation got chat_template true, but this tokenizer has none. Set it to false.")
    if batch_size == "auto" and device_of(model).type != "cuda":
        batch_size = _CPU_BATCH_SIZE

    with (
        same_random_state(),
        evaluation_mode(model),
        loaded_tasks(names, local_data, num_fewshot) as loaded,
    ):
        from lm_eval import __version__ as harness_version
        from lm_eval import evaluate

        # A copy of the tokenizer, because HFLM gives the one it gets a padding token.
        harness_model = _harness_model(model, copy.deepcopy(tokenizer), batch_size)
        _build_requests(loaded, harness_model, limit, chat_template)
        asked = ZeroShotResult(
            harness=f"lm_eval {harness_version}",
            tasks={},
            mean=math.nan,
            mean_stderr=math.nan,
            limit=limit,
            batch_size=batch_size,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            chat_template=chat_template,
        )
        first = world()[0] == 0
        key = None
        if cache:
            key = answers.key(
                model, tokenizer, {**_to_record(asked), "names": loaded.names, "tasks": _identity(loaded)}
            )
            found = answers.find(key, samples=on_samples is not None)
            if found is not None:
                if on_samples is not None and found.samples is not None and first:
                    on_samples(found.samples)
                return replace(_from_record(found.result), cached=True)
        seed()
        # What simple_evaluate runs between reading its arguments and describing the machine, which takes seconds and
        # writes git's complaints to the terminal outside of a repository.
        output = evaluate(
            lm=harness_model,
            task_dict={"tasks": loaded.tasks, "groups": loaded.groups},
            limit=limit,
            log_samples=on_samples is not None,
            apply_chat_template=chat_template,
        )
        result = _collect(asked, output, loaded)
        if on_samples is not None and first:
            on_samples(output["samples"])
        if key is not None and first:
            answers.keep(key, _to_record(result), output.get("samples"))
    return result


def check_arguments(tasks: list[str], limit: int | None, batch_size: int | str, num_fewshot: Shots = None) -> None:
    """Refuses what would fail late.

    Raises:
        UsageError: If there is no task, or a number is out of range.
    """
    if not tasks:
        raise UsageError(f"Zero-shot evaluation got no tasks. Name at least one, for example {', '.join(SEVEN_TASKS)}.")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if isinstance(value, int) and value < 1:
            raise UsageError(f"Zero-shot evaluation got {name} {value}; allowed is 1 or more.")
    if isinstance(batch_size, str) and batch_size != "auto":
        raise UsageError(f"Zero-shot evaluation got batch_size {batch_size!r}; allowed is 'auto' or a number from 1.")
    shots = num_fewshot.values() if isinstance(num_fewshot, dict) else [num_fewshot]
    if any(one is not None and one < 0 for one in shots):
        raise UsageError(f"Zero-shot evaluation got num_fewshot {num_fewshot}; allowed is 0 or more.")


def _harness_model(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", batch_size: int | str) -> "HFLM":
    """The harness's view of a model in memory, whose requests the processes share.

    To the harness it is one process: each runs its share of the questions, gets all answers, and makes the same figures
    of them. So a task may have fewer questions than there are processes, and a failure in one ends all.
    """
    from lm_eval.models.huggingface import HFLM

    class SharedModel(HFLM):
        def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[Any]:
            return self._share(super().loglikelihood, requests, disable_tqdm)

        def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[Any]:
            return self._share(super().loglikelihood_rolling, requests, disable_tqdm)

        def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[Any]:
            return self._share(super().generate_until, requests, disable_tqdm)

        def _share(self, run: Callable[..., list[Any]], requests: "list[Instance]", disable_tqdm: bool) -> list[Any]:
            # Question by question: of choices after one context, the harness runs the context once.
            questions = [list(of) for _, of in itertools.groupby(requests, key=lambda one: (one.task_name, one.doc_id))]

            def ask(part: "list[list[Instance]]") -> list[list[Any]]:
                if not part:
                    return []
                found = iter(run([one for of in part for one in of], disable_tqdm or world()[0] > 0))
                return [[next(found) for _ in of] for of in part]

            return [answer for of in together(questions, ask) for answer in of]

    return SharedModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _build_requests(loaded: LoadedTasks, lm: "HFLM", limit: int | None, chat_template: bool) -> None:
    """All requests of every task; the harness's own call later finds them built."""
    for task in loaded.tasks.values():
        with _quiet_bars():
            task.build_all_requests(
                limit=limit,
                rank=0,
                world_size=1,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
                chat_template=lm.apply_chat_template if chat_template else None,
                tokenizer_name=lm.tokenizer_name if chat_template else "",
            )
        # Again, it would draw other solved examples than those that were hashed.
        task.build_all_requests = lambda **_: None


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    """No bar for each task's prompts, which are made in no time."""
    import lm_eval.api.task as harness

    bar = harness.tqdm
    harness.tqdm = lambda iterable, **_: iterable
    try:
        yield
    finally:
        harness.tqdm = bar


def _identity(loaded: LoadedTasks) -> dict[str, object]:
    """All that decides the tasks' figures beside the model: questions, right answers, metrics and filters."""
    found: dict[str, object] = {}
    for name, task in loaded.tasks.items():
        # Without where its files are.
        apart = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata")
        config = {key: value for key, value in task.dump_config().items() if key not in apart}
        config["version"] = task.VERSION
        targets = [task.doc_to_target(one.doc) for one in task.instances]
        documents = answers.text_sha256(json.dumps([[one.doc for one in task.instances], targets], default=str))
        found[name] = [requests_sha256(task.instances), documents, loaded.data[name], json.dumps(config, default=str)]
    return found


def _collect(asked: ZeroShotResult, output: Mapping[str, Any], loaded: LoadedTasks) -> ZeroShotResult:
    hashes = {name: requests_sha256(task.instances) for name, task in loaded.tasks.items()}
    results = {name: _task_result(name, output, loaded, hashes) for name in loaded.names}
    mean_of, mean, mean_stderr = mean_of_tasks(results)
    shots = {result.num_fewshot for result in results.values()}
    return replace(
        asked,
        tasks=results,
        mean=mean,
        mean_stderr=mean_stderr,
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        mean_of=mean_of,
    )


def mean_of_tasks(results: Mapping[str, TaskResult]) -> tuple[list[str], float, float]:
    """The plain mean and its standard error.

    Returns:
        The tasks that count: the seven commonsense tasks if all of them are there, else all whose figure is a share of
        right answers; their mean; its error. Not numbers if none counts.
    """
    counted = [name for name, result in results.items() if result.metric.partition(",")[0] in SHARES]
    if all(name in results for name in SEVEN_TASKS):
        counted = list(SEVEN_TASKS)
    if not counted:
        return [], math.nan, math.nan
    values = [results[name] for name in counted]
    stderr = math.sqrt(sum(one.stderr**2 for one in values)) / len(values)
    return counted, sum(one.value for one in values) / len(values), stderr


def _task_result(name: str, output: Mapping[str, Any], loaded: LoadedTasks, hashes: Mapping[str, str]) -> TaskResult:
    """Reads lm-eval's ``{"acc,none": 0.5, "acc_stderr,none": 0.1, …}``; a standard error may be the text "N/A"."""
    metrics, stderrs = _metrics(output["results"][name])
    preferred = "acc_norm" if name in _LENGTH_NORMALISED else "acc"
    metric = preferred if preferred in metrics else next(iter(metrics))
    members = loaded.members(name)
    shots = {int(loaded.tasks[member].get_config("num_fewshot") or 0) for member in members}
    of_all = "".join(hashes[member] for member in sorted(members))
    version = output.get("versions", {}).get(name)
    return TaskResult(
        metric=metric,
        value=metrics[metric],
        stderr=stderrs.get(metric, math.nan),
        n=sum(int(output["n-samples"][member]["effective"]) for member in members),
        all=metrics,
        stderrs={one: value for one, value in stderrs.items() if math.isfinite(value)},
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        version=None if version is None else str(version),
        requests_sha256=hashes[name] if members == [name] else answers.text_sha256(of_all),
        data=", ".join(sorted({loaded.data[member] for member in members})),
        subtasks={}
        if members == [name]
        else {one: _metrics(output["results"][one])[0].get(metric, math.nan) for one in members},
    )


def _metrics(values: Mapping[str, object]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and their standard errors by name, with the filter's name where there is one."""
    metrics: dict[str, float] = {}
    stderrs: dict[str, float] = {}
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma:
            continue
        number = float(value) if isinstance(value, int | float) else math.nan
        suffix = "" if filter_name == "none" else f",{filter_name}"
        if metric.endswith("_stderr"):
            stderrs[metric.removesuffix("_stderr") + suffix] = number
        else:
            metrics[metric + suffix] = number
    return metrics, stderrs


def _to_record(result: ZeroShotResult) -> dict[str, Any]:
    return {**vars(result), "tasks": {name: vars(task) for name, task in result.tasks.items()}}


def _from_record(record: Mapping[str, Any]) -> ZeroShotResult:
    tasks = {name: TaskResult(**task) for name, task in record["tasks"].items()}
    return ZeroShotResult(**{**record, "tasks": tasks})
