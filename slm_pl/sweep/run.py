"""A sweep from its configuration to its table."""

import contextlib
import dataclasses
import json
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import yaml

from slm_pl import files
from slm_pl.errors import UsageError
from slm_pl.lock import locked
from slm_pl.report import compare
from slm_pl.sweep.board import board, print_failures, print_plan, print_summary
from slm_pl.sweep.cells import Cell, plan_cells
from slm_pl.sweep.config import SweepConfig
from slm_pl.sweep.engines import run_as_jobs, run_here
from slm_pl.sweep.record import Record, is_finished, relabel, replaced, results_of, steps_to_do
from slm_pl.sweep.summary import summarise, write_summary
from slm_pl.sweep.work import ProcessRunner, Runner, config_file, write_config

Check = Callable[[str, str], None]
"""Raises a UsageError if a subcommand does not take a config file."""


def sweep(
    config: SweepConfig,
    overwrite: bool = False,
    dry_run: bool = False,
    check: Check | None = None,
    run: Runner = ProcessRunner(),  # noqa: B008  frozen
) -> int:
    """Does the cells that are not finished and compares all that are.

    Args:
        config: What to do.
        overwrite: Also do what is finished again, and replace what is finished with other settings.
        dry_run: Only print what would be done.
        check: Tells a config that a subcommand does not take, before anything runs.
        run: How to run a command.

    Returns:
        How many cells failed.

    Raises:
        UsageError: Before any work, if something the user gave cannot be used.
    """
    cells = plan_cells(config)
    if not cells:
        raise UsageError("This sweep has no cells: methods is empty and dense is false. Give one or the other.")
    if check is not None:
        _check_configs(cells, overwrite, check)
    if dry_run:
        print_plan(cells, overwrite)
        return 0
    with _ending_with_its_processes(), locked(Path(config.output_dir), "sweep", "output_dir"):
        return _do(config, cells, overwrite, run)


def _do(config: SweepConfig, cells: Sequence[Cell], overwrite: bool, run: Runner) -> int:
    output_dir = Path(config.output_dir)
    if not overwrite:
        _refuse_to_replace(cells, output_dir)
    todo = [cell for cell in cells if steps_to_do(cell, overwrite)]
    text = yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False, allow_unicode=True)
    files.write_text(output_dir / "config_sweep.yaml", text)
    with board(len(cells)) as shown:
        for cell in cells:
            if cell not in todo:
                relabel(cell)
                write_config(config_file(cell, cell.steps[-1]), cell.steps[-1])
                shown.end(cell, None)
        if todo and config.engine == "submitit":
            run_as_jobs(todo, overwrite, run, shown, config.submitit, output_dir / "jobs")
        else:
            run_here(todo, overwrite, run, shown)
    done = [cell for cell in cells if is_finished(cell)]
    if done:
        records = [str(results_of(cell)) for cell in done]
        summary = summarise(compare(records, str(output_dir), cards=config.keep_exports), cells)
        write_summary(summary, output_dir)
        print_summary(summary, output_dir)
    failed = [(cell, Record.load(cell)) for cell in cells if cell not in done]
    if failed:
        print_failures(failed)
    return len(failed)


def _refuse_to_replace(cells: Sequence[Cell], output_dir: Path) -> None:
    others: dict[str, list[str]] = {}
    for cell in cells:
        made_with = replaced(cell)
        if made_with is not None:
            others.setdefault(made_with, []).append(cell.name)
    if others:
        found = "; ".join(f"{', '.join(names)} made with {what}" for what, names in others.items())
        raise UsageError(
            f"{output_dir} has finished cells whose figures this sweep would replace: {found}. Pass --overwrite to "
            "replace them, or give another output_dir."
        )


def _check_configs(cells: Sequence[Cell], overwrite: bool, check: Check) -> None:
    """Checks one config of each method and of the measurements; sizes and seeds make no difference."""
    seen = set()
    with tempfile.TemporaryDirectory(prefix="sweep_") as directory:
        for cell in cells:
            for step in steps_to_do(cell, overwrite):
                kind = (step.name, cell.method if step.name == "compress" else None)
                if kind in seen:
                    continue
                seen.add(kind)
                path = Path(directory) / f"{cell.name}_{step.name}.yaml"
                write_config(path, step)
                check(step.command, str(path))


@contextlib.contextmanager
def _ending_with_its_processes() -> Iterator[None]:
    """Lets a request to end, or a closed terminal, reach what this process has started."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    ours = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)} if ours else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
