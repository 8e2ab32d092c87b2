"""What each model pays for its quality: a grid of quality against time, size and memory."""

import functools
import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from slm_pl.drawing import COLOURS, GREY, new_figure, plain, plain_text, shortened, to_png
from slm_pl.report.comparison import Comparison
from slm_pl.report.figures import UNITS, number_text
from slm_pl.report.rows import MORE_IS_BETTER, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED = 40
"""Of more models, only so many have their names in a picture, and bars are not drawn."""
_MOST_PERPLEXITY = 1000.0  # times the least: ruined models are drawn at the edge
_MARKERS = "osDvP"
_INK = "#222222"


@dataclass(frozen=True)
class Point:
    """One model's cost and quality; errors are the spread of the repeats and the standard error."""

    model: int
    x: float
    y: float
    x_error: float
    y_error: float


@dataclass(frozen=True)
class Panel:
    """One quality against one cost, of the models that have both."""

    quality: Row
    cost: Row
    points: list[Point]

    @functools.cached_property
    def frontier(self) -> list[Point]:
        """The models that no other one is better than in both, from cheap to dear."""
        sign = -1 if self.quality.quantity in MORE_IS_BETTER else 1

        def better(one: Point, other: Point) -> bool:
            """Of better quality, and not dearer by more than the repeats spread."""
            dearer = one.x - other.x > math.hypot(one.x_error, other.x_error)
            ahead = sign * (other.y - one.y)
            return not dearer and (ahead > 0 or (ahead == 0 and one.x < other.x))

        best = [point for point in self.points if not any(better(other, point) for other in self.points)]
        return sorted(best, key=lambda point: (point.x, sign * point.y))


def panels_of(comparison: Comparison) -> list[list[Panel]]:
    """The grid, a line for each quality and a column for each cost; empty if no two models can be compared.

    Of several rows of a kind it is the one that most models have; of equals the first.
    """
    rows = [row for row in comparison.rows if row.drawn]

    def most(of: Callable[[Row], bool], models: Callable[[Row], int]) -> list[Row]:
        chosen = max((row for row in rows if of(row)), key=models, default=None)
        return [] if chosen is None else [chosen]

    def present(row: Row) -> int:
        return sum(cell.value is not None for cell in row.cells)

    qualities = [
        *most(lambda row: row.quantity == "perplexity", present),
        *most(lambda row: row.name.startswith("zero_shot.mean.") and row.quantity == "accuracy", present),
    ]

    def shared(cost: Row) -> int:
        return sum(len(_points(quality, cost)) for quality in qualities)

    costs = [
        *most(lambda row: row.name.endswith(".latency_s"), shared),
        *most(lambda row: row.quantity == "parameters", shared),
        *most(lambda row: row.quantity == "bytes", shared),
    ]
    drawn = {
        (quality.name, cost.name): Panel(quality, cost, points)
        for quality in qualities
        for cost in costs
        # One point shows nothing, nor does a cost that is the same of all.
        if len(points := _points(quality, cost)) > 1 and len({point.x for point in points}) > 1
    }
    qualities = [row for row in qualities if any(row.name == quality for quality, _ in drawn)]
    costs = [row for row in costs if any(row.name == cost for _, cost in drawn)]
    return [[drawn.get((quality.name, cost.name), Panel(quality, cost, [])) for cost in costs] for quality in qualities]


def _points(quality: Row, cost: Row) -> list[Point]:
    return [
        Point(index, x.value, y.value, x.spread or 0.0, min(y.stderr or 0.0, 0.9 * abs(y.value)))
        for index, (x, y) in enumerate(zip(cost.cells, quality.cells, strict=True))
        if x.value is not None and y.value is not None
    ]


def pareto_plot(comparison: Comparison) -> bytes | None:
    """A PNG of perplexity and zero-shot accuracy against latency, parameters and memory.

    Returns:
        None if fewer than two models have a quality and a cost.
    """
    grid = panels_of(comparison)
    if not grid:
        return None
    lines, columns = len(grid), len(grid[0])
    named = _named(grid, len(comparison.labels))
    labels = {index: f"{index + 1}  {shortened(comparison.labels[index], 48)}" for index in named}
    in_line = max(1, int((3.7 * columns + 0.4) / (0.45 + 0.075 * max(map(len, labels.values())))))
    with plain_text():
        figure = new_figure(3.5 * columns + 0.6, 3.3 * lines + 0.5 + 0.2 * math.ceil(len(labels) / in_line))
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr,call-arg]
        all_axes = figure.subplots(lines, columns, squeeze=False, sharey="row")
        edges = [_edge(panels) for panels in grid]
        for panels, axes_of_line, edge in zip(grid, all_axes, edges, strict=True):
            for panel, axes in zip(panels, axes_of_line, strict=True):
                _draw(axes, panel, edge, labels)
            _scale(axes_of_line[0], panels, edge)
        for panel, axes in zip(grid[-1], all_axes[-1], strict=True):
            axes.set_xlabel(f"← {_name(panel.cost)}", fontsize=9)
        for panel, axes in zip(grid[0], all_axes[0], strict=True):
            if panel.points and panel.cost.quantity == "seconds" and panel.cost.protocol["new_tokens"]:
                _tokens_on_top(axes, panel.cost)
        ruined = any(p.y > edge for panels, edge in zip(grid, edges, strict=True) for one in panels for p in one.points)
        _add_legend(figure, labels, in_line, ruined, len(comparison.labels) - len(labels))
        figure.draw_without_rendering()  # so that it is known where everything is
        for panels, axes_of_line, edge in zip(grid, all_axes, edges, strict=True):
            for panel, axes in zip(panels, axes_of_line, strict=True):
                _number_points(figure, axes, panel, edge, labels)
        return to_png(figure)


def _named(grid: list[list[Panel]], models: int) -> list[int]:
    """The models whose numbers and labels are written: all, or where they are many, the best ones."""
    if models <= MOST_NAMED:
        return list(range(models))
    best = {point.model for panels in grid for panel in panels for point in panel.frontier}
    return sorted({0, *sorted(best)[: MOST_NAMED - 1]})


def _name(row: Row) -> str:
    """The row's title with its unit, the setting below."""
    name, _, setting = row.title.partition(" (")
    return f"{name}{UNITS[row.quantity][1]}" + (f"\n{setting.removesuffix(')')}" if setting else "")


def _style(model: int) -> tuple[str, str]:
    return COLOURS[model % len(COLOURS)], _MARKERS[model // len(COLOURS) % len(_MARKERS)]


def _edge(panels: list[Panel]) -> float:
    """The most that is drawn in a line of the grid: ruined models stand there."""
    if panels[0].quality.quantity != "perplexity":
        return math.inf
    return _MOST_PERPLEXITY * min(point.y for panel in panels for point in panel.points)


def _draw(axes: "Axes", panel: Panel, edge: float, named: Container[int]) -> None:
    plain(axes)
    if not panel.points:
        axes.annotate(
            "fewer than two models to compare",
            (0.5, 0.5),
            xycoords="axes fraction",
            ha="center",
            color=GREY,
            fontsize=8,
        )
        axes.set_xticks([])
        return
    x_unit, y_unit = UNITS[panel.cost.quantity][0], UNITS[panel.quality.quantity][0]
    axes.plot(
        [point.x / x_unit for point in panel.frontier],
        [min(point.y, edge) / y_unit for point in panel.frontier],
        color="#CCCCCC",
        linewidth=2,
        zorder=1,
    )
    unnamed = [point for point in panel.points if point.model not in named]
    if unnamed:
        across, up = [point.x / x_unit for point in unnamed], [min(point.y, edge) / y_unit for point in unnamed]
        axes.scatter(across, up, s=8, color=GREY, linewidths=0, zorder=1)
    for point in panel.points:
        if point.model not in named:
            continue
        colour, marker = _style(point.model)
        ruined = point.y > edge
        axes.errorbar(
            point.x / x_unit,
            min(point.y, edge) / y_unit,
            None if ruined else point.y_error / y_unit or None,
            point.x_error / x_unit or None,
            fmt="^" if ruined else marker,
            color=colour,
            markersize=6.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            elinewidth=0.7,
            zorder=3,
        )
    left = min(point.x - point.x_error for point in panel.points) / x_unit
    right = max(point.x + point.x_error for point in panel.points) / x_unit
    margin = 0.12 * (right - left)
    axes.set_xlim(max(left - margin, 0.5 * min(point.x for point in panel.points) / x_unit), right + margin)
    axes.margins(y=0.1)
    axes.grid(color="#EEEEEE", linewidth=0.6)
    axes.set_axisbelow(True)


def _scale(axes: "Axes", panels: list[Panel], edge: float) -> None:
    """The axis of quality, which a line of the grid shares."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    quality = panels[0].quality
    values = [min(point.y, edge) for panel in panels for point in panel.points]
    logarithmic = quality.quantity == "perplexity" and max(values) > 3 * min(values) > 0
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if max(values) > 200 * min(values) else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    arrow = "→" if quality.quantity in MORE_IS_BETTER else "←"
    axes.set_ylabel(f"{arrow} {_name(quality)}" + ", log scale" * logarithmic, fontsize=9)


def _tokens_on_top(axes: "Axes", latency: Row) -> None:
    """A second scale of what the same latency is in tokens per second."""
    tokens = float(str(latency.protocol["batch_size"])) * float(str(latency.protocol["new_tokens"]))

    def inverse(values: object) -> object:
        import numpy as np

        with np.errstate(divide="ignore"):
            return tokens / np.asarray(values, dtype=float)

    top = axes.secondary_xaxis("top", functions=(inverse, inverse))  # type: ignore[arg-type]
    top.set_xlabel("Output tokens/s", fontsize=8, color=GREY)
    top.tick_params(labelsize=8, colors=GREY)
    top.spines["top"].set_color(GREY)


def _add_legend(figure: "Figure", labels: dict[int, str], in_line: int, ruined: bool, unnamed: int) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker=_style(index)[1], color=_style(index)[0], markersize=6, label=label)
        for index, label in labels.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(in_line, len(handles)),
        fontsize=8,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.2,
        title="Arrows point to the better side. Grey line: no other model is better in both."
        + " Triangle at the edge: ruined, with its value." * ruined
        + f"\nNamed are the first and the best; {unnamed:,} others are points only." * (unnamed > 0),
        title_fontsize=8,
    )


def _number_points(figure: "Figure", axes: "Axes", panel: Panel, edge: float, named: Container[int]) -> None:
    """Writes the numbers of the named models beside their points, where nothing else is."""
    x_unit, y_unit = UNITS[panel.cost.quantity][0], UNITS[panel.quality.quantity][0]
    in_points = 72 / figure.dpi

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = in_points * axes.transData.transform((x / x_unit, min(y, edge) / y_unit))
        return float(across), float(up)

    frame = axes.get_window_extent()
    room = _Box(*(in_points * float(side) for side in (frame.x0, frame.y0, frame.x1, frame.y1)))
    places = [place(point.x, point.y) for point in panel.points]
    lines = []
    for point, (x, y) in zip(panel.points, places, strict=True):
        if point.model not in named:
            continue
        lines += [((place(point.x + side * point.x_error, point.y)[0], y), (x, y)) for side in (-1, 1)]
        if point.y <= edge:
            lines += [((x, place(point.x, point.y + side * point.y_error)[1]), (x, y)) for side in (-1, 1)]
    ends = [place(point.x, point.y) for point in panel.frontier]
    lines += list(zip(ends, ends[1:], strict=False))
    bars = [_Box.around(x, y, 1.5, 1.5) for line in lines for x, y in _along(*line)]
    texts = {
        index: f"{point.model + 1} ({number_text(point.y, 'perplexity')})" if point.y > edge else str(point.model + 1)
        for index, point in enumerate(panel.points)
        if point.model in named
    }
    for index, (dx, dy, far) in _apart(places, texts, bars, room).items():
        point, text = panel.points[index], texts[index]
        note = axes.annotate(
            text,
            (point.x / x_unit, min(point.y, edge) / y_unit),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7.5,
            color=_INK,
            zorder=4,
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
            if far
            else None,
        )
        note.set_in_layout(False)


_Place = tuple[float, float]


class _Box(NamedTuple):
    """A rectangle, in points."""

    left: float
    low: float
    right: float
    high: float

    @classmethod
    def around(cls, x: float, y: float, half_width: float, half_height: float) -> "_Box":
        return cls(x - half_width, y - half_height, x + half_width, y + half_height)

    def shared(self, other: "_Box") -> float:
        """The area that lies in both."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.high, other.high) - max(self.low, other.low)
        return wide * high if wide > 0 and high > 0 else 0.0


def _along(start: _Place, end: _Place) -> list[_Place]:
    """Places on a line, three points from each other."""
    steps = max(1, int(math.dist(start, end) / 3))
    return [
        (start[0] + (end[0] - start[0]) * step / steps, start[1] + (end[1] - start[1]) * step / steps)
        for step in range(steps + 1)
    ]


def _apart(
    places: list[_Place], texts: dict[int, str], lines: list[_Box], room: _Box
) -> dict[int, tuple[float, float, bool]]:
    """Where each text goes, in points from its place, and whether that is too far to see whose text it is.

    A text lies on no other text, on no point and, where that is possible, on no line and near no other's point.
    """
    import numpy

    barriers = numpy.array(lines or [_Box(0.0, 0.0, 0.0, 0.0)])
    taken = numpy.array([_Box.around(x, y, 4, 4) for x, y in places])
    points = numpy.array(places)

    def shared(box: _Box, boxes: numpy.ndarray) -> float:
        wide = numpy.minimum(box.right, boxes[:, 2]) - numpy.maximum(box.left, boxes[:, 0])
        high = numpy.minimum(box.high, boxes[:, 3]) - numpy.maximum(box.low, boxes[:, 1])
        return float((wide.clip(0) * high.clip(0)).sum())

    shifts: dict[int, tuple[float, float, bool]] = {}
    for index in sorted(texts, key=lambda index: -places[index][1]):
        x, y = places[index]
        half_width, half_height = 2.3 * len(texts[index]), 4.0
        others = numpy.delete(points, index, axis=0)
        best, box_of_best, least = (0.0, 0.0, False), room, math.inf
        for ring in range(14):
            for step in range(16):
                angle = math.tau * step / 16
                dx = (half_width + 5 + 6 * ring) * math.cos(angle)
                dy = (half_height + 5 + 4 * ring) * math.sin(angle)
                box = _Box.around(x + dx, y + dy, half_width, half_height)
                penalty = 4 * (4 * half_width * half_height - box.shared(room)) + 3 * ring
                if penalty >= least - 0.01:
                    continue
                penalty += 2 * shared(box, taken) + shared(box, barriers) / 3
                if ring == 0:  # without a line to its point, it must be the nearest
                    own = 1.2 * math.hypot(dx, dy)
                    away = numpy.hypot(others[:, 0] - x - dx, others[:, 1] - y - dy)
                    penalty += 40 * bool((away < own).any())
                if penalty < least - 0.01:
                    best, box_of_best, least = (dx, dy, ring > 0), box, penalty
        shifts[index] = best
        taken = numpy.vstack([taken, box_of_best])
    return shifts
