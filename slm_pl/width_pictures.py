"""How wide a plan leaves every layer, as a PNG file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from slm_pl.compression.architecture import Group
from slm_pl.compression.plan import JSONValue, KeepChannels, KeepHidden, Plan
from slm_pl.drawing import COLOURS, is_number, new_figure, plain, plain_text, set_title, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEPT, _REMOVED, _BEFORE = COLOURS[0], COLOURS[5], "#DADADA"
_PANELS: dict[Group, tuple[str, str]] = {"attention": ("attention", "KV groups"), "mlp": ("MLP", "channels")}
_MOST_LAYERS = 1000  # of a plan that may come from a stranger's file
_MOST_UNITS = 10_000_000
_STEPS = (1, 2, 5, 10)  # of the ticks


@dataclass(frozen=True)
class _Width:
    """How much stays of one structure.

    Attributes:
        kept: How many units.
        units: How many there were; None if the trace does not tell.
        indices: Which stay; None if no step tells.
        scores: The importance of each unit, None where it has none; empty without scores.
    """

    kept: int
    units: int | None
    indices: frozenset[int] | None
    scores: tuple[float | None, ...]

    @property
    def narrower(self) -> bool:
        return self.indices is not None if self.units is None else self.kept < self.units

    def scored(self) -> tuple[list[float], list[float]]:
        """The scores of the units that stay, and of those that go."""
        kept = self.indices or frozenset()
        sides: tuple[list[float], list[float]] = ([], [])
        for unit, score in enumerate(self.scores):
            if score is not None:
                sides[unit not in kept].append(score)
        return sides


def layer_widths(plan: Plan) -> bytes | None:
    """Draws how many units of attention and of the MLP every layer keeps, beside how many there were.

    Where the trace holds scores of MLP channels, a panel below shows them by layer; of a plan that makes the hidden
    state narrower, the scores of its channels are drawn.

    Returns:
        A PNG, or None if the plan makes nothing narrower and its trace does not tell of widths.
    """
    groups = {group: widths for group in _PANELS if (widths := _layers(plan, group))}
    hidden = _hidden(plan)
    if not groups and hidden is None:
        return None
    scored = {layer: width for layer, width in groups.get("mlp", {}).items() if any(width.scored())}
    heights = [1.7 if group == "attention" else 2.1 for group in groups]
    heights += ([2.4] if scored else []) + ([] if hidden is None else [3.0 if any(hidden.scored()) else 0.9])
    layers = sorted({layer for widths in groups.values() for layer in widths})
    end = layers[-1] + 1 if layers else 0
    if end < plan.base.num_layers <= _MOST_LAYERS:
        end = plan.base.num_layers  # layers without a bar are shown as well, so that the place of the others is seen
    with plain_text():
        figure = new_figure(max(6.5, min(14.0, 2.0 + 0.2 * end)) if groups else 6.5, sum(heights) + 0.9)
        panels: list[Axes] = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0].tolist()
        rows = panels[: len(groups) + bool(scored)]
        for axes, (group, widths) in zip(rows, groups.items(), strict=False):
            _draw_widths(axes, group, widths)
        if groups:
            # One legend for both panels: what only the lower one has counts as well.
            found = [axes.get_legend_handles_labels() for axes in rows[: len(groups)]]
            legend = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
            _legend(rows[0], legend)
        if scored:
            _draw_scores(rows[-1], scored)
        for axes in rows:
            _number_layers(axes, end, axes is rows[-1], len(layers) < end)
        if hidden is not None:
            _draw_hidden(panels[-1], hidden)
        figure.align_ylabels(panels)
        set_title(figure, _heading(plan, groups, hidden))
        return to_png(figure)


def _layers(plan: Plan, group: Group) -> dict[int, _Width]:
    """By layer, the width of this group, from the trace and, above all, from the steps."""
    rows: dict[int, tuple[int, int, tuple[float | None, ...]]] = {}
    for row in plan.trace:
        layer, width = row.get("layer"), _width_of(row)
        if row.get("group") == group and type(layer) is int and 0 <= layer < 10_000 and width is not None:
            rows[layer] = width
    steps = {
        step.layer: frozenset(step.indices)
        for step in plan.steps
        if isinstance(step, KeepChannels) and step.group == group and 0 <= step.layer < 10_000
    }
    layers = sorted(rows.keys() | steps.keys())[:_MOST_LAYERS]
    return {layer: _joined(rows.get(layer), steps.get(layer)) for layer in layers}


def _hidden(plan: Plan) -> _Width | None:
    rows = [width for row in plan.trace if row.get("group") == "hidden" and (width := _width_of(row)) is not None]
    steps = [frozenset(step.indices) for step in plan.steps if isinstance(step, KeepHidden)]
    if not rows and not steps:
        return None
    return _joined(rows[-1] if rows else None, steps[-1] if steps else None)


def _width_of(row: dict[str, JSONValue]) -> tuple[int, int, tuple[float | None, ...]] | None:
    """Units, those kept, and scores of a row of a trace, which may come from a stranger's file; None if it has none."""
    units, kept, scores = row.get("units"), row.get("kept"), row.get("scores")
    if type(units) is not int or type(kept) is not int or not 0 <= kept <= units < _MOST_UNITS:
        return None
    if not isinstance(scores, list | tuple) or len(scores) != units:
        return units, kept, ()
    return units, kept, tuple(float(cast(float, score)) if is_number(score) else None for score in scores)


def _joined(row: tuple[int, int, tuple[float | None, ...]] | None, indices: frozenset[int] | None) -> _Width:
    """A width from a row of the trace and from a step; the step is what is carried out."""
    if indices is None:
        units, kept, scores = cast(tuple[int, int, tuple[float | None, ...]], row)
        return _Width(kept, units, frozenset(range(units)) if kept == units else None, scores)
    if row is None or not all(0 <= index < row[0] for index in indices):
        return _Width(len(indices), None, indices, ())
    return _Width(len(indices), row[0], indices, row[2])


def _heading(plan: Plan, groups: dict[Group, dict[int, _Width]], hidden: _Width | None) -> str:
    parts = []
    if groups:
        narrower = {layer for widths in groups.values() for layer, width in widths.items() if width.narrower}
        parts.append(f"{len(narrower)} of {plan.base.num_layers} layers narrower")
    if hidden is not None:
        before = "" if hidden.units is None else f"{hidden.units:,} → "
        parts.append(f"hidden state {before}{hidden.kept:,} channels")
    return f"{plan.method.class_path.rpartition('.')[2]}: {', '.join(parts)}"


def _share(kept: int, total: int | None, units: str = "channels") -> str:
    before = "" if total is None else f" of {total:,}"
    share = f" ({kept / total:.1%})" if total else ""
    return f"{kept:,}{before} {units} kept{share}"


def _label(axes: "Axes", text: str) -> None:
    axes.set_title(text, fontsize=9, loc="left", color="#333333")


def _legend(axes: "Axes", handles: dict[str, Any] | None = None) -> None:
    handles = handles or {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    axes.legend(
        handles.values(),
        handles.keys(),
        fontsize=8,
        frameon=False,
        ncols=4,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _draw_widths(axes: "Axes", group: Group, widths: dict[int, _Width]) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    name, units = _PANELS[group]
    kept = sum(width.kept for width in widths.values())
    counts = [width.units for width in widths.values() if width.units is not None]
    total = sum(counts) if len(counts) == len(widths) else None
    _label(axes, f"{name}: {_share(kept, total, units)}")
    known = {layer: width.units for layer, width in widths.items() if width.units}
    if known:
        axes.bar(list(known), list(known.values()), color=_BEFORE, width=0.8, label="removed")
    axes.bar(list(widths), [width.kept for width in widths.values()], color=_KEPT, width=0.8, label="kept")
    empty = [layer for layer, width in widths.items() if width.kept == 0 and width.units != 0]
    if empty:
        where = axes.get_xaxis_transform()
        places = [0.07] * len(empty)
        axes.scatter(
            empty, places, marker="x", s=22, color=_REMOVED, linewidths=1.6, transform=where, zorder=3, label="emptied"
        )
    highest = max(max(width.kept, width.units or 0) for width in widths.values())
    axes.set_ylim(0, 1.03 * highest or 1)
    axes.set_ylabel(units, fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_STEPS, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    plain(axes)


def _draw_scores(axes: "Axes", widths: dict[int, _Width]) -> None:
    import numpy

    sides = {layer: width.scored() for layer, width in widths.items()}
    low, high = zip(*(numpy.quantile(kept + gone, (0.05, 0.95)) for kept, gone in sides.values()), strict=True)
    axes.bar(list(sides), numpy.subtract(high, low), bottom=low, color=_BEFORE, width=0.8, label="5–95% of all")
    drawn = [*low, *high]
    told = {layer: scores for layer, scores in sides.items() if widths[layer].indices is not None}
    for side, (name, marker, colour) in enumerate((("kept", "o", _KEPT), ("removed", "X", _REMOVED))):
        medians = {layer: float(numpy.median(scores[side])) for layer, scores in told.items() if scores[side]}
        if medians:
            style: dict[str, Any] = {"marker": marker, "color": colour, "s": 16, "linewidths": 0, "zorder": 3}
            axes.scatter(list(medians), list(medians.values()), label=f"median {name}", **style)
            drawn += medians.values()
    _label(axes, "MLP: scores of the channels")
    axes.set_ylabel("score", fontsize=9)
    _scale(axes, drawn)
    plain(axes)
    _legend(axes)


def _scale(axes: "Axes", drawn: Sequence[float]) -> None:
    """Makes an axis of scores logarithmic if they can be shown so and are not close to each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    lowest, highest = min(drawn), max(drawn)
    if lowest > 1e-100 and 3 * lowest < highest < 1e100:
        axes.set_yscale("log")
        room = (highest / lowest) ** 0.06
        axes.set_ylim(lowest / room, highest * room)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest < 50 * lowest else (1,)))
        # The usual labels, of powers, are formulas.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.06 * (highest - lowest) or 0.06 * abs(highest) or 1.0
        axes.set_ylim(lowest - room, highest + room)


def _number_layers(axes: "Axes", end: int, last: bool, gaps: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.7, end - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, steps=_STEPS, integer=True, min_n_ticks=1))
    axes.tick_params(labelbottom=last)
    if last:
        axes.set_xlabel("decoder layer" + (" (without a bar: not in the plan)" if gaps else ""), fontsize=9)


def _draw_hidden(axes: "Axes", hidden: _Width) -> None:
    """The sorted importances of the hidden state's channels, or a bar if there are none."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    if hidden.indices is not None and any(hidden.scored()):
        kept, gone = hidden.scored()
        ranked = sorted([(score, True) for score in kept] + [(score, False) for score in gone], reverse=True)
        for stays, name, colour in ((True, "kept", _KEPT), (False, "removed", _REMOVED)):
            points = [(rank, score) for rank, (score, fate) in enumerate(ranked, 1) if fate is stays]
            if points:
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, color=colour, s=7, linewidths=0, label=name)
        _scale(axes, [score for score, _ in ranked])
        axes.set_ylabel("score", fontsize=9)
        axes.set_xlabel("channel of the hidden state, by importance", fontsize=9)
    else:
        if hidden.units:
            axes.barh([0], [hidden.units], color=_BEFORE, height=0.6, label="removed")
        axes.barh([0], [hidden.kept], color=_KEPT, height=0.6, label="kept")
        axes.set_yticks([])
        axes.set_ylim(-0.45, 0.45)
        axes.set_xlabel("channels of the hidden state", fontsize=9)
    _label(axes, f"hidden state: {_share(hidden.kept, hidden.units)}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=_STEPS, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    plain(axes)
    _legend(axes)
