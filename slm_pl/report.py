"""A comparison as a table on the terminal, ``comparison.md``, ``comparison.json`` and ``comparison.png``.

Where perplexity and speed of several models compare, ``pareto.png`` shows what each pays for its speed.
"""

import dataclasses
import io
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from slm_pl.comparison import Cell, Comparison, Quantity, Row, line_up
from slm_pl.console import LOAD_EXAMPLE
from slm_pl.files import write_bytes, write_text
from slm_pl.pictures import COLOURS
from slm_pl.results import SCHEMA_VERSION, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def compare(paths: Sequence[str], output_dir: str | None = None) -> Comparison:
    """Prints results.json files side by side and writes comparison.md, .json and .png, and pareto.png.

    Args:
        paths: The results.json files; a dense baseline (without a plan) is put first, the others stay in this order.
        output_dir: Where to write; the directory that holds the run directories by default.

    Returns:
        The table.

    Raises:
        UsageError: If a file cannot be read, or the output not be written.
    """
    comparison = line_up(paths, output_dir)
    directory = comparison.output_dir
    pareto = _pareto(comparison)
    write_text(directory / "comparison.md", _markdown(comparison, pareto is not None))
    write_text(directory / "comparison.json", _as_json(comparison))
    write_bytes(directory / "comparison.png", _picture(comparison))
    if pareto is None:
        (directory / PARETO).unlink(missing_ok=True)  # of other models, by an earlier run
    else:
        write_bytes(directory / PARETO, pareto)
    _print(comparison, pareto is not None)
    return comparison


PARETO = "pareto.png"
_MOST_PERPLEXITY = 1000.0  # times the least: ruined models are drawn at the edge
_WIDEST = 5  # models beside each other; more stand below each other


def _number(value: float, quantity: Quantity) -> str:
    if quantity == "count":
        return f"{value:,.0f}"
    if quantity == "parameters":
        return f"{value / 1e9:,.2f} B" if value >= 1e9 else f"{value / 1e6:,.1f} M" if value >= 1e5 else f"{value:,.0f}"
    if quantity == "perplexity":
        # A ruined model's digits say nothing.
        return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else _rounded(value)
    if quantity == "accuracy":
        return f"{100 * value:.1f} %"
    if quantity == "seconds":
        return f"{value:,.2f} s" if value >= 1 else f"{1000 * value:,.1f} ms"
    if quantity == "rate":
        return f"{value:,.1f}"
    return f"{value / 2**30:,.1f} GiB" if value >= 10 * 2**30 else f"{value / 2**20:,.0f} MiB"


def _rounded(value: float) -> str:
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def _text(cell: Cell, quantity: Quantity) -> str:
    if cell.value is None:
        return "–"
    text = _number(cell.value, quantity)
    if cell.stderr is not None:
        if quantity == "accuracy":
            text = f"{100 * cell.value:.1f} ± {100 * cell.stderr:.1f} %"
        elif quantity == "perplexity" and cell.value >= 1e6:
            text += f" ± {_rounded(cell.stderr)}"
        else:
            # As many digits as the value has, but never an error of zero.
            text += f" ± {cell.stderr:,.{2 if cell.value < 1000 or cell.stderr < 1 else 0}f}"
    if cell.ratio is not None:
        text += f" ({cell.ratio:.2f}×)" if quantity == "rate" else f" ({100 * cell.ratio:.1f} %)"
    return text


def _table(comparison: Comparison) -> tuple[list[str], list[list[str]], list[str]]:
    """Heads of the columns, the lines, and the footnotes that dashes refer to; many models are a line each."""
    lines, notes = _texts(comparison)
    if len(comparison.labels) <= _WIDEST:
        return ["", *comparison.labels], lines, notes
    titles = [line[0] for line in lines]
    models = [[label, *cells] for label, *cells in zip(comparison.labels, *(line[1:] for line in lines), strict=True)]
    return ["", *titles], models, notes


def _texts(comparison: Comparison) -> tuple[list[list[str]], list[str]]:
    """The quantities' lines, title first, and the footnotes that their dashes refer to."""
    notes: list[str] = []
    lines = []
    for row in comparison.rows:
        line = [row.title]
        for cell in row.cells:
            text = _text(cell, row.quantity)
            if cell.reason is not None:
                if cell.reason not in notes:
                    notes.append(cell.reason)
                text += f" [{notes.index(cell.reason) + 1}]"
            line.append(text)
        lines.append(line)
    return lines, notes


def _environment_line(label: str, record: Results) -> str:
    environment = record.environment
    threads = "" if environment.device.startswith("cuda") else f", {environment.threads} threads"
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    return (
        f"{label}: {environment.device} ({environment.device_name}{threads}), {environment.dtype}, {environment.date}; "
        f"{packages}"
    )


def _markdown(comparison: Comparison, pareto: bool) -> str:
    heads, lines, notes = _table(comparison)

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    parts = [
        "# Comparison",
        "\n".join([line(heads), "|---" + "|---:" * (len(heads) - 1) + "|", *map(line, lines)]),
        "\n".join(f"[{index}] {note}  " for index, note in enumerate(notes, 1)),
        "\n\n".join(f"**Warning:** {warning}" for warning in comparison.warnings),
        "± is one standard error. Ratios are against the dense baseline."
        if comparison.baseline
        else "± is one standard error.",
        "![The same figures as bars](comparison.png)",
        f"![Perplexity against speed]({PARETO})" if pareto else "",
        "\n".join(
            f"- {_environment_line(label, record)}"
            for label, record in zip(comparison.labels, comparison.records, strict=True)
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _as_json(comparison: Comparison) -> str:
    models = [
        {
            **dataclasses.asdict(record.model),
            "label": label,
            "results": str(path),
            "environment": dataclasses.asdict(record.environment),
        }
        for label, path, record in zip(comparison.labels, comparison.paths, comparison.records, strict=True)
    ]
    record = {
        "schema_version": SCHEMA_VERSION,
        "baseline": comparison.labels[0] if comparison.baseline else None,
        "models": models,
        "rows": [dataclasses.asdict(row) for row in comparison.rows],
        "warnings": comparison.warnings,
    }
    return json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _print(comparison: Comparison, pareto: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heads, lines, notes = _table(comparison)
    quantities = len(comparison.labels) <= _WIDEST
    rooms = [row.name.partition(".")[0].removeprefix("num_") for row in comparison.rows]
    console = Console()

    def table_of(columns: list[int]) -> Table:
        table = Table(title="Comparison")
        table.add_column("", overflow="fold")
        for column in columns:
            head = heads[column] if quantities else "\n".join(textwrap.wrap(heads[column], 16))
            table.add_column(Text(head), justify="right", overflow="fold", no_wrap=not quantities)
        for index, line in enumerate(lines):
            if quantities and index and rooms[index] != rooms[index - 1] and rooms[index - 1] != "layers":
                table.add_section()
            table.add_row(*(Text(line[column]) for column in (0, *columns)))
        return table

    def width(columns: list[int]) -> int:
        return console.measure(table_of(columns), options=console.options.update(width=10_000)).maximum

    columns = list(range(1, len(heads)))
    if not console.is_terminal:
        # In a file or a pipe nothing limits the width, and folded cells are hard to read.
        console = Console(width=max(80, width(columns)))
    groups = [columns]
    while not quantities and len(groups[-1]) > 1 and width(groups[-1]) > console.width:
        # Numbers are not folded: what does not fit beside the others goes into a table of its own below.
        fitting = next((n for n in range(len(groups[-1]) - 1, 1, -1) if width(groups[-1][:n]) <= console.width), 1)
        groups[-1:] = [groups[-1][:fitting], groups[-1][fitting:]]
    for group in groups:
        console.print(table_of(group))
    for index, note in enumerate(notes, 1):
        console.print(Text(f"[{index}] {note}", style="dim"))
    for warning in comparison.warnings:
        console.print(Text(f"Warning: {warning}", style="yellow"))
    console.print(
        Text(
            f"Written: {comparison.output_dir}/comparison.md, comparison.json, comparison.png" + f", {PARETO}" * pareto
        ),
        soft_wrap=True,
    )
    if comparison.export is not None:
        console.print(Text(f"\nThe compressed model: {comparison.export}\nLoad it with"), soft_wrap=True)
        console.print(Text(LOAD_EXAMPLE.format(path=comparison.export), style="bold"), soft_wrap=True)


_UNITS: dict[Quantity, tuple[float, str]] = {
    "count": (1, ""),
    "parameters": (1e6, " (million)"),
    "perplexity": (1, ""),
    "accuracy": (0.01, " (%)"),
    "seconds": (1, " (s)"),
    "rate": (1, ""),
    "bytes": (2**20, " (MiB)"),
}


def _panels(rows: list[Row]) -> list[Row]:
    """The rows worth a picture: what was kept, what it cost and what it brought."""

    def first(of: Callable[[Row], bool], most: int = 1) -> list[Row]:
        return [row for row in rows if of(row)][:most]

    panels = [
        *first(lambda row: row.quantity == "perplexity", 2),
        *first(lambda row: row.name.startswith("zero_shot.mean")),
        *first(lambda row: row.quantity == "parameters"),
        *first(lambda row: row.name.endswith(".latency_s")),
        *first(lambda row: row.quantity == "rate"),
        *first(lambda row: row.quantity == "bytes"),
    ]
    # Latency says what throughput says: it gives way where the others fill two lines of three.
    return [row for row in panels if not row.name.endswith(".latency_s")] if len(panels) > 6 else panels


def _picture(comparison: Comparison) -> bytes:
    """A PNG of small panels with one horizontal bar per model, so that long labels stay readable."""
    from matplotlib.figure import Figure

    panels = _panels(comparison.rows)
    models = len(comparison.labels)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    # A Figure of its own, not pyplot's: nothing global is touched, and it is drawn by Agg.
    figure = Figure(figsize=(4.3 * columns, (1.3 + 0.42 * models) * lines), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr,call-arg]
    all_axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, row in zip(all_axes, panels, strict=False):
        _draw_panel(axes, row, comparison.labels)
    for axes in all_axes[len(panels) :]:
        axes.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _pareto(comparison: Comparison) -> bytes | None:
    """A PNG of perplexity against tokens per second, with the models that no other one is better than in both.

    Returns:
        None if fewer than two models have both.
    """
    from matplotlib.figure import Figure

    pairs = [
        (perplexity, speed, _points(comparison, perplexity, speed))
        for perplexity in comparison.rows
        for speed in comparison.rows
        if perplexity.quantity == "perplexity" and speed.quantity == "rate"
    ]
    if not pairs:
        return None
    perplexity, speed, points = max(pairs, key=lambda pair: len(pair[2]))  # of equals the first
    if len(points) < 2:
        return None
    best = sorted((p for p in points if not any(other.better_than(p) for other in points)), key=lambda p: p.x)
    top = _MOST_PERPLEXITY * min(point.y for point in points)
    labels = [
        _cut(point.label, 30) + (f" ({_number(point.y, 'perplexity')}) ↑" if point.y > top else "") for point in points
    ]
    points = [point if point.y <= top else dataclasses.replace(point, y=top, y_error=0.0) for point in points]
    figure = Figure(figsize=(7.5, max(3.6, 1.2 + 0.27 * len(points))), layout="constrained")
    axes = figure.subplots()
    axes.plot([p.x for p in best], [p.y for p in best], color="#BBBBBB", zorder=1, label="no other is better in both")
    for number, point in enumerate(points):
        colour = COLOURS[number % len(COLOURS)]
        marker = "^" if point.y == top else "osDvP"[number // len(COLOURS) % 5]
        x_error, y_error = point.x_error or None, point.y_error or None
        axes.errorbar(
            point.x, point.y, y_error, x_error, fmt=marker, color=colour, markersize=7, capsize=2, elinewidth=0.8
        )
    values = [point.y for point in points]
    if max(values) > 3 * min(values):
        axes.set_yscale("log")
    left, right = min(point.x - point.x_error for point in points), max(point.x + point.x_error for point in points)
    axes.set_xlim(left - 0.05 * (right - left or 1), right + 0.05 * (right - left or 1))
    _label_points(axes, points, labels)
    axes.set_xlabel(f"{speed.title} →", fontsize=9)
    axes.set_ylabel(
        f"← {_wrapped(perplexity.title, 44)}" + (", log scale" if axes.get_yscale() == "log" else ""), fontsize=9
    )
    axes.legend(fontsize=8, frameon=False, loc="best")
    axes.tick_params(labelsize=8, colors="#555555")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class _Point:
    """One model's speed and perplexity; errors are the spread of the repeats and the standard error."""

    label: str
    x: float
    y: float
    x_error: float
    y_error: float

    def better_than(self, other: "_Point") -> bool:
        """Of less perplexity, and not slower by more than the timings spread."""
        slower = other.x - self.x > math.hypot(self.x_error, other.x_error)
        return not slower and (self.y < other.y or (self.y == other.y and self.x > other.x))


def _points(comparison: Comparison, perplexity: Row, speed: Row) -> list[_Point]:
    """The models that have both."""
    return [
        _Point(label, x.value, y.value, x.spread or 0.0, min(y.stderr or 0.0, 0.9 * y.value))
        for label, x, y in zip(comparison.labels, speed.cells, perplexity.cells, strict=True)
        if x.value is not None and y.value is not None
    ]


def _label_points(axes: "Axes", points: list[_Point], labels: list[str]) -> None:
    """Names at the right edge, apart from each other, each with a line to its point."""
    to_share = axes.transScale + axes.transLimits

    def height(value: float) -> float:
        return float(to_share.transform((points[0].x, value))[1])

    axes.autoscale_view(scalex=False)
    step = min(0.065, 1.0 / len(points))
    order = sorted(range(len(points)), key=lambda index: points[index].y)
    places = [height(points[index].y) for index in order]
    for place in range(1, len(places)):
        places[place] = max(places[place], places[place - 1] + step)
    above = places[-1] - 1.0
    if above > 0:  # pushed out at the top: push back down
        places[-1] = 1.0
        for place in range(len(places) - 2, -1, -1):
            places[place] = min(places[place], places[place + 1] - step)
    for share, index in zip(places, order, strict=True):
        point = points[index]
        axes.annotate(
            labels[index].replace("$", r"\$"),
            (point.x, point.y),
            xycoords="data",
            xytext=(1.03, share),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "color": COLOURS[index % len(COLOURS)],
                "linewidth": 0.6,
                "alpha": 0.7,
            },
        )


def _draw_panel(axes: "Axes", row: Row, labels: list[str]) -> None:
    scale, unit = _UNITS[row.quantity]
    present = [cell.value / scale for cell in row.cells if cell.value is not None]
    logarithmic = row.quantity == "perplexity" and bool(present) and max(present) > 10 * min(present)
    # No perplexity is below 1, so that is where a logarithmic bar begins.
    start = 1.0 if logarithmic else 0.0
    ends = []
    for position, cell in enumerate(row.cells):
        if cell.value is None:
            axes.annotate(
                "– no comparable figure",
                (0, position),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color="#555555",
                fontsize=9,
            )
            continue
        value = cell.value / scale
        error = cell.stderr / scale if cell.stderr is not None else 0.0
        axes.barh(
            position,
            value - start,
            left=start,
            height=0.62,
            color=COLOURS[position % len(COLOURS)],
            xerr=error or None,
            error_kw={"capsize": 3, "elinewidth": 1, "ecolor": "#222222"},
        )
        axes.annotate(
            _text(dataclasses.replace(cell, stderr=None), row.quantity),
            (value + error, position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
        ends.append(value + error)
    end = max(ends, default=1.0)
    # Room to the right of the longest bar for its value.
    if logarithmic:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xlim(start, end**1.45)
    else:
        axes.set_xlim(start, 1.6 * end or 1.0)
    # No ticks in the room for the values: accuracy has no 120 %.
    axes.set_xticks([tick for tick in axes.get_xticks() if start <= tick <= 1.02 * end])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_yticks(range(len(labels)), [_wrapped(label, 20) for label in labels], fontsize=9)
    name, _, setting = row.title.partition(" (")
    notes = [setting.rstrip(")")] * bool(setting) + ["log scale"] * logarithmic
    axes.set_title(_wrapped(f"{name}{unit}", 36), fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel("; ".join(notes), fontsize=8, color="#555555", loc="left")
    axes.tick_params(axis="x", labelsize=8, colors="#555555")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _cut(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def _wrapped(label: str, width: int) -> str:
    lines = textwrap.wrap(label.replace("$", r"\$"), width)  # a dollar sign, not the beginning of a formula
    return "\n".join(lines[:3]) + ("…" if len(lines) > 3 else "")
