"""The main table of a sweep: a line for every method and size, over the seeds."""

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slm_pl import files
from slm_pl.report.figures import number_text
from slm_pl.sweep.cells import Cell, size_text

if TYPE_CHECKING:
    from slm_pl.report.comparison import Comparison
    from slm_pl.report.rows import Quantity, Row

SCHEMA_VERSION = 1
_MAIN = ("num_parameters", "perplexity.", "zero_shot.")


@dataclass(frozen=True)
class Figure:
    """One quantity over the seeds.

    Args:
        mean: Over the seeds that have it; None if none does.
        stdev: The standard deviation over them, as of a sample; None with fewer than two.
        n: How many there are.
    """

    mean: float | None
    stdev: float | None
    n: int


@dataclass(frozen=True)
class Line:
    """One method at one size.

    Args:
        method: Its label; ``dense`` for the model as it is.
        ratio: The size; None for the dense model.
        recovered: Whether it was trained.
        seeds: Those that finished.
        failed: Those that did not.
        figures: By the name of the row of the comparison.
    """

    method: str
    ratio: float | None
    recovered: bool
    seeds: list[int]
    failed: list[int]
    figures: dict[str, Figure]


@dataclass(frozen=True)
class Summary:
    """The table.

    Args:
        rows: What was measured, in the comparison's order; each is a column here.
        lines: The dense model, then methods x sizes.
    """

    rows: "list[Row]"
    lines: list[Line]


def summarise(comparison: "Comparison", cells: Sequence[Cell]) -> Summary:
    """Puts the columns of a comparison together by method and size.

    Args:
        comparison: Of the cells that finished.
        cells: All cells, in order.
    """
    columns = {path.resolve().parent: index for index, path in enumerate(comparison.paths)}
    groups: dict[tuple[str | None, float | None], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.ratio), []).append(cell)
    lines = []
    for (method, ratio), group in groups.items():
        places = {cell.seed: columns.get(cell.directory.resolve()) for cell in group}
        done = {seed: place for seed, place in places.items() if place is not None}
        figures = {row.name: _figure([row.cells[place].value for place in done.values()]) for row in comparison.rows}
        failed = [seed for seed in places if seed not in done]
        lines.append(Line(method or "dense", ratio, group[0].recovered, list(done), failed, figures))
    return Summary(comparison.rows, lines)


def _figure(values: Sequence[float | None]) -> Figure:
    found = [float(value) for value in values if value is not None and math.isfinite(value)]
    return Figure(
        statistics.fmean(found) if found else None,
        statistics.stdev(found) if len(found) > 1 else None,
        len(found),
    )


def write_summary(summary: Summary, directory: Path) -> None:
    """Writes ``sweep.md`` (the main figures), ``sweep.csv`` and ``sweep.json`` (all figures).

    Raises:
        UsageError: If the directory cannot be written.
    """
    files.write_text(directory / "sweep.md", _markdown(summary))
    files.write_text(directory / "sweep.csv", _csv(summary))
    record = {
        "schema_version": SCHEMA_VERSION,
        "columns": [{"name": row.name, "title": row.title, "quantity": row.quantity} for row in summary.rows],
        "lines": [asdict(line) for line in summary.lines],
    }
    files.write_text(directory / "sweep.json", json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def table_of(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the main table, as text."""
    main = [row for row in summary.rows if row.name.startswith(_MAIN) and row.place == "table"]
    lines = []
    for line in summary.lines:
        name = line.method + (", recovered" if line.recovered else "")
        size = "–" if line.ratio is None else size_text(line.ratio)
        figures = [_text(line, line.figures[row.name], row.quantity) for row in main]
        lines.append([name, size, _seeds_text(line), *figures])
    return ["Method", "Removed", "Seeds", *(row.title for row in main)], lines


def _seeds_text(line: Line) -> str:
    whole = len(line.seeds) + len(line.failed)
    return f"{len(line.seeds)} of {whole}" if line.failed else str(whole)


def _text(line: Line, figure: Figure, quantity: "Quantity") -> str:
    if figure.mean is None:
        return "–"
    text = number_text(figure.mean, quantity)
    if figure.stdev is not None:
        text += f" ± {number_text(figure.stdev, quantity)}"
    # Of seeds that failed, the column of the seeds tells.
    return text if figure.n == len(line.seeds) else f"{text} ({figure.n} of {len(line.seeds) + len(line.failed)})"


def _markdown(summary: Summary) -> str:
    heads, lines = table_of(summary)

    def line_of(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    parts = [
        "# Sweep",
        "\n".join([line_of(heads), "|---|" + "---:|" * (len(heads) - 1), *map(line_of, lines)]),
        NOTE if any(len(line.seeds) > 1 for line in summary.lines) else "",
        "Removed is the share of all parameters that was asked for. [comparison.md](comparison.md) has every model by "
        "itself, with speed, memory and standard errors; sweep.csv and sweep.json have all figures of this table.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


NOTE = (
    "Figures are the mean over the seeds that finished ± the standard deviation over them; `(2 of 3)` behind a figure: "
    "it is of two of three seeds, the others have none."
)


def _csv(summary: Summary) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [name for row in summary.rows for name in (row.name, f"{row.name}.stdev", f"{row.name}.n")]
    writer.writerow(["method", "ratio", "recovered", "seeds", "failed", *names])
    for line in summary.lines:
        figures = [line.figures[row.name] for row in summary.rows]
        numbers = [number for figure in figures for number in (figure.mean, figure.stdev, figure.n)]
        writer.writerow([line.method, line.ratio, line.recovered, len(line.seeds), len(line.failed), *numbers])
    return out.getvalue()
