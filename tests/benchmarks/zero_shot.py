"""``main.py test`` against lm-eval's own command line: ``python -m tests.benchmarks.zero_shot --data DIR --limit 25``.

Both are whole commands, started one after the other in processes of their own: they import, load one directory (the
dense SmolLM2-135M, and what ``main.py prune`` exports of it), read the seven tasks from the same local files, ask the
same questions in batches of eight, and write every answer down.

* *Equal figures*: every metric and standard error of every task to the last bit, and likewise the log-likelihood of
  every choice of every question.
* *Seconds* are wall time of the commands; ``--repeats`` runs of each take turns, and the medians are compared. The work
  is the same by construction: what can differ is everything around the forward passes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from slm_pl.evaluation import SEVEN_TASKS
from slm_pl.loading import resolve
from tests.benchmarks.search import MODEL, Check, console, finish

MOST_TIME = 1.05
BATCH_SIZE = 8
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """What one command gave: metrics and errors by task, the answers of every question, and wall seconds."""

    figures: dict[str, dict[str, float]]
    answers: dict[str, list[Any]]
    seconds: float


def timed(command: Sequence[str], log: Path) -> float:
    """Runs a command and returns its wall seconds; its output goes to a file."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - start


def answers_of(path: Path) -> list[Any]:
    """The log-likelihoods in a log of samples, by question; lm-eval turns the numbers into text when it writes them."""
    rows = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [[float(choice[0]) for (choice,) in row["resps"]] for row in rows]


def ours(model: Path, data: Path, tasks: Sequence[str], limit: int, folder: Path) -> Run:
    """``main.py test`` with one hook."""
    config = {
        "model": {"pretrained": str(model), "dtype": "float32"},
        "data": {"path": "embedded"},
        "trainer": {
            "default_root_dir": str(folder),
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "callbacks": [
                {
                    "class_path": "callbacks.ZeroShot",
                    "init_args": {
                        "tasks": list(tasks),
                        "local_data": str(data),
                        "limit": limit,
                        "batch_size": BATCH_SIZE,
                        "log_samples": True,
                    },
                }
            ],
        },
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    seconds = timed([sys.executable, "main.py", "test", "--config", str(folder / "config.yaml")], folder / "output.txt")
    record = json.loads((folder / "results.json").read_text())["zero_shot"]
    figures = {
        name: {**task["all"], **{f"{metric}_stderr": value for metric, value in task["stderrs"].items()}}
        for name, task in record["tasks"].items()
    }
    return Run(figures, {name: answers_of(folder / f"samples_{name}.jsonl") for name in tasks}, seconds)


def theirs(model: Path, data: Path, tasks: Sequence[str], limit: int, folder: Path) -> Run:
    """``lm_eval run`` with a task file for each task that puts local files in place of the hub's."""
    from lm_eval import tasks as harness
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    folder.mkdir()
    include = folder / "tasks"
    include.mkdir()
    for name in tasks:
        path = index[name].yaml_path
        assert path is not None
        assert Path(harness.__file__).parent in path.parents
        files = {file.stem: str(file.resolve()) for file in sorted((data / name).glob("*.jsonl"))}
        roles = ("training_split", "validation_split", "test_split")
        absent = {role: None for role in roles if (index[name].cfg or {}).get(role) not in (None, *files)}
        overlay = {"include": str(path), "task": name, "dataset_path": "json", "dataset_name": None, **absent}
        overlay["dataset_kwargs"] = {"data_files": files}
        (include / f"{name}.yaml").write_text(yaml.safe_dump(overlay))
    command = [str(Path(sys.executable).parent / "lm_eval"), "run", "--model", "hf"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--tasks", ",".join(tasks)]
    command += ["--include_path", str(include), "--device", "cpu", "--batch_size", str(BATCH_SIZE)]
    command += ["--limit", str(limit), "--output_path", str(folder / "out"), "--log_samples"]
    seconds = timed(command, folder / "output.txt")
    (record,) = (folder / "out").rglob("results_*.json")
    results: Mapping[str, Mapping[str, Any]] = json.loads(record.read_text())["results"]
    figures = {
        name: {
            key.partition(",")[0]: value
            for key, value in results[name].items()
            if "," in key and isinstance(value, float)
        }
        for name in tasks
    }
    (first,) = (folder / "out").rglob(f"samples_{tasks[0]}_*.jsonl")
    answers = {name: answers_of(next(first.parent.glob(f"samples_{name}_*.jsonl"))) for name in tasks}
    return Run(figures, answers, seconds)


def models(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """The directories that both commands read."""
    found: dict[str, Path] = {}
    for name in names:
        target = folder / name
        if name == "dense":
            directory = resolve(MODEL).directory
            assert directory is not None
            target = Path(directory)
        elif name == "pruned":
            arguments = [
                "--config",
                "configs/quickstart_prune.yaml",
                "--trainer.default_root_dir",
                str(folder / "prune"),
            ]
            arguments += ["--trainer.callbacks.output_dir", str(target)]
            timed([sys.executable, "main.py", "prune", *arguments], folder / "prune.txt")
        else:
            target = Path(name)
        found[name] = target
    return found


def compare_commands(
    names: Sequence[str], data: Path, tasks: Sequence[str], limit: int, repeats: int
) -> tuple[dict[str, tuple[list[Run], list[Run]]], list[Check]]:
    """Runs both commands on each model; their runs, and whether the promises hold."""
    runs: dict[str, tuple[list[Run], list[Run]]] = {}
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="slm_pl_zero_shot_") as folder:
        for name, model in models(names, Path(folder)).items():
            mine, other = [], []
            for turn in range(repeats):
                console.print(f"{name}, run {turn + 1} of {repeats}: lm_eval, then main.py test")
                label = Path(name).name
                other.append(theirs(model, data, tasks, limit, Path(folder) / f"{label}_theirs_{turn}"))
                mine.append(ours(model, data, tasks, limit, Path(folder) / f"{label}_ours_{turn}"))
            runs[name] = mine, other
            questions = sum(len(one) for one in mine[0].answers.values())
            figures = sum(len(one) for one in mine[0].figures.values())
            same = sum(
                other[0].figures[task].get(key) == v for task, one in mine[0].figures.items() for key, v in one.items()
            )
            checks.append(
                Check(f"{name}: equal figures", f"{same} of {figures}", "all", mine[0].figures == other[0].figures)
            )
            equal = sum(
                a == b for task in tasks for a, b in zip(mine[0].answers[task], other[0].answers[task], strict=True)
            )
            checks.append(Check(f"{name}: equal answers", f"{equal} of {questions}", "all", equal == questions))
    return runs, checks


def main() -> None:
    """Prints a table; exit status 1 if a promise does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="<task>/<split>.jsonl, as `main.py data` makes it")
    parser.add_argument("--limit", type=int, default=25)
    parser.add_argument("--tasks", nargs="+", default=list(SEVEN_TASKS))
    parser.add_argument("--models", nargs="+", default=["dense", "pruned"], help="or directories")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    runs, checks = compare_commands(options.models, options.data, options.tasks, options.limit, options.repeats)

    for name, (mine, other) in runs.items():
        table = Table("task", "metric", "main.py test", "lm_eval", title=name)
        for task, figures in mine[0].figures.items():
            for metric, value in figures.items():
                table.add_row(task, metric, repr(value), repr(other[0].figures[task].get(metric)))
        console.print(table)
        here, there = (statistics.median(run.seconds for run in found) for found in (mine, other))
        ratio = here / there
        value = f"{ratio:.3f} x ({here:.1f} s against {there:.1f} s)"
        checks.append(
            Check(f"{name}: time of main.py test", value, f"{MOST_TIME} x that of lm_eval", ratio <= MOST_TIME)
        )
    raise SystemExit(finish(checks, {}, None))


if __name__ == "__main__":
    main()
