"""What the terminal shows of a sweep while it runs."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from slm_pl.console import bar_columns
from slm_pl.sweep.cells import Cell, size_text
from slm_pl.sweep.record import Record, export_is_gone, replaced, steps_to_do
from slm_pl.sweep.summary import NOTE, Summary, table_of

_NAMES = (0, 1, 2)  # of a line: method, size and seeds; they stand in every table


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
    console = Console()
    with Progress(*bar_columns(), console=console, transient=not console.is_terminal) as bar:
        yield Board(bar, total)


def print_plan(cells: Sequence[Cell], overwrite: bool) -> None:
    """The table of ``--dry_run``."""
    table = Table(title="What this sweep would do")
    for head in ("Cell", "Method", "Size", "Seed", "Runs"):
        table.add_column(head)
    for cell in cells:
        runs = _runs(cell, overwrite)
        size = "–" if cell.ratio is None else size_text(cell.ratio)
        table.add_row(*(Text(text) for text in (cell.name, cell.method or "dense", size, str(cell.seed), runs)))
    _wide_enough(table).print(table)


def _runs(cell: Cell, overwrite: bool) -> str:
    todo = ", ".join(step.command for step in steps_to_do(cell, overwrite)) or "nothing: it is finished"
    made_with = replaced(cell)
    if made_with is not None and overwrite:
        return f"{todo}; replaces a cell made with {made_with}"
    if made_with is not None:
        return f"refused without --overwrite: finished with {made_with}"
    return f"{todo} (export is gone)" if export_is_gone(cell) else todo


def print_summary(summary: Summary, directory: Path) -> None:
    """The main table; in a narrow terminal, several below each other."""
    heads, lines = table_of(summary)

    def table_with(columns: list[int]) -> Table:
        table = Table(title="Sweep")
        for index in (*_NAMES, *columns):
            head = "\n".join(textwrap.wrap(heads[index], 16, break_long_words=False))
            table.add_column(Text(head), justify="right" if index else "left", no_wrap=index not in _NAMES)
        for before, line, cells in zip([None, *summary.lines], summary.lines, lines, strict=False):
            if before is not None and before.method != line.method:
                table.add_section()
            table.add_row(*(Text(cells[index]) for index in (*_NAMES, *columns)))
        return table

    left = list(range(len(_NAMES), len(heads)))
    console = _wide_enough(table_with(left))
    while left:
        fitting = len(left)
        # Numbers are not folded; one column stands in any case.
        while fitting > 1 and _width(console, table_with(left[:fitting])) > console.width:
            fitting -= 1
        console.print(table_with(left[:fitting]))
        left = left[fitting:]
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
    console.print(
        "Mend the cause, then run the same command again, without --overwrite: it does only what is missing.",
        soft_wrap=True,
    )


def _wide_enough(table: Table) -> Console:
    """The terminal; in a file or a pipe nothing limits the width, and folded cells are hard to read."""
    console = Console()
    if console.is_terminal:
        return console
    return Console(width=max(80, _width(console, table)))


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(width=10_000)).maximum
