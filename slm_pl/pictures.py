"""What a search saw, as PNG files."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from slm_pl.compression.plan import JSONValue, MergeLayers, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; black and yellow left out.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_ACCEPTED, _MERGED, _REJECTED = COLOURS[0], COLOURS[2], COLOURS[5]
_GREY = "#555555"

MATRIX = "representation_similarity"
"""Name of the similarity matrix of a tested model's layers, as ``.json`` and ``.png``."""
_LARGEST = 8 * 2**20  # bytes of a figure that is carried on


def trace_name(number: int) -> str:
    """File name of the picture of a model's first, second, … plan."""
    return "search_trace.png" if number == 1 else f"search_trace.{number}.png"


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
    numbers = list(range(1, len(tries) + 1))
    windows = [(s.low, s.high) for s in plan.steps if isinstance(s, MergeLayers)]
    with _plain_text():
        figure = _figure(max(6.5, min(14.0, 2.5 + 0.24 * len(tries))), 6.2)
        above, below = figure.subplots(2, 1, sharex=True)
        _draw_similarities(above, numbers, tries, plan.outcome.get("threshold"))
        above.set_ylabel(f"{plan.method.init_args.get('similarity', 'similarity')} to the dense model", fontsize=9)
        _draw_windows(below, numbers, tries, windows, plan.base.num_layers)
        left = plan.base.num_layers - sum(high - low for low, high in windows)
        searches = plan.outcome.get("searches")
        count = len(searches) if isinstance(searches, list) else 1
        decided = f", the search of {count} that decided" if count > 1 else ""
        cut = ", last window cut to fit" if plan.outcome.get("cut_to_fit") else ""
        tried = "1 try" if len(tries) == 1 else f"{len(tries)} tries"
        _title(figure, f"{plan.base.num_layers} → {left} layers: {tried}{decided}{cut}")
        return _png(figure)


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
        axes.plot([], [], color=_GREY, linestyle="--", linewidth=1.2, label=label)
        if inside:
            axes.axhline(threshold, color=_GREY, linestyle="--", linewidth=1.2, zorder=2)
            lowest, highest = min(lowest, threshold), max(highest, threshold)
    room = max(0.005, 0.07 * (highest - lowest))
    axes.set_ylim(lowest - 2.5 * room, highest + room)  # the legend is below
    axes.legend(fontsize=8, frameon=False, loc="lower left", ncols=3)
    _plain(axes)


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
    _plain(axes)


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
    with _plain_text():
        figure = _figure(7.2, 6.2)
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
        _title(figure, title)
        return _png(figure)


@contextlib.contextmanager
def _plain_text() -> Iterator[None]:
    """Takes a ``$`` in a name for what it is, not for the beginning of a formula."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):
        yield


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot's: nothing global is touched, and it is drawn by Agg.
    return Figure(figsize=(width, height), layout="constrained")


def _title(figure: "Figure", text: str) -> None:
    most = int(figure.get_figwidth() * 11)  # characters in a line
    shown = text if len(text) <= most else text[: most - 1] + "…"
    figure.suptitle(shown, fontsize=10, fontweight="bold", x=0.01, ha="left")


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_GREY)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
