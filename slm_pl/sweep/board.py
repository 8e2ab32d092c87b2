"""What the terminal shows of a sweep while it runs."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from slm_pl.sweep.cells import Cell, size_text
from slm_pl.sweep.record import Record, steps_to_do
from slm_pl.sweep.summary import NOTE, Summary, table_of


class Board:
    """A bar over the cells, and a line for each that has ended.

    Args:
        bar: The bar.
        total: How many cells there are.
    """

    def __init__(self, bar: Progress, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("Cells", total=total, note="")
        self._ended = 0
        self._total = total

    def show(self, note: str) -> None:
        """Says what runs now."""
        self._bar.update(self._task, note=note)

    def end(self, cell: Cell, record: Record | None) -> None:
        """Says how a cell ended; without a record, that it was done before."""
        self._ended += 1
        if record is None:
            text = "done before"
        elif record.status == "finished":
            text = f"{record.seconds:,.0f} s"
        else:
            text = f"{record.status}: {record.last_line}"
        style = "red" if record is not None and record.status != "finished" else ""
        self._bar.console.print(Text(f"[{self._ended}/{self._total}] {cell.label}: {text}", style), soft_wrap=True)
        self._bar.update(self._task, advance=1, note="")


@contextmanager
def board(total: int) -> Iterator[Board]:
    """Shows a board while the sweep runs."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console()
    with Progress(*columns, console=console, transient=not console.is_terminal) as bar:
        yield Board(bar, total)


def print_plan(cells: Sequence[Cell], fresh: bool) -> None:
    """The table of ``--dry_run``."""
    table = Table(title="What this sweep would do")
    for head in ("Cell", "Method", "Size", "Seed", "Runs"):
        table.add_column(head)
    for cell in cells:
        todo = cell.steps if fresh else steps_to_do(cell)
        runs = ", ".join(step.command for step in todo) or "nothing: it is finished"
        size = "–" if cell.ratio is None else size_text(cell.ratio)
        table.add_row(*(Text(text) for text in (cell.name, cell.method or "dense", size, str(cell.seed), runs)))
    _wide_enough(table).print(table)


def print_summary(summary: Summary, directory: Path) -> None:
    """The main table."""
    heads, lines = table_of(summary)
    table = Table(title="Sweep")
    for index, head in enumerate(heads):
        table.add_column(
            Text("\n".join(textwrap.wrap(head, 16, break_long_words=False))), justify="right" if index else "left"
        )
    for before, line, cells in zip([None, *summary.lines], summary.lines, lines, strict=False):
        if before is not None and before.method != line.method:
            table.add_section()
        table.add_row(*map(Text, cells))
    console = _wide_enough(table)
    console.print(table)
    if any(len(line.seeds) > 1 for line in summary.lines):
        console.print(NOTE, soft_wrap=True)
    console.print(Text(f"Written: {directory}/sweep.md, sweep.csv, sweep.json"), soft_wrap=True)


def print_failures(failed: Sequence[tuple[Cell, Record | None]]) -> None:
    """What failed, and what to do."""
    table = Table(title="Failed", title_style="red")
    table.add_column("Cell")
    table.add_column("Why", overflow="fold")
    table.add_column("Log", overflow="fold")
    for cell, record in failed:
        why = "no record" if record is None else record.last_line
        table.add_row(Text(cell.label), Text(why), Text(str(cell.directory / "log.txt")))
    console = _wide_enough(table)
    console.print(table)
    console.print("Mend the cause, then run the same command again: it does only what is missing.", soft_wrap=True)


def _wide_enough(table: Table) -> Console:
    """The terminal; in a file or a pipe nothing limits the width, and folded cells are hard to read."""
    console = Console()
    if console.is_terminal:
        return console
    width = console.measure(table, options=console.options.update(width=10_000)).maximum
    return Console(width=max(80, width))
