"""A comparison as bars of every quantity."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from slm_pl.drawing import COLOURS, GREY, new_figure, plain_text, to_png, wrapped
from slm_pl.report.comparison import Comparison
from slm_pl.report.figures import UNITS, cell_text
from slm_pl.report.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _panels(rows: list[Row]) -> list[Row]:
    """The rows worth a picture: what was kept, what it cost and what it brought."""
    rows = [row for row in rows if row.drawn]

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
    panels = _panels(comparison.rows)
    models = len(comparison.labels)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    with plain_text():
        figure = new_figure(4.3 * columns, (1.3 + 0.42 * models) * lines)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr,call-arg]
        all_axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes, row in zip(all_axes, panels, strict=False):
            _draw_panel(axes, row, comparison.labels)
        for axes in all_axes[len(panels) :]:
            axes.axis("off")
        return to_png(figure)


def _draw_panel(axes: "Axes", row: Row, labels: list[str]) -> None:
    scale, unit = UNITS[row.quantity]
    present = [cell.value / scale for cell in row.cells if cell.value is not None]
    logarithmic = row.quantity == "perplexity" and bool(present) and max(present) > 10 * min(present) >= 10
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
                color=GREY,
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
            cell_text(
                dataclasses.replace(cell, stderr=None), row.quantity, row.show_ratio and row.quantity != "accuracy"
            ),
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
        axes.xaxis.set_major_formatter(
            lambda value, _: f"{value:,.0f}" if value < 1e6 else f"{value:.0e}".replace("e+0", "e")
        )
        axes.set_xlim(start, math.exp(min(1.45 * math.log(end), 700.0)))
    else:
        axes.set_xlim(start, 1.6 * end or 1.0)
    # No ticks in the room for the values: accuracy has no 120 %.
    axes.set_xticks([tick for tick in axes.get_xticks() if start <= tick <= 1.02 * end])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_yticks(range(len(labels)), [wrapped(label, 20) for label in labels], fontsize=9)
    name, _, setting = row.title.partition(" (")
    notes = [setting.rstrip(")")] * bool(setting) + ["log scale"] * logarithmic
    axes.set_title(wrapped(f"{name}{unit}", 36), fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel("; ".join(notes), fontsize=8, color=GREY, loc="left")
    axes.tick_params(axis="x", labelsize=8, colors=GREY)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
