"""What is known of a cell: ``cell.json``."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from slm_pl import files
from slm_pl.errors import UsageError
from slm_pl.results import Results
from slm_pl.sweep.cells import Cell, Step

_CELL = "cell.json"

Status = Literal["running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class StepRecord:
    """A step that was begun.

    Args:
        hash: Of the step.
        done: Whether it ended well.
        seconds: How long that took.
    """

    hash: str
    done: bool = False
    seconds: float | None = None


@dataclass(frozen=True)
class Record:
    """How far a cell is.

    Args:
        hash: Of the cell.
        status: Its state; ``running`` also of one whose sweep was killed.
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
        steps = {**self.steps, step.name: StepRecord(step.hash, done, seconds)}
        return dataclasses.replace(self, steps=steps)

    @property
    def last_line(self) -> str:
        """What the log said last of a cell that failed."""
        return next((line for line in reversed((self.error or "").splitlines()) if line.strip()), "no message")


def results_of(cell: Cell) -> Path:
    """Where the figures of a cell are."""
    return cell.directory / "results.json"


def is_finished(cell: Cell) -> bool:
    """Whether this very cell was done and its figures can be read."""
    record = Record.load(cell)
    if record is None or record.hash != cell.hash or record.status != "finished":
        return False
    try:
        Results.load(results_of(cell))
    except UsageError:
        return False
    return True


def steps_to_do(cell: Cell) -> list[Step]:
    """What is left of a cell; an export that is known to be the right one is measured as it is."""
    if is_finished(cell):
        return []
    record = Record.load(cell)
    known = {} if record is None else record.steps
    exported = (cell.directory / "export" / "config.json").is_file()
    return [step for step in cell.steps if step.name == "measure" or not (exported and _done(known, step))]


def was_begun(record: Record | None, step: Step) -> bool:
    """Whether an earlier run of this very step may have left checkpoints."""
    return record is not None and step.name in record.steps and record.steps[step.name].hash == step.hash


def _done(known: dict[str, StepRecord], step: Step) -> bool:
    return step.name in known and known[step.name].done and known[step.name].hash == step.hash


def relabel(cell: Cell) -> None:
    """Gives the figures of a finished cell the label that it has in this sweep, say since there are more seeds now."""
    path = results_of(cell)
    data = cast("dict[str, dict[str, object]]", json.loads(path.read_text(encoding="utf-8")))
    if data["model"]["label"] != cell.label:
        data["model"]["label"] = cell.label
        files.write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")
