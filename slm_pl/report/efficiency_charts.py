"""Speed over the batch size, what latency consists of, and what fills the memory."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from slm_pl.drawing import COLOURS, GREY, new_figure, plain, plain_text, shortened, to_png, wrapped
from slm_pl.evaluation.efficiency.record import EfficiencyResult, Memory
from slm_pl.report.figures import number_text
from slm_pl.report.protocols import frozen, generation_protocol, setting_text, tokens_text

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#222222"
_MARKERS = "osDvP"
_LINES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
_MOST_LINES = 6  # of several settings
_ROW = 0.42  # inches
_ROUND = 1.75  # inches above and below the rows, the legend among them
_PARTS: tuple[tuple[str, str, Callable[[Memory], int | None]], ...] = (
    ("weights", "#0072B2", lambda memory: memory.weights),
    ("key/value cache", "#D55E00", lambda memory: memory.kv_cache),
    ("activations", "#F0E442", lambda memory: memory.activations),
    ("other", "#BBBBBB", lambda memory: memory.other),
)


@dataclass(frozen=True, eq=False)
class _Model:
    """A model with its grid; later measurements of a point take the place of earlier ones."""

    index: int
    label: str
    points: dict[str, EfficiencyResult]

    @property
    def colour(self) -> str:
        return COLOURS[self.index % len(COLOURS)]

    @property
    def marker(self) -> str:
        return _MARKERS[self.index // len(COLOURS) % len(_MARKERS)]

    def series(self, key: str) -> list[EfficiencyResult]:
        """The points that differ in their batch size only, in its order."""
        return sorted((one for one in self.points.values() if _series(one) == key), key=lambda one: one.batch_size)


def efficiency_plot(models: Sequence[tuple[str, Sequence[EfficiencyResult]]]) -> bytes | None:
    """A PNG of throughput over the batch size, of the parts of latency, and of the parts of memory.

    Args:
        models: Labels and grids.

    Returns:
        None if there is nothing to draw.
    """
    with plain_text():
        figure = efficiency_figure(models)
        return None if figure is None else to_png(figure)


def efficiency_figure(models: Sequence[tuple[str, Sequence[EfficiencyResult]]]) -> "Figure | None":
    """As :func:`efficiency_plot`, still to be drawn; panels without data are left out."""
    measured = [
        _Model(index, shortened(label, 60), {_key(one): one for one in grid})
        for index, (label, grid) in enumerate((label, grid) for label, grid in models if grid)
    ]
    curves, timed, filled = _curves(measured), _timed_point(measured), _filled_point(measured)
    panels: list[Callable[[Axes], None]] = []
    if curves:
        panels.append(functools.partial(_draw_throughput, models=measured, curves=curves))
    bars = [(draw, point) for draw, point in ((_draw_latency, timed), (_draw_memory, filled)) if point is not None]
    for number, (draw, point) in enumerate(bars):
        panels.append(functools.partial(draw, models=measured, point=point, named=number == 0))
    if not panels:
        return None
    height = _ROUND + _ROW * max(2, len(measured))
    names = bool(curves) and len(measured) > 1
    figure = new_figure(4.9 * len(panels), max(height, 3.8 if curves else 0.0) + 0.3 * names)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    for axes, draw_panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes)
    if names:
        _add_names(figure, measured)
    return figure


def _key(one: EfficiencyResult) -> str:
    return frozen(generation_protocol(one))


def _number(value: float | None) -> float | None:
    """A value that can be drawn: a record may come from a stranger."""
    return value if value is not None and 0 < value < 1e300 else None


def _latency(one: EfficiencyResult | None) -> float | None:
    return None if one is None or one.latency_s is None else _number(one.latency_s.median)


def _rate(one: EfficiencyResult) -> float | None:
    return None if one.output_tokens_per_s is None else _number(one.output_tokens_per_s.median)


def _series(one: EfficiencyResult) -> str:
    return frozen({**generation_protocol(one), "batch_size": None})


# ----------------------------------------------------------------------------------------------------- throughput


def _curves(models: list[_Model]) -> list[str]:
    """The settings to draw over the batch size: all if they are few, else the one of the most batch sizes."""
    keys = dict.fromkeys(_series(one) for model in models for one in model.points.values() if one.new_tokens)

    def sizes(key: str) -> int:
        return max(len(model.series(key)) for model in models)

    def drawn(key: str) -> bool:
        return sizes(key) > 1 and any(_rate(one) for model in models for one in model.series(key))

    found = [key for key in keys if drawn(key)]
    if len(found) * len(models) <= _MOST_LINES:
        return found[: len(_LINES)]
    return [max(found, key=lambda key: (sizes(key), sum(bool(model.series(key)) for model in models)))]


def _draw_throughput(axes: "Axes", models: list[_Model], curves: list[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    grids = [(model, line, model.series(key)) for key, line in zip(curves, _LINES, strict=False) for model in models]
    rates: list[float] = []
    for model, line, grid in grids:
        there = [(one.batch_size, rate) for one in grid if (rate := _rate(one))]
        axes.plot(
            [size for size, _ in there],
            [rate for _, rate in there],
            line,
            color=model.colour,
            marker=model.marker,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            linewidth=1.4,
            label=model.label,
        )
        rates += [rate for _, rate in there]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({one.batch_size for _, _, grid in grids for one in grid})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    lost = [(model, one.batch_size) for model, _, grid in grids for one in grid if one.latency_s is None]
    fine = max(rates) < 30 * min(rates)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if fine else (1.0,)))
    _mark_lost(axes, list(dict.fromkeys(lost)), rates)
    axes.grid(color="#EEEEEE", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("batch size", fontsize=9)
    shown = {_series(one): tokens_text(one) for _, _, grid in grids for one in grid}
    several = len(shown) > 1
    if several:
        handles = [
            Line2D([], [], color=GREY, linestyle=line, label=shown[key])
            for key, line in zip(curves, _LINES, strict=False)
        ]
        axes.legend(handles=handles, fontsize=8, frameon=False, loc="upper left")
    every = {_series(one) for model in models for one in model.points.values() if one.new_tokens}
    left_out = len(every) > len(shown)
    setting = "" if several else next(iter(shown.values()))
    note = "of all settings, that of the most batch sizes" if left_out and not several else ""
    _entitle(axes, "Output tokens/s", "; ".join(text for text in (setting, note) if text) or "log scales")
    plain(axes)


def _mark_lost(axes: "Axes", lost: list[tuple[_Model, int]], rates: list[float]) -> None:
    """Crosses at the foot, one above the other, where the memory did not suffice."""
    low, high = min(rates), max(rates)
    decades = max(math.log10(high / low), 0.3)
    most = max((sum(size == other for _, other in lost) for _, size in lost), default=0)
    step = decades * min(0.06, 0.3 / max(most, 1))
    foot = math.log10(low) - (0.04 * decades + step * (most + 0.5) if most else 0.06 * decades)
    axes.set_ylim(10**foot, 10 ** (math.log10(high) + 0.08 * decades))
    seen: dict[int, int] = {}
    for model, size in lost:
        seen[size] = seen.get(size, 0) + 1
        height = 10 ** (foot + step * (seen[size] - 0.3))
        axes.plot(size, height, "x", color=model.colour, markersize=6, markeredgewidth=1.8)
    if lost:
        first = min(size for _, size in lost)
        axes.annotate(
            "out of memory",
            (first, 10 ** (foot + 0.7 * step)),
            xytext=(-7, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8,
            color=GREY,
        )


def _add_names(figure: "Figure", models: list[_Model]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=model.colour, marker=model.marker, markersize=5, label=shortened(model.label, 40))
        for model in models
    ]
    widest = max(len(str(handle.get_label())) for handle in handles)
    in_line = max(1, int(figure.get_figwidth() / (0.55 + 0.075 * widest)))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(in_line, len(handles)), fontsize=8, frameon=False
    )


# -------------------------------------------------------------------------------------------------------- latency


def _timed_point(models: list[_Model]) -> EfficiencyResult | None:
    """The point that most models were timed at; of equals the smallest batch, and the most new tokens of these."""
    points = {key: one for model in models for key, one in model.points.items() if _latency(one)}

    def rank(key: str) -> tuple[int, int, int]:
        have = sum(_latency(model.points.get(key)) is not None for model in models)
        return -have, points[key].batch_size, -points[key].new_tokens

    return points[min(points, key=rank)] if points else None


def _draw_latency(axes: "Axes", models: list[_Model], point: EfficiencyResult, named: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    longest = max(seconds for model in models if (seconds := _latency(model.points.get(_key(point)))))
    scale, unit = (1.0, "seconds") if longest >= 1 else (0.001, "milliseconds")
    ends, whiskers, limits = [], False, False
    for row, model in enumerate(models):
        one = model.points.get(_key(point))
        seconds = _latency(one)
        if one is None or one.latency_s is None or seconds is None:
            _say(axes, row, "out of memory" if one is not None and one.latency_s is None else "not measured")
            continue
        total, prefill = seconds / scale, seconds / scale
        if one.new_tokens:
            prefill = 0.0
            if one.time_to_first_token_s is not None:
                prefill = min(_number(one.time_to_first_token_s.median) or 0.0, seconds) / scale
        axes.barh(row, prefill, height=0.6, color=model.colour)
        axes.barh(row, total - prefill, left=prefill, height=0.6, color=_tint(model.colour))
        end = total
        if late := _number(one.latency_s.p95):
            whiskers, end = True, max(total, late / scale)
            axes.errorbar(total, row, xerr=[[0.0], [end - total]], ecolor=GREY, elinewidth=1, capsize=3, fmt="none")
        if one.limit is not None and (least := _number(one.limit.latency_s)):
            limits, least = True, least / scale
            axes.plot([least, least], [row - 0.38, row + 0.38], color=_INK, linewidth=1.6, solid_capstyle="butt")
            end = max(end, least)
        rate = "" if _rate(one) is None else f"  {_rate(one):,.1f} tokens/s"
        _value(axes, row, end, number_text(seconds, "seconds") + rate)
        ends.append(end)
    handles: list[Line2D | Patch] = []
    if point.new_tokens:
        handles = [Patch(color="#777777", label="prefill"), Patch(color=_tint("#777777"), label="decode")]
    if limits:
        handles.append(Line2D([], [], color=_INK, linewidth=1.6, label="least time for this work on this machine"))
    if whiskers:
        handles.append(Line2D([], [], color=GREY, linewidth=1, marker="|", label="to the 95th percentile"))
    _frame(axes, models, named, 1.65 * max(ends), handles)
    axes.set_xlabel(unit, fontsize=9)
    _entitle(axes, "Latency" if point.new_tokens else "Latency of the prefill", f"{setting_text(point)}, median")


# --------------------------------------------------------------------------------------------------------- memory


def _filled_point(models: list[_Model]) -> EfficiencyResult | None:
    """The point at which all models, or most, have a breakdown; of equals the one that fills the most."""
    points: dict[str, list[EfficiencyResult]] = {}
    for model in models:
        for key, one in model.points.items():
            if one.memory is not None:
                points.setdefault(key, []).append(one)
    if not points:
        return None
    return max(points.values(), key=lambda have: (len(have), max(map(_total, have))))[0]


def _total(one: EfficiencyResult) -> int:
    parts = [] if one.memory is None else [part for _, _, of in _PARTS if (part := of(one.memory)) is not None]
    return sum(parts)


def _draw_memory(axes: "Axes", models: list[_Model], point: EfficiencyResult, named: bool) -> None:
    from matplotlib.patches import Patch

    found = {model.index: one for model in models if (one := model.points.get(_key(point))) and one.memory}
    most = max(map(_total, found.values()))
    scale, unit = (2**30, "GiB") if most >= 10 * 2**30 else (2**20, "MiB")
    shown: dict[str, str] = {}
    for row, model in enumerate(models):
        one = found.get(model.index)
        if one is None or one.memory is None:
            there = model.points.get(_key(point))
            absent = "not measured" if there is None else "not broken down"
            _say(axes, row, "out of memory" if there is not None and there.latency_s is None else absent)
            continue
        left = 0.0
        for name, colour, of in _PARTS:
            part = of(one.memory)
            if part is not None:
                axes.barh(row, part / scale, left=left, height=0.6, color=colour)
                left += part / scale
                shown.setdefault(name, colour)
        _value(axes, row, left, number_text(_total(one), "bytes"))
    # In the order of the bars, whichever model had a part first.
    handles = [
        Patch(color=colour, label=_other(list(found.values())) if name == "other" else name)
        for name, colour, _ in _PARTS
        if name in shown
    ]
    _frame(axes, models, named, 1.3 * most / scale, handles)
    axes.set_xlabel(unit, fontsize=9)
    _entitle(axes, "Memory at its peak", setting_text(point))


def _other(found: list[EfficiencyResult]) -> str:
    """What the rest is: libraries and the interpreter on a CPU, workspaces on a GPU."""
    kinds = {"cuda" in one.peak_memory_bytes.source for one in found if one.peak_memory_bytes is not None}
    if len(kinds) != 1:
        return "other"
    return "other: workspaces" if kinds == {True} else "other: libraries and the interpreter"


# ----------------------------------------------------------------------------------------------------------- bars


def _frame(axes: "Axes", models: list[_Model], named: bool, end: float, handles: "Sequence[Artist]") -> None:
    """Axis, names and, below the bars, the legend."""
    # A few bars in a high picture are neither walls nor lost at its top.
    rows = max(len(models), min(3.0, (cast("Figure", axes.figure).get_figheight() - _ROUND) / _ROW))
    axes.set_xlim(0, end or 1.0)
    axes.set_ylim(rows + 0.55, -0.6)
    labels = [wrapped(model.label, 20) for model in models] if named else [""] * len(models)
    axes.set_yticks(range(len(models)), labels)
    axes.legend(
        handles=handles,
        fontsize=8,
        frameon=False,
        loc="lower left",
        ncols=1 if len(handles) < 3 else 2,
        borderaxespad=0.2,
    )
    plain(axes)
    axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=_INK)


def _value(axes: "Axes", row: int, end: float, text: str) -> None:
    axes.annotate(text, (end, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)


def _say(axes: "Axes", row: int, text: str) -> None:
    axes.annotate(
        f"– {text}",
        (0, row),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=GREY,
        fontsize=8,
    )


def _entitle(axes: "Axes", title: str, setting: str) -> None:
    """The title, and below it what was set."""
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold", pad=18)
    axes.annotate(
        shortened(setting, 66),
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 6),
        textcoords="offset points",
        fontsize=8,
        color=GREY,
    )


def _tint(colour: str) -> tuple[float, float, float]:
    """The colour, half of it white."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return (0.45 + 0.55 * red, 0.45 + 0.55 * green, 0.45 + 0.55 * blue)
