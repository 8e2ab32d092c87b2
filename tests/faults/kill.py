"""Kills commands in every stage and lets them go on: ``python -m tests.faults.kill --kills 60``.

Half of the kills come in front of a random change of a file (a file is opened for writing, renamed, removed, a
directory made), counted in a run that was left alone; the others at a random moment of the time that it took. After
each, every file that has its proper name must be whole, then the same command is run to its end, and what it leaves
must be what the run that was left alone had left: the plan, the trained weights and the export byte for byte, every
figure that is no time. Figures that were finished before the kill must not be measured again.
"""

import argparse
import contextlib
import csv
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from slm_pl.compression.plan import Plan
from slm_pl.loading import load_model, load_tokenizer, resolve
from slm_pl.results import Results
from slm_pl.sums import check_sums
from slm_pl.trainer import read_checkpoint
from tests.faults.processes import (
    AtFileEvent,
    finish,
    fit_config,
    measure_config,
    prune_config,
    start,
    sweep_config,
    write,
    write_inputs,
)


@dataclass
class Stage:
    """A command, and what a run of it that was left alone came to.

    Args:
        name: For the table.
        arguments: Of the command line; the same ones before and after a kill.
        run: What it writes.
        share: Of the kills.
    """

    name: str
    arguments: list[str]
    run: Path
    share: float
    seconds: float = 0.0
    events: int = 0
    outcome: dict[str, object] = field(default_factory=dict)


_ENDS = {".html": "</html>\n", ".svg": "</svg>\n", ".md": "\n", ".tex": "\n"}


def whole(run: Path) -> None:
    """Fails if a file with its proper name is not whole."""
    for path in run.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(run).parts)
        if hidden or not path.is_file():
            continue
        if path.name == "plan.json" or path.match("plan.[0-9].json"):
            Plan.load(path)
        elif path.name == "results.json":
            Results.load(path)
        elif path.suffix == ".ckpt":
            read_checkpoint(path)
        elif path.name == "config.json":
            check_sums(path.parent)
            load_model(resolve(str(path.parent)))
            load_tokenizer(resolve(str(path.parent)))
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).verify()
        elif path.suffix in _ENDS:
            assert path.read_text().endswith(_ENDS[path.suffix]), path
        elif path.suffix == ".csv":
            assert len({len(row) for row in csv.reader(path.read_text().splitlines())}) == 1, path


def outcome(run: Path) -> dict[str, object]:
    """What a command left, without times and dates."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if any(part.startswith(".") for part in path.relative_to(run).parts):
            found[name] = "left behind"
        elif path.suffix == ".safetensors" or path.name == "plan.json":
            found[name] = path.read_bytes()
        elif path.name == "last.ckpt":
            state = torch.load(path, weights_only=True)
            found[name] = [state["global_step"], {key: value.tolist() for key, value in state["state_dict"].items()}]
            found["history"] = _history(path.parent)
        elif path.name == "results.json":
            record = Results.load(path)
            found[name] = [record.perplexity, record.drift, record.zero_shot, len(record.efficiency), record.model]
        elif path.name == "comparison.csv" or (path.name == "comparison.md" and not any(run.rglob("results.json"))):
            found[name] = path.read_text()  # that of a sweep tells when its cells were measured
    return found


def _history(checkpoints: Path) -> dict[str, list]:
    """All that the checkpoints say was logged: a run that went on writes the last one again, with one loss more."""
    found: dict[str, dict] = {}
    for path in checkpoints.glob("*.ckpt"):
        for name, points in torch.load(path, weights_only=True)["history"].items():
            for step, value in points:
                assert found.setdefault(name, {}).setdefault(step, value) == value, f"{path}: {name} of step {step}"
    return {name: sorted(points.items()) for name, points in found.items()}


def figures_kept(run: Path) -> int:
    """How many finished figures a killed test left."""
    path = run / ".results.partial.json"
    return len(json.loads(path.read_text())["parts"]) if path.is_file() else 0


def kill_once(stage: Stage, number: int, generator: random.Random, place: Path) -> tuple[str, bool]:
    """Kills a stage once, and checks what is left and what comes of it.

    Returns:
        What it was doing, and whether it was killed: it may have ended before.
    """
    log, events = place / "log.txt", place / "events.txt"
    log.unlink(missing_ok=True)
    events.unlink(missing_ok=True)
    shutil.rmtree(stage.run, ignore_errors=True)
    if number % 2:
        at = generator.randint(1, stage.events)
        code = finish(stage.arguments, log, AtFileEvent(str(stage.run), at, str(events)))
    else:
        process = start(stage.arguments, log, AtFileEvent(str(stage.run), -1, str(events)))
        process.join(generator.uniform(0.1, 1.0) * stage.seconds)
        process.kill()
        process.join()
        code = process.exitcode
    assert code in (-signal.SIGKILL, 0), log.read_text()[-3000:]
    lines = events.read_text().splitlines() if events.exists() else []
    doing = lines[-1] if lines else "before anything was written"
    whole(stage.run)
    kept = figures_kept(stage.run)
    killed = code != 0
    if stage.name == "test" and (stage.run / "results.json").exists():
        _is_undisturbed(stage, doing)
        return f"{doing} (it had ended)", killed
    again = log.with_name("again.txt")
    again.unlink(missing_ok=True)
    code = finish(stage.arguments, again)
    refused = code != 0 and stage.name == "prune" and "exists and is not empty" in again.read_text()
    if refused:  # then --overwrite must do
        code = finish([*stage.arguments, "--overwrite"], again)
    assert code == 0, f"{doing}:\n{again.read_text()[-3000:]}"
    _is_undisturbed(stage, doing)
    if kept:
        assert f"{kept} figures are of a test" in again.read_text(), again.read_text()[-2000:]
    return doing + " (it had ended)" * refused, killed


def _is_undisturbed(stage: Stage, doing: str) -> None:
    found = outcome(stage.run)
    for name, expected in stage.outcome.items():
        assert found.get(name) == expected, f"{doing}: {name} is not what an undisturbed run makes"
    assert set(found) == set(stage.outcome), f"{doing}: {set(found) ^ set(stage.outcome)}"


def stages(place: Path, names: Sequence[str] = ("fit", "prune", "test", "compare", "sweep")) -> list[Stage]:
    """The commands of these names, in this order, each run once and left alone; each needs those before it."""
    model, rows = write_inputs(place / "inputs")
    found = [
        Stage("fit", [], place / "runs" / "fit", 0.45),
        Stage("prune", [], place / "runs" / "prune", 0.15),
        Stage("test", [], place / "runs" / "test", 0.2),
        Stage("compare", [], place / "runs" / "compare", 0.1),
        Stage("sweep", [], place / "runs" / "sweep", 0.1),
    ]
    fit, prune, measure, compare, swept = found
    fit.arguments = [
        "fit",
        "--config",
        write(fit_config(model, rows, fit.run), place / "fit.yaml"),
        "--ckpt_path",
        "last",
    ]
    prune.arguments = ["prune", "--config", write(prune_config(model, prune.run), place / "prune.yaml")]
    # Its own copy: the stages are killed apart from each other.
    exported = place / "exported"
    measure.arguments = ["test", "--config", write(measure_config(str(exported), measure.run), place / "test.yaml")]
    records = [place / "records" / name / "results.json" for name in ("a", "b")]
    compare.arguments = ["compare", *map(str, records), "--output_dir", str(compare.run)]
    swept.arguments = ["sweep", "--config", write(sweep_config(model, swept.run), place / "sweep.yaml")]
    log = place / "log.txt"
    finish(["compare", "--help"], log)  # the first process waits for what is loaded before
    found = [stage for stage in found if stage.name in names]
    for stage in found:
        began = time.monotonic()
        events = place / "events.txt"
        code = finish(stage.arguments, log, AtFileEvent(str(stage.run), -1, str(events)))
        assert code == 0, log.read_text()[-3000:]
        stage.seconds = time.monotonic() - began
        stage.events = len(events.read_text().splitlines())
        stage.outcome = outcome(stage.run)
        assert stage.outcome, stage.name
        if stage is prune:
            shutil.copytree(prune.run / "export", exported)
        if stage is measure:
            for path in records:
                path.parent.mkdir(parents=True)
                shutil.copy(measure.run / "results.json", path)
    return found


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    killed, lost, tried = Counter[str](), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="slm_pl_kills_") as directory:
        place = Path(directory)
        all_stages = stages(place)
        for stage in all_stages:
            wanted = max(1, round(stage.share * options.kills))
            while killed[stage.name] < wanted and tried[stage.name] < 3 * wanted:
                tried[stage.name] += 1
                try:
                    said, was = kill_once(stage, tried[stage.name], generator, place)
                except Exception as error:
                    lost[stage.name] += 1
                    said, was = f"LOST: {error}", True
                killed[stage.name] += was
                print(f"{stage.name} {killed[stage.name]}{'' if was else ' (not killed)'}: {said}", flush=True)
    table = Table("stage", "killed", "changes of files", "seconds", "broken or lost", title="SIGKILL")
    for stage in all_stages:
        row = (killed[stage.name], stage.events, f"{stage.seconds:.1f}", lost[stage.name])
        table.add_row(stage.name, *map(str, row))
    Console(width=100).print(table)
    print(f"{killed.total()} processes killed, {lost.total()} lost")
    if lost:
        sys.exit(1)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
