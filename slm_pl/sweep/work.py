"""Does one cell: runs its steps as processes of their own and keeps its record."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

import slm_pl
from slm_pl import files
from slm_pl.errors import UsageError
from slm_pl.lifeline import lifeline
from slm_pl.results import Results
from slm_pl.sweep.cells import Cell, Step
from slm_pl.sweep.record import Record, begun_steps, results_of, steps_to_do, was_begun

PROGRAM = (sys.executable, "-m", "slm_pl")
_PATIENCE_S = 60  # to end an optimizer step and write a checkpoint
_LAST_LINES = 20

Runner = Callable[[Sequence[str], Path], int]
"""Runs a command with its output added to a file; returns the status."""


def config_file(cell: Cell, step: Step) -> Path:
    """Where the config of a step is."""
    return cell.directory / f"{step.name}.yaml"


def write_config(path: Path, step: Step) -> None:
    """Writes the config of a step.

    Raises:
        UsageError: If the directory cannot be written.
    """
    text = yaml.dump(step.config, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120)
    files.write_text(path, text)


class _Plain(yaml.SafeDumper):
    """Without references: a section that stands twice is written twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def do_cell(cell: Cell, run: Runner, begin: Callable[[str], None] = lambda step: None) -> Record:
    """Does what is left of a cell.

    Args:
        cell: Which.
        run: How to run a command.
        begin: Told the name of each step.

    Returns:
        Its record, which is also in the cell's directory. What fails is in there, and not raised.
    """
    earlier = Record.load(cell)
    todo = steps_to_do(cell)
    record = Record(cell.hash, "running", cell.label, steps=begun_steps(cell))
    try:
        record.save(cell)
        for step in todo:
            if step.name == "compress" and not was_begun(earlier, step):
                shutil.rmtree(cell.directory / "checkpoints", ignore_errors=True)  # of another model
            record = record.with_step(step, done=False)
            record.save(cell)
            write_config(config_file(cell, step), step)
            begin(step.name)
            start = time.monotonic()
            error = _run_step(cell, step, run)
            if error is not None:
                record = dataclasses.replace(record, status="failed", error=error)
                record.save(cell)
                return record
            record = record.with_step(step, done=True, seconds=round(time.monotonic() - start, 1))
            record.save(cell)
    except (KeyboardInterrupt, SystemExit):
        dataclasses.replace(record, status="interrupted").save(cell)
        raise
    if not cell.keep_export:
        for weights in ("export", "checkpoints"):
            shutil.rmtree(cell.directory / weights, ignore_errors=True)
    seconds = round(sum(step.seconds or 0 for step in record.steps.values()), 1)
    record = dataclasses.replace(record, status="finished", seconds=seconds)
    record.save(cell)
    return record


def _run_step(cell: Cell, step: Step, run: Runner) -> str | None:
    """Runs a step; returns what went wrong."""
    # Outputs of other settings are replaced only by whole new ones; of the same step, a fit goes on.
    options = ["--overwrite", *(["--ckpt_path", "last"] if step.command == "fit" else [])]
    log = cell.directory / "log.txt"
    before = log.stat().st_size if log.is_file() else 0
    status = run([step.command, "--config", str(config_file(cell, step)), *options], log)
    said = ""
    if log.is_file():
        said = log.read_bytes()[before:].decode(errors="replace")
    if status:
        lines = [line.rstrip() for line in said.splitlines()]
        return "\n".join([f"{step.command} ended with status {status}", *lines[-_LAST_LINES:]])
    if step.name == "measure":
        try:
            Results.load(results_of(cell))
        except UsageError as error:
            return f"{step.command} ended without results that can be read: {error}"
    return None


@dataclasses.dataclass(frozen=True)
class ProcessRunner:
    """Runs the command line as a process of its own, which ends with this one, even with a killed one.

    Args:
        program: The command in front of the subcommand.
    """

    program: tuple[str, ...] = PROGRAM

    def __call__(self, arguments: Sequence[str], log: Path) -> int:
        """Waits for the process; an interrupt, or a request to end, is passed on to it."""
        command = [*self.program, *arguments]
        with log.open("ab") as out, lifeline() as tie:
            out.write(f"$ {' '.join(arguments)}\n".encode())
            out.flush()
            process = None
            try:
                # In a session of its own: Ctrl-C reaches it once, from here.
                with _blocked(signal.SIGUSR2):
                    process = subprocess.Popen(  # noqa: S603 - the user's own config
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env=_environment() | tie.environment,
                        pass_fds=[tie.descriptor],
                        start_new_session=True,
                    )
                status = process.wait()
            except BaseException:
                if process is not None:
                    process.terminate()  # a fit then writes a checkpoint to go on from
                    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):
                        process.wait(_PATIENCE_S)
                    _end_all(process)
                raise
            if status:
                _end_all(process)  # other ranks may still wait for the one that failed
            return status


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Keeps a signal from the processes that are started within, for good; from this one only until the end.

    Before the time of a job is over, SLURM sends it to every process of the job, and submitit asks for it: it is for
    the process that waits here, and would kill the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_all(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    package = str(Path(slm_pl.__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("COLUMNS", "140")
    if "SLURM_NTASKS" in environment:
        # A job is one task, and Lightning starts its processes itself; it takes srun to have done so but for this name.
        environment["SLURM_JOB_NAME"] = "bash"
    return environment
