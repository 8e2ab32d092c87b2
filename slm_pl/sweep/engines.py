"""Where and when cells are done: one after another here, or as jobs of submitit."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slm_pl.errors import UsageError
from slm_pl.sweep.board import Board
from slm_pl.sweep.cells import Cell
from slm_pl.sweep.config import Jobs
from slm_pl.sweep.record import Record, prepare
from slm_pl.sweep.work import ProcessRunner, Runner, do_cell

_POLL_S = 2.0
_DEFAULTS: dict[str, Any] = {"name": "slm_pl", "timeout_min": 24 * 60}  # submitit's own are five minutes


def run_here(cells: Sequence[Cell], overwrite: bool, run: Runner, shown: Board) -> None:
    """Does one cell after another."""
    _prepare(cells, overwrite)
    for cell in cells:
        record = do_cell(cell, run, lambda step, cell=cell: shown.show(f"{cell.label}: {step}"))  # type: ignore[misc]
        shown.end(cell, record)


@dataclasses.dataclass(frozen=True)
class CellJob:
    """What a job does: a cell.

    Args:
        run: How to run a command.
    """

    run: Runner = ProcessRunner()

    def __call__(self, cell: Cell) -> str:
        """Does the cell; returns its status."""
        return do_cell(cell, self.run).status

    def checkpoint(self, cell: Cell) -> object:
        """Called by submitit in a job whose time is over, or that has to make room: it goes on in another."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(CellJob(self.run), cell)


def run_as_jobs(cells: Sequence[Cell], overwrite: bool, run: Runner, shown: Board, jobs: Jobs, folder: Path) -> None:
    """Submits a job for each cell and waits for all of them.

    Args:
        cells: What to do.
        overwrite: As for :func:`~slm_pl.sweep.record.prepare`.
        run: How a job runs a command.
        shown: Told of what ends.
        jobs: How to submit.
        folder: Of submitit's own files.

    Raises:
        UsageError: If submitit is missing or refuses its parameters.
    """
    executor = _executor(jobs, folder)
    _prepare(cells, overwrite)
    # A cluster keeps the number in an array down by itself.
    size = len(cells) if executor.cluster == "slurm" else jobs.at_once
    for first in range(0, len(cells), size):
        some = list(cells[first : first + size])
        pending = list(zip(some, executor.map_array(CellJob(run), some), strict=True))
        try:
            while pending:
                pending = [(cell, job) for cell, job in pending if not _ended(cell, job, shown)]
                if pending:
                    shown.show(_now(cells, pending))
                    time.sleep(_POLL_S)
        except BaseException:
            for _, job in pending:
                with contextlib.suppress(Exception):
                    job.cancel()
            raise


def _prepare(cells: Sequence[Cell], overwrite: bool) -> None:
    # All before the first: a job that is killed leaves no older record that says it was finished, and what has been
    # replaced when a sweep is interrupted stays without another --overwrite.
    for cell in cells:
        prepare(cell, overwrite)


def _executor(jobs: Jobs, folder: Path) -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise UsageError(
            "engine submitit needs the package submitit, which is not installed. Run `pip install 'slm-pl[sweep]'`, or "
            "`pip install 'submitit>=1.5'`; or set engine: process."
        ) from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=jobs.cluster)
        parameters = {**_DEFAULTS, **jobs.parameters}
        if executor.cluster == "slurm":
            parameters.setdefault("slurm_array_parallelism", jobs.at_once)
        executor.update_parameters(**parameters)
    except (NameError, ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UsageError(f"submitit does not take cluster {jobs.cluster} with {jobs.parameters}: {error}") from error
    return executor


def _ended(cell: Cell, job: Any, shown: Board) -> bool:
    """Whether a job is over; one that was killed could not say so in its record."""
    if not job.done():
        return False
    error = job.exception()
    record = Record.load(cell)
    if record is None or record.hash != cell.hash or record.status in ("waiting", "running", "interrupted"):
        text = f"job {job.job_id} ended with {type(error).__name__}: {error}" if error else f"job {job.job_id} was lost"
        steps = {} if record is None else record.steps
        record = Record(cell.hash, "failed", cell.label, error=f"{text.strip()} (see {job.paths.stderr})", steps=steps)
        record.save(cell)
    shown.end(cell, record)
    return True


def _now(cells: Sequence[Cell], pending: Sequence[tuple[Cell, Any]]) -> str:
    records = [(cell, Record.load(cell)) for cell, _ in pending]
    labels = [c.label for c, r in records if r is not None and r.status == "running" and r.hash == c.hash]
    running = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
    return running or f"waiting for {len(pending)} of {len(cells)} jobs to start"
