"""How a training run went, as a PNG file: losses and learning rate over the optimizer steps."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slm_pl.drawing import COLOURS, GREY, is_number, new_figure, plain, set_title, to_png

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]

_TRAINING, _VALIDATION, _RATE = COLOURS[0], COLOURS[5], COLOURS[2]


def learning_curves(history: Mapping[str, Sequence[tuple[int, float]]]) -> bytes:
    """Draws the losses, and below them the learning rate.

    Args:
        history: Of ``train/loss``, ``val/loss`` and ``lr`` the optimizer step and the value of each record. Any may be
            missing or empty. What is not a finite number is passed over.

    Returns:
        A PNG.
    """
    return to_png(_figure(history))


def _figure(history: Mapping[str, Sequence[tuple[int, float]]]) -> "Figure":
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    training, validation, rates = (_drawable(history.get(key, ())) for key in ("train/loss", "val/loss", "lr"))
    figure = new_figure(7.5, 4.8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1.0])
    _draw_losses(upper, training, validation)
    _draw_rates(lower, rates)
    steps = [step for points in (training, validation, rates) for step, _ in points] or [0]
    room = 0.015 * (max(steps) - min(steps)) or 0.5
    lower.set_xlim(min(steps) - room, max(steps) + room)
    lower.set_xlabel("optimizer step", fontsize=9)
    lower.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1))
    lower.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axes in (upper, lower):
        plain(axes)
        axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.align_ylabels([upper, lower])
    parts = ["Learning curves"]
    if validation:
        step, value = _best(validation)
        parts.append(f"lowest validation loss {value:.4g} at step {step:,}")
    set_title(figure, ": ".join(parts))
    return figure


def _drawable(points: Sequence[tuple[int, float]]) -> Points:
    return sorted(((step, value) for step, value in points if is_number(value)), key=lambda point: point[0])


def _best(points: Points) -> tuple[int, float]:
    return min(points, key=lambda point: point[1])  # of equals the first


def _smoothed(values: Sequence[float]) -> "numpy.ndarray":
    """The mean of each value and its neighbours, about 2 % of all to each side, fewer of them at the ends."""
    import numpy

    window = numpy.ones(2 * math.ceil(len(values) / 50) + 1)
    return numpy.convolve(values, window, "same") / numpy.convolve(numpy.ones(len(values)), window, "same")


def _draw_losses(axes: "Axes", training: Points, validation: Points) -> None:
    axes.set_ylabel("loss", fontsize=9)
    if not training and not validation:
        _say_nothing(axes, "no loss was recorded")
        return
    drawn = [value for _, value in validation]
    if training:
        steps, values = zip(*training, strict=True)
        few = len(values) < 10
        mark: dict[str, Any] = {"marker": "o", "markersize": 3.5} if few else {"alpha": 0.35}
        axes.plot(steps, values, color=_TRAINING, linewidth=0.6, label="training", **mark)
        if few:
            drawn += values
        else:
            axes.plot(steps, _smoothed(values), color=_TRAINING, linewidth=1.6, label="training, moving average")
            ranked = sorted(values)
            tail = len(values) // 200  # so few spikes must not press all others together: they may be cut off
            drawn += [values[0], *ranked[tail : len(ranked) - tail]]
    low, high = min(drawn), max(drawn)
    room = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - room, high + 2 * room)  # above also for the value of the lowest
    if validation:
        steps, values = zip(*validation, strict=True)
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.3, "zorder": 3}
        axes.plot(steps, values, color=_VALIDATION, label="validation", **style)
        _mark_best(axes, *_best(validation))
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


def _mark_best(axes: "Axes", step: int, value: float) -> None:
    ring: dict[str, Any] = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.4}
    axes.plot([step], [value], color=_VALIDATION, linestyle="none", label="lowest", zorder=4, **ring)
    axes.annotate(
        f"{value:.4g}",
        (step, value),
        xytext=(0, 9),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8,
        fontweight="bold",
        color=_VALIDATION,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        zorder=5,
    )


def _draw_rates(axes: "Axes", rates: Points) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    highest = max((value for _, value in rates), default=0.0)
    exponent = math.floor(math.log10(highest)) if highest > 0 else 0
    # In the label, since 0.0001 and 5e-05 on one axis are hard to compare.
    axes.set_ylabel("learning rate" + (f"\n(times 1e{exponent})" if exponent else ""), fontsize=9)
    if not rates:
        _say_nothing(axes, "no learning rate was recorded")
        return
    steps, values = zip(*rates, strict=True)
    mark: dict[str, Any] = {"marker": "o" if len(values) < 10 else None, "markersize": 3.5}
    axes.plot(steps, values, color=_RATE, linewidth=1.6, clip_on=False, **mark)
    axes.set_ylim(0, 1.1 * highest if highest > 0 else 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10.0**exponent:.3g}"))


def _say_nothing(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9, color=GREY)
    axes.set_yticks([])
