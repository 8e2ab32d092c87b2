"""What is known of a cell: ``cell.json``."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from slm_pl import files
from slm_pl.errors import UsageError
from slm_pl.identity import Parts, differences
from slm_pl.results import Results
from slm_pl.sealing import sealed
from slm_pl.sweep.cells import Cell, Step

_CELL = "cell.json"

Status = Literal["waiting", "running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class StepRecord:
    """A step that was begun.

    Args:
        hash: Of the step.
        done: Whether it ended well.
        seconds: How long that took.
        parts: Of the step: what its hash is of.
    """

    hash: str
    done: bool = False
    seconds: float | None = None
    parts: Parts = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """How far a cell is.

    Args:
        hash: Of the cell.
        status: Its state; ``waiting`` and ``running`` also of one whose sweep was killed.
        label: Of the cell.
        seconds: All steps together, also those of an earlier sweep.
        error: The last lines of the log, if it failed.
        steps: By name.
    """

    hash: str
    status: Status
    label: str
    seconds: float | None = None
    error: str | None = None
    steps: dict[str, StepRecord] = field(default_factory=dict)

    @classmethod
    def load(cls, cell: Cell) -> "Record | None":
        """What an earlier sweep, or a job, left of a cell; None if there is nothing of use."""
        try:
            data = json.loads((cell.directory / _CELL).read_text(encoding="utf-8"))
            steps = {name: StepRecord(**step) for name, step in data.pop("steps").items()}
            return cls(**data, steps=steps)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def save(self, cell: Cell) -> None:
        """Writes ``cell.json``.

        Raises:
            UsageError: If the directory cannot be written.
        """
        files.write_text(cell.directory / _CELL, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    def with_step(self, step: Step, done: bool, seconds: float | None = None) -> "Record":
        """With a step begun or done."""
        steps = {**self.steps, step.name: StepRecord(step.hash, done, seconds, step.parts)}
        return dataclasses.replace(self, steps=steps)

    @property
    def last_line(self) -> str:
        """What the log said last of a cell that failed."""
        return next((line for line in reversed((self.error or "").splitlines()) if line.strip()), "no message")


def results_of(cell: Cell) -> Path:
    """Where the figures of a cell are."""
    return cell.directory / "results.json"


def is_finished(cell: Cell) -> bool:
    """Whether this very cell was done, its figures can be read, and its export is there if it is to be kept."""
    record = Record.load(cell)
    if record is None or record.hash != cell.hash or record.status != "finished" or export_is_gone(cell):
        return False
    try:
        Results.load(results_of(cell))
    except UsageError:
        return False
    return True


def export_is_gone(cell: Cell) -> bool:
    """Whether a finished cell lacks the export that it is to keep, say since an earlier sweep kept none."""
    record = Record.load(cell)
    finished = record is not None and record.hash == cell.hash and record.status == "finished"
    return finished and cell.keep_export and cell.method is not None and not _has_export(cell)


def replaced(cell: Cell) -> str | None:
    """What a finished cell of other settings in the same place was made with; None if there is none."""
    record = Record.load(cell)
    if record is None or record.status != "finished" or record.hash == cell.hash:
        return None
    found: dict[str, None] = {}  # in order
    for step in cell.steps:
        known = record.steps.get(step.name)
        found.update(dict.fromkeys(differences({} if known is None else known.parts, step.parts)))
    return " and ".join(found)


def steps_to_do(cell: Cell, overwrite: bool = False) -> list[Step]:
    """What is left of a cell; an export that is known to be the right one is measured as it is.

    Args:
        cell: Which.
        overwrite: Everything anew, unless there is a finished cell of other settings: its export may be the right one.
    """
    if overwrite and replaced(cell) is None:
        return list(cell.steps)
    if is_finished(cell):
        return []
    record = Record.load(cell)
    known = {} if record is None else record.steps
    return [step for step in cell.steps if step.name == "measure" or not (_has_export(cell) and _done(known, step))]


def prepare(cell: Cell, overwrite: bool = False) -> None:
    """Writes that a cell waits, with what can be kept; what it was before counts no more.

    Raises:
        UsageError: If the directory cannot be written.
    """
    anew = overwrite and replaced(cell) is None
    kept = {} if anew else begun_steps(cell)
    Record(cell.hash, "waiting", cell.label, steps=kept).save(cell)


def begun_steps(cell: Cell) -> dict[str, StepRecord]:
    """What is known of the steps of this very cell."""
    record = Record.load(cell)
    return {} if record is None else {s.name: record.steps[s.name] for s in cell.steps if was_begun(record, s)}


def was_begun(record: Record | None, step: Step) -> bool:
    """Whether an earlier run of this very step may have left checkpoints."""
    return record is not None and step.name in record.steps and record.steps[step.name].hash == step.hash


def _has_export(cell: Cell) -> bool:
    return (cell.directory / "export" / "config.json").is_file()


def _done(known: dict[str, StepRecord], step: Step) -> bool:
    return step.name in known and known[step.name].done and known[step.name].hash == step.hash


def relabel(cell: Cell) -> None:
    """Gives the figures of a finished cell the label that it has in this sweep, say since there are more seeds now."""
    path = results_of(cell)
    data = cast("dict[str, dict[str, object]]", json.loads(path.read_text(encoding="utf-8")))
    if data["model"]["label"] != cell.label:
        data["model"]["label"] = cell.label
        files.write_text(path, json.dumps(sealed(data), indent=2, allow_nan=False) + "\n")
