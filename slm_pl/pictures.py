"""What a search saw, as PNG files."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from slm_pl.compression.plan import MergeLayers, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; black and yellow left out.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_ACCEPTED, _REJECTED, _THRESHOLD = COLOURS[0], COLOURS[5], "#555555"


MATRIX = "representation_similarity"
"""Name of the similarity matrix of a model's layers, as ``.json`` and ``.png``."""


def load_figures(directory: Path) -> dict[str, bytes]:
    """The similarity matrices that an export carries, by file name, so that another export made from it keeps them."""
    found = [path for suffix in ("json", "png") for path in directory.glob(f"{MATRIX}*.{suffix}")]
    return {path.name: path.read_bytes() for path in sorted(found)}


def trace_name(number: int) -> str:
    """File name of the picture of a model's first, second, … plan."""
    return "search_trace.png" if number == 1 else f"search_trace.{number}.png"


def search_trace(plan: Plan) -> bytes | None:
    """Draws a search over windows: every try, its similarity and the layers it would have merged.

    Above, the similarity over the tries with the threshold; below, the layers of each try's window. Of several searches
    (``remove_layers``), the one that decided is drawn.

    Returns:
        A PNG, or None if the plan's trace is not one of windows.
    """
    tries = [t for t in plan.trace if "similarity" in t and t.get("search", 0) == plan.outcome.get("search", 0)]
    if not tries:
        return None
    threshold = cast(float, plan.outcome["threshold"])
    windows = [(s.low, s.high) for s in plan.steps if isinstance(s, MergeLayers)]
    lows, highs = ([cast(int, t[key]) for t in tries] for key in ("low", "high"))
    values = [cast(float, t["similarity"]) for t in tries]
    colours = [_ACCEPTED if t["accepted"] else _REJECTED for t in tries]

    figure = _figure(max(6.5, min(14.0, 2.5 + 0.24 * len(tries))), 6.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1))
    numbers = list(range(1, len(tries) + 1))
    above.plot(numbers, values, color="#BBBBBB", linewidth=1, zorder=1)
    for accepted, marker, label in ((True, "o", "accepted"), (False, "X", "rejected")):
        chosen = [i for i, t in enumerate(tries) if t["accepted"] is accepted]
        if chosen:
            x, y = [numbers[i] for i in chosen], [values[i] for i in chosen]
            colour = _ACCEPTED if accepted else _REJECTED
            above.scatter(x, y, color=colour, marker=marker, s=42, zorder=3, label=label, linewidths=0)
    above.axhline(
        threshold, color=_THRESHOLD, linestyle="--", linewidth=1.2, zorder=2, label=f"threshold {threshold:.4g}"
    )
    above.set_ylabel(str(plan.method.init_args.get("similarity", "similarity")) + " to the dense model", fontsize=9)
    above.set_ylim(min([*values, threshold]) - 0.04, 1.02)
    above.legend(fontsize=8, frameon=False, loc="lower left", ncols=3)

    sizes = [high - low + 1 for low, high in zip(lows, highs, strict=True)]
    below.bar(numbers, sizes, bottom=[low - 0.5 for low in lows], color=colours, width=0.75)
    for low, high in windows:
        _band(below, low, high)
    below.set_ylabel("decoder layers of the window", fontsize=9)
    below.set_xlabel("try", fontsize=9)
    below.set_ylim(-0.7, plan.base.num_layers - 0.3)
    below.set_xlim(0.3, len(tries) + 0.7)
    for axis in (below.xaxis, below.yaxis):
        axis.get_major_locator().set_params(integer=True)
    left = plan.base.num_layers - sum(high - low for low, high in windows)
    searches = plan.outcome.get("searches")
    count = len(searches) if isinstance(searches, list) else 1
    decided = f", the last of {count} searches" if count > 1 else ""
    cut = ", last window cut to fit" if plan.outcome.get("cut_to_fit") else ""
    figure.suptitle(
        f"{plan.base.num_layers} → {left} layers: {len(tries)} tries{decided}{cut}",
        fontsize=11,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    for axes in (above, below):
        _plain(axes)
    return _png(figure)


def _band(axes: "Axes", low: int, high: int) -> None:
    axes.axhspan(low - 0.42, high + 0.42, color=COLOURS[2], alpha=0.18, linewidth=0, zorder=0)
    axes.annotate(
        f"merged {low}–{high}",
        (1, (low + high) / 2),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=COLOURS[2],
    )


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
    figure = _figure(7.2, 6.2)
    axes = figure.subplots()
    smallest = min(min(row) for row in matrix)
    image = axes.imshow(matrix, origin="lower", cmap="viridis", vmin=min(smallest, 0.99), vmax=1)
    for low, high in windows:
        size = high - low + 1
        for width, colour in ((4.0, "white"), (2.0, COLOURS[5])):
            square = (low - 0.5, low - 0.5), size, size
            axes.add_patch(Rectangle(*square, fill=False, edgecolor=colour, linewidth=width))
    step = max(1, round(n / 10))
    ticks = list(range(0, n, step))
    axes.set_xticks(ticks, [labels[i] for i in ticks], fontsize=8)
    axes.set_yticks(ticks, [labels[i] for i in ticks], fontsize=8)
    axes.set_xlabel("decoder layer", fontsize=9)
    axes.set_ylabel("decoder layer", fontsize=9)
    axes.tick_params(length=2, colors="#333333")
    figure.colorbar(image, ax=axes, shrink=0.9, label="CKA").ax.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return _png(figure)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot's: nothing global is touched, and it is drawn by Agg.
    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors="#555555")


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
