"""A comparison as pictures: bars of every quantity, and perplexity against speed."""

import dataclasses
import io
import math
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from slm_pl.comparison import Comparison, Quantity, Row
from slm_pl.figures import cell_text, number_text
from slm_pl.pictures import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_PERPLEXITY = 1000.0  # times the least: ruined models are drawn at the edge
_UNITS: dict[Quantity, tuple[float, str]] = {
    "count": (1, ""),
    "parameters": (1e6, " (million)"),
    "perplexity": (1, ""),
    "accuracy": (0.01, " (%)"),
    "seconds": (1, " (s)"),
    "rate": (1, ""),
    "bytes": (2**20, " (MiB)"),
    "share": (0.01, " (%)"),
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


def comparison_bars(comparison: Comparison) -> bytes:
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


def pareto_plot(comparison: Comparison) -> bytes | None:
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
        _cut(point.label, 30) + (f" ({number_text(point.y, 'perplexity')}) ↑" if point.y > top else "")
        for point in points
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
            cell_text(dataclasses.replace(cell, stderr=None), row.quantity),
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
