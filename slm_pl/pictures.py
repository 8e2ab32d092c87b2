"""What a search saw, as PNG files."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from slm_pl.compression.plan import DropLayers, JSONValue, MergeLayers, Plan
from slm_pl.drawing import COLOURS, GREY, is_number, new_figure, plain, plain_text, set_title, shortened, to_png
from slm_pl.width_pictures import layer_widths

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACCEPTED, _MERGED, _REJECTED = COLOURS[0], COLOURS[2], COLOURS[5]

MATRIX = "representation_similarity"
"""Name of the similarity matrix of a tested model's layers, as ``.json`` and ``.png``."""
_LARGEST = 8 * 2**20  # bytes of a figure that is carried on
_MOST_LAYERS = 1000
_MOST_SCORES = 50_000  # of a trace that may come from a stranger's file; all phases of 300 layers are fewer
_MOST_TRIES = 2000  # of the same; a search tries about as many windows as there are layers


TRACE, IMPORTANCE, WIDTHS = "search_trace", "block_importance", "layer_widths"
"""Names of the picture of a plan: of a search over windows, of the scores of single layers, or of their widths."""


def trace_names(number: int) -> tuple[str, str, str]:
    """File names that the picture of a model's first, second, … plan may have."""
    end = ".png" if number == 1 else f".{number}.png"
    return TRACE + end, IMPORTANCE + end, WIDTHS + end


def trace_pictures(plan: Plan, number: int) -> dict[str, bytes]:
    """Draws what a plan's trace holds, and how wide it leaves the layers.

    Returns:
        A PNG by its file name as the picture of the model's plan of this number; nothing for an empty trace of a plan
        that makes no layer narrower.
    """
    pictures = (search_trace(plan), block_importance(plan), layer_widths(plan))
    drawn = zip(trace_names(number), pictures, strict=True)
    return {name: picture for name, picture in drawn if picture is not None}


def matrix_names(number: int) -> tuple[str, str]:
    """File names of the similarity matrix before the first, second, … plan was carried out."""
    stem = f"{MATRIX}_before" if number == 1 else f"{MATRIX}_before.{number}"
    return f"{stem}.json", f"{stem}.png"


def load_figures(directory: Path, plans: int) -> dict[str, bytes]:
    """The similarity matrices that an export carries, by file name, so that another export made from it keeps them.

    Only what looks like a figure of one of its plans: a stranger's directory may hold anything.

    Args:
        directory: The export.
        plans: How many plans it carries.
    """
    found: dict[str, bytes] = {}
    for number in range(1, plans + 1):
        for name in matrix_names(number):
            path = directory / name
            if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST:
                continue
            content = path.read_bytes()
            if content.startswith(b"\x89PNG\r\n" if name.endswith(".png") else b"{"):
                found[name] = content
    return found


def search_trace(plan: Plan) -> bytes | None:
    """Draws a search over windows: every try, its similarity and the layers it would have merged.

    Above, the similarity over the tries with the threshold; below, the layers of each try's window. Of several searches
    (``remove_layers``), the one that decided is drawn.

    Returns:
        A PNG, or None if the plan's trace is not one of windows.
    """
    tries = [t for t in plan.trace if _is_try(t) and t.get("search", 0) == plan.outcome.get("search", 0)]
    if not tries:
        return None
    tried = "1 try" if len(tries) == 1 else f"{len(tries):,} tries"
    if len(tries) > _MOST_TRIES:
        tries, tried = tries[:_MOST_TRIES], f"the first {_MOST_TRIES:,} of {tried}"
    numbers = list(range(1, len(tries) + 1))
    windows = [(s.low, s.high) for s in plan.steps if isinstance(s, MergeLayers)]
    with plain_text():
        figure = new_figure(max(6.5, min(14.0, 2.5 + 0.24 * len(tries))), 6.2)
        above, below = figure.subplots(2, 1, sharex=True)
        _draw_similarities(above, numbers, tries, plan.outcome.get("threshold"))
        above.set_ylabel(f"{plan.method.init_args.get('similarity', 'similarity')} to the dense model", fontsize=9)
        _draw_windows(below, numbers, tries, windows, plan.base.num_layers)
        left = plan.base.num_layers - sum(high - low for low, high in windows)
        searches = plan.outcome.get("searches")
        count = len(searches) if isinstance(searches, list) else 1
        decided = f", the search of {count} that decided" if count > 1 else ""
        cut = ", last window cut to fit" if plan.outcome.get("cut_to_fit") else ""
        set_title(figure, f"{plan.base.num_layers} → {left} layers: {tried}{decided}{cut}")
        return to_png(figure)


def _is_try(row: dict[str, JSONValue]) -> bool:
    """Whether a row of a trace, which may come from a stranger's file, is a window that was tried."""
    low, high, similarity = row.get("low"), row.get("high"), row.get("similarity")
    return (
        type(low) is int
        and type(high) is int
        and 0 <= low <= high < 10_000
        and isinstance(similarity, float | int)
        and abs(similarity) <= 1
        and isinstance(row.get("accepted"), bool)
    )


def _draw_similarities(
    axes: "Axes", numbers: list[int], tries: list[dict[str, JSONValue]], threshold: JSONValue
) -> None:
    values = [cast(float, t["similarity"]) for t in tries]
    axes.plot(numbers, values, color="#BBBBBB", linewidth=1, zorder=1)
    for accepted, marker, colour in ((True, "o", _ACCEPTED), (False, "X", _REJECTED)):
        points = [(n, v) for n, v, t in zip(numbers, values, tries, strict=True) if t["accepted"] is accepted]
        if points:
            label = "accepted" if accepted else "rejected"
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, color=colour, marker=marker, s=42, zorder=3, label=label, linewidths=0)
    lowest, highest = min(values), max(values)
    if isinstance(threshold, float | int) and abs(threshold) <= 2:
        # One that is far below all values would press them into a line at the top.
        inside = threshold > lowest - max(0.15, highest - lowest)
        label = f"threshold {threshold:.4g}" + ("" if inside else " (below)")
        axes.plot([], [], color=GREY, linestyle="--", linewidth=1.2, label=label)
        if inside:
            axes.axhline(threshold, color=GREY, linestyle="--", linewidth=1.2, zorder=2)
            lowest, highest = min(lowest, threshold), max(highest, threshold)
    room = max(0.005, 0.07 * (highest - lowest))
    axes.set_ylim(lowest - 2.5 * room, highest + room)  # the legend is below
    axes.legend(fontsize=8, frameon=False, loc="lower left", ncols=3)
    plain(axes)


def _draw_windows(
    axes: "Axes",
    numbers: list[int],
    tries: list[dict[str, JSONValue]],
    windows: list[tuple[int, int]],
    num_layers: int,
) -> None:
    from matplotlib.ticker import MaxNLocator

    edges = [(cast(int, t["low"]) - 0.5, cast(int, t["high"]) + 0.5) for t in tries]
    colours = [_ACCEPTED if t["accepted"] else _REJECTED for t in tries]
    heights = [top - bottom for bottom, top in edges]
    axes.bar(numbers, heights, bottom=[bottom for bottom, _ in edges], color=colours, width=0.75)
    labelled = float("inf")
    for low, high in sorted(windows, reverse=True):
        axes.axhspan(low - 0.42, high + 0.42, color=_MERGED, alpha=0.18, linewidth=0, zorder=0)
        centre = (low + high) / 2
        if labelled - centre < num_layers / 22:
            continue  # it would lie on the one above
        labelled = centre
        axes.annotate(
            f"merged {low}–{high}",
            (1, centre),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_MERGED,
        )
    axes.set_ylabel("decoder layers of the window", fontsize=9)
    axes.set_xlabel("try", fontsize=9)
    axes.set_ylim(-0.7, num_layers - 0.3)
    axes.set_xlim(0.3, len(tries) + 0.7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    plain(axes)


@dataclass(frozen=True)
class _Score:
    """One candidate of one phase."""

    phase: int
    layer: int
    value: float
    removed: bool
    protected: bool
    last: int


def _score_of(row: dict[str, JSONValue]) -> _Score | None:
    """A row of a trace, which may come from a stranger's file; None if it is not the score of a layer."""
    phase, layer, value = row.get("phase", 0), row.get("layer"), row.get("score")
    last = row.get("high", layer)
    if type(phase) is not int or type(layer) is not int or type(last) is not int:
        return None
    if not (0 <= phase < _MOST_LAYERS and 0 <= layer <= last < _MOST_LAYERS):
        return None
    if not is_number(value):
        return None
    return _Score(
        phase, layer, float(cast(float, value)), row.get("removed") is True, row.get("protected") is True, last
    )


def block_importance(plan: Plan) -> bytes | None:
    """Draws the score of every candidate layer as bars: the less, the less the model misses it.

    Where layers went one after another, the bars are of the first phase, the numbers on them say in which order layers
    went, and a map below shows every candidate's score in every phase. Of layers that were merged, the bars are of
    every two neighbours, and the map shows how far the window reaches that each phase made.

    Returns:
        A PNG, or None if the plan's trace does not hold scores of layers.
    """
    scores = _best_of_each([score for score in map(_score_of, plan.trace[:_MOST_SCORES]) if score is not None])
    if not scores:
        return None
    start = min(score.phase for score in scores)
    first = list({score.layer: score for score in scores if score.phase == start}.values())
    later = [score for score in scores if score.phase != start]
    dense = plan.outcome.get("dense_score")
    base, cap = _bar_range([score.value for score in first], cast(float, dense) if is_number(dense) else None)
    dropped = [layer for step in plan.steps if isinstance(step, DropLayers) for layer in step.layers]
    windows = [(step.low, step.high) for step in plan.steps if isinstance(step, MergeLayers)]
    with plain_text():
        width = max(6.5, min(14.0, 2.0 + 0.26 * len(first)))
        figure = new_figure(width, 5.6 if later else 3.8)
        if later:
            above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
            _draw_phases(below, scores)
        else:
            above = below = figure.subplots()
        order = {score.layer: score.phase - start + 1 for score in reversed(scores) if score.removed}
        _draw_bars(above, first, dropped, windows, order if later and not windows else {}, base, cap)
        if is_number(dense):
            above.axhline(base, color=GREY, linewidth=1, label=f"dense {base:.4g}")
        what = shortened(str(plan.outcome.get("score", "score")), 60)
        if base and not is_number(dense):
            what += " (axis does not begin at 0)"
        above.set_ylabel(textwrap.fill(what, 34), fontsize=9)
        above.legend(fontsize=8, frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        runs = any(score.last != score.layer for score in first)
        length = first[0].last - first[0].layer + 1
        if windows:
            below.set_xlabel("lowest decoder layer of the window", fontsize=9)
        else:
            below.set_xlabel(f"first of {length} decoder layers" if runs else "decoder layer", fontsize=9)
        name = plan.method.class_path.rpartition(".")[2]
        arguments = plan.method.init_args
        how = next((arguments[key] for key in ("criterion", "distance", "similarity") if key in arguments), "")
        merged = sum(high - low for low, high in windows)
        left = plan.base.num_layers - len(dropped) - merged
        set_title(figure, f"{name}{f' ({how})' if how else ''}: {plan.base.num_layers} → {left} layers")
        return to_png(figure)


def _best_of_each(scores: list[_Score]) -> list[_Score]:
    """One for each layer of each phase: the one that was taken, else the least, where there are two ways to merge."""
    best: dict[tuple[int, int], _Score] = {}
    for score in scores:
        known = best.get((score.phase, score.layer))
        if known is None or (not score.removed, score.value) < (not known.removed, known.value):
            best[score.phase, score.layer] = score
    return list(best.values())


def _bar_range(values: list[float], dense: float | None) -> tuple[float, float]:
    """Where bars begin, and where those that are far longer than most are cut off."""
    lowest, highest = min(values), max(values)
    base = 0.0 if dense is None else dense
    if dense is None and 0 < lowest < highest < 1.5 * lowest:
        base = lowest - 0.25 * (highest - lowest)  # they differ by less than could be seen from 0
    usual = sorted(value - base for value in values)[int(0.75 * (len(values) - 1))]
    cap = highest if usual <= 0 or highest - base < 3 * usual else base + 1.6 * usual
    return base, max(base, cap)


def _draw_bars(
    axes: "Axes",
    scores: list[_Score],
    dropped: list[int],
    windows: list[tuple[int, int]],
    order: dict[int, int],
    base: float,
    cap: float,
) -> None:
    from matplotlib.ticker import MaxNLocator

    runs = any(score.last != score.layer for score in scores)

    def kind(score: _Score) -> str:
        if windows:
            inside = any(low <= score.layer and score.last <= high for low, high in windows)
            return "merged in the end" if inside else "apart"
        if score.removed if runs else score.layer in dropped:
            return "removed"
        return "protected" if score.protected else "kept"

    colours = {"removed": _REJECTED, "kept": _ACCEPTED, "protected": "#BBBBBB"}
    colours |= {"merged in the end": _MERGED, "apart": _ACCEPTED}
    for name, colour in colours.items():
        own = [score for score in scores if kind(score) == name]
        if own:
            heights = [min(score.value, cap) - base for score in own]
            axes.bar([s.layer for s in own], heights, bottom=base, color=colour, width=0.8, label=name)
    for score in scores:
        if score.value > cap:
            text = f"{score.value:,.4g}" if score.value < 1e4 else f"{score.value:.0e}".replace("e+0", "e")
            axes.annotate(
                f"{text} ↑",
                (score.layer, cap),
                xytext=(0, -3),
                textcoords="offset points",
                ha="center",
                va="top",
                rotation=90,
                fontsize=7,
                color="white",
                fontweight="bold",
            )
        elif score.layer in order:
            axes.annotate(
                str(order[score.layer]),
                (score.layer, max(score.value, base)),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=_REJECTED,
            )
    lowest = min(base, *(score.value for score in scores))
    room = 0.08 * (cap - lowest) or 1.0
    axes.set_ylim(lowest - (room if lowest < base else 0), cap + room)
    layers = [score.layer for score in scores]
    axes.set_xlim(min(layers) - 0.8, max(layers) + 0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    plain(axes)


def _draw_phases(axes: "Axes", scores: list[_Score]) -> None:
    from matplotlib.ticker import MaxNLocator

    phases = sorted({score.phase for score in scores})
    rows = {phase: row for row, phase in enumerate(phases)}
    least = {phase: math.inf for phase in phases}
    for score in scores:
        least[score.phase] = min(least[score.phase], score.value)
    last = max(score.layer for score in scores)
    grid = [[math.nan] * (last + 1) for _ in phases]
    for score in scores:
        grid[rows[score.phase]][score.layer] = score.value - least[score.phase]
    # Colours are for the candidates that are close; the ruinous ones share the last.
    usual = sorted(score.value - least[score.phase] for score in scores)[int(0.75 * (len(scores) - 1))]
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=usual or None, interpolation="nearest")
    for score in scores:
        if score.removed and score.last > score.layer:
            ends = [score.layer, score.last]
            axes.plot(ends, [rows[score.phase]] * 2, marker="o", markersize=4, color=_REJECTED, linewidth=2)
        elif score.removed:
            axes.scatter([score.layer], [rows[score.phase]], marker="x", s=28, color=_REJECTED, linewidths=2)
    axes.set_ylabel("phase", fontsize=9)
    axes.set_yticks(range(len(phases)), [str(phase + 1) for phase in phases])
    if len(phases) > 12:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=12, extend="max")
    bar.set_label("above the phase's least", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    plain(axes)


def similarity_matrix(
    matrix: Sequence[Sequence[float]], labels: Sequence[str], windows: Sequence[tuple[int, int]], title: str
) -> bytes:
    """Draws the similarity of every pair of layers as a heat map, with the merged windows outlined.

    Args:
        matrix: Similarities, ``[layers][layers]``.
        labels: A name for each layer.
        windows: First and last row of each window.
        title: What was measured.

    Returns:
        A PNG.
    """
    from matplotlib.patches import Rectangle

    n = len(matrix)
    ticks = list(range(0, n, max(1, round(n / 10))))
    with plain_text():
        figure = new_figure(7.2, 6.2)
        axes = figure.subplots()
        smallest = min(min(row) for row in matrix)
        image = axes.imshow(matrix, origin="lower", cmap="viridis", vmin=min(smallest, 0.99), vmax=1)
        for low, high in windows:
            size = high - low + 1
            for width, colour in ((4.0, "white"), (2.0, _REJECTED)):
                corner = (low - 0.5, low - 0.5)
                axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor=colour, linewidth=width))
        axes.set_xticks(ticks, [labels[i] for i in ticks], fontsize=8)
        axes.set_yticks(ticks, [labels[i] for i in ticks], fontsize=8)
        axes.set_xlabel("decoder layer", fontsize=9)
        axes.set_ylabel("decoder layer", fontsize=9)
        axes.tick_params(length=2, colors="#333333")
        figure.colorbar(image, ax=axes, shrink=0.9, label="CKA").ax.tick_params(labelsize=8)
        set_title(figure, title)
        return to_png(figure)
