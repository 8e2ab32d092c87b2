"""A map of the dense model's layers and what became of each: as pictures, and as a table for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from slm_pl.compression.architecture import GROUPS, Group, decoder_layers
from slm_pl.compression.fates import LayerFate, Width, hidden_width, layer_fates
from slm_pl.compression.plan import Plan, count_parameters, load_plans
from slm_pl.documents import parse_json
from slm_pl.drawing import COLOURS, GREY, new_figure, set_title, to_png, to_svg
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedModel

MAP = "layer_map"
"""Name of the map, as ``.svg``, ``.png`` and ``.json``."""
TABLE = f"{MAP}.json"
_SCHEMA_VERSION = 1
_LARGEST = 2**22  # bytes of a table that may come from a stranger

Sizes = tuple[list[int] | None, list[int] | None]
"""Parameters of each layer of the dense and of the compressed model, as far as they are known."""

_KEPT, _MERGED, _REMOVED = COLOURS[0], COLOURS[2], COLOURS[5]
# Everything is placed in inches, from the upper left corner.
_WIDTH, _HEAD, _MARGIN = 5.2, 0.62, 0.06
_NUMBER, _BRACKET, _BECAME = 0.34, 0.47, 2.3
_CELLS: dict[Group, tuple[float, float]] = {"attention": (0.62, 0.6), "mlp": (1.26, 0.96)}
_UNITS: dict[Group, str] = {"attention": "groups", "mlp": "channels"}


def layer_parameters(model: "PreTrainedModel") -> list[int]:
    """Parameters of each decoder layer of a model."""
    return [count_parameters(layer) for layer in decoder_layers(model)]


def layer_map(
    plans: Sequence[Plan],
    before: Sequence[int] | None = None,
    after: Sequence[int] | None = None,
    parameters: int | None = None,
) -> dict[str, bytes]:
    """Draws the dense model's layers and what became of each.

    Plans do not tell how many parameters a layer has; without these figures, the map says so.

    Args:
        plans: What was done, in order.
        before: Parameters of each layer of the dense model.
        after: Parameters of each layer of the compressed model.
        parameters: All parameters of the compressed model.

    Returns:
        ``layer_map.svg`` and ``layer_map.png`` by name; nothing without a plan.

    Raises:
        UsageError: As :func:`slm_pl.compression.fates.layer_fates`.
    """
    if not plans:
        return {}
    fates = layer_fates(plans, before, after)
    row = 0.2 if len(fates) <= 36 else 0.165 if len(fates) <= 60 else 0.145
    notes = _notes(plans, fates)
    height = _HEAD + row * len(fates) + 0.17 * len(notes) + 0.1
    figure = new_figure(_WIDTH, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(height, 0)
    set_title(figure, _title(plans, fates, parameters))
    figure._suptitle.set_position((_MARGIN / _WIDTH, 1 - 0.08 / height))  # type: ignore[attr-defined]
    _draw_heads(axes)
    hidden = hidden_width(plans)
    for fate in fates:
        _draw_layer(axes, fate, _HEAD + row * fate.layer, row, hidden)
    for window, host in sorted({(fate.window, fate.host) for fate in fates if len(fate.window) > 1}):
        _draw_bracket(axes, window, host, row)
    for index, note in enumerate(notes):
        place = _HEAD + row * len(fates) + 0.14 + 0.17 * index
        axes.text(_MARGIN, place, note, fontsize=7, color=GREY, va="center")
    return {f"{MAP}.svg": to_svg(figure), f"{MAP}.png": to_png(figure)}


def layer_table(plans: Sequence[Plan], before: Sequence[int] | None, after: Sequence[int] | None) -> bytes:
    """The same for programs, as JSON: :class:`~slm_pl.compression.fates.LayerFate` by layer, and the parameters.

    Raises:
        UsageError: As :func:`slm_pl.compression.fates.layer_fates`.
    """
    head = {
        "schema_version": _SCHEMA_VERSION,
        "plan_sha256": [plan.sha256 for plan in plans],
        "parameters_before": before and list(before),
        "parameters_after": after and list(after),
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    layers = ",\n".join("    " + json.dumps(asdict(fate)) for fate in layer_fates(plans, before, after))
    return ("{\n" + ",\n".join([*lines, f'  "layers": [\n{layers}\n  ]']) + "\n}\n").encode()


def load_sizes(directory: Path, plans: Sequence[Plan]) -> Sizes:
    """The layers' parameters that an export carries; None where it has none that fit these plans.

    A stranger's directory may hold anything.
    """
    path = directory / TABLE
    try:
        if path.stat().st_size > _LARGEST:
            return None, None
        data = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None, None
    if not isinstance(data, dict) or data.get("schema_version") != _SCHEMA_VERSION:
        return None, None
    if not plans or data.get("plan_sha256") != [plan.sha256 for plan in plans]:
        return None, None
    before, after = (_counts(data.get(name)) for name in ("parameters_before", "parameters_after"))
    if before is not None and sum(before) > plans[0].base.num_parameters:
        before = None
    try:
        layer_fates(plans, before, after)
    except UsageError:
        return None, None
    return before, after


def _counts(value: object) -> list[int] | None:
    whole = isinstance(value, list) and all(type(count) is int and 0 <= count < 10**15 for count in value)
    return value if whole and isinstance(value, list) else None


def load_dense_layers(directory: Path, plans: Sequence[Plan]) -> list[int] | None:
    """The dense layers' parameters for an export made from another, whose plans these begin with."""
    try:
        carried = load_plans(directory, tensors=False)
    except UsageError:
        return None
    return load_sizes(directory, carried)[0] if carried == list(plans[: len(carried)]) else None


def _title(plans: Sequence[Plan], fates: Sequence[LayerFate], parameters: int | None) -> str:
    left = len({fate.now for fate in fates if fate.now is not None})
    then = "" if parameters is None else f" → {_short(parameters)}"
    return f"{len(fates)} → {left} layers; {_short(plans[0].base.num_parameters)}{then} parameters"


def _notes(plans: Sequence[Plan], fates: Sequence[LayerFate]) -> list[str]:
    """What stands below the map."""
    notes = []
    known = [(fate.before, fate.after) for fate in fates]
    if all(None not in pair for pair in known):
        before, after = (sum(pair[index] or 0 for pair in known) for index in (0, 1))
        notes.append(f"All layers: {_short(before)} → {_short(after)}; the rest is embeddings, head and final norm.")
    elif all(before is None for before, _ in known):
        notes.append("How many parameters the dense model's layers had was not recorded.")
    if any(fate.widths for fate in fates):
        notes.append("Filled: what is left of the attention (KV groups) and of the MLP (channels), where it is known.")
    if (hidden := hidden_width(plans)) is not None:
        units = "" if hidden.units is None else f" of {hidden.units:,}"
        notes.append(f"Everywhere: {hidden.kept:,}{units} channels of the hidden state (height of the bars).")
    if any(fate.refitted for fate in fates):
        notes.append("refit: its output map was fitted anew by least squares.")
    return notes


def _short(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= 10 * size or (count >= size and size > 10**3):
            return f"{count / size:.4g} {unit}"
    return f"{count:,}"


def _draw_heads(axes: "Axes") -> None:
    place = _HEAD - 0.13
    for x, text, side in (
        (_NUMBER, "layer", "right"),
        *((start, "attention" if group == "attention" else "MLP", "left") for group, (start, _) in _CELLS.items()),
        (_BECAME, "became", "left"),
        (_WIDTH - _MARGIN, "parameters", "right"),
    ):
        axes.text(x, place, text, fontsize=7.5, color=GREY, ha=side, va="center")
    axes.plot([_MARGIN, _WIDTH - _MARGIN], [_HEAD - 0.03] * 2, color="#BBBBBB", linewidth=0.6)


def _draw_layer(axes: "Axes", fate: LayerFate, top: float, row: float, hidden: Width | None) -> None:
    from matplotlib.patches import Rectangle

    middle, gap, size = top + row / 2, 0.14 * row, 40 * row if row > 0.19 else 44 * row
    gone = fate.fate == "removed"
    hosts = fate.layer == fate.host and not gone
    colour = _MERGED if fate.fate == "merged" else _KEPT
    axes.text(_NUMBER, middle, str(fate.layer), fontsize=size, ha="right", va="center")
    for group, (left, width) in _CELLS.items():
        bottom, height = top + gap, row - 2 * gap
        if not hosts:
            # Told apart without colour: what went into another layer is hatched, what was removed is empty and struck.
            edge = _REMOVED if gone else _MERGED
            box = Rectangle((left, bottom), width, height, fill=False, edgecolor=edge, linewidth=0.7)
            axes.add_patch(box)
            if not gone:
                box.set_hatch("/////")
            else:
                box.set_linestyle((0, (2, 1.5)))
                axes.plot([left, left + width], [middle] * 2, color=_REMOVED, linewidth=0.9)
            continue
        told = fate.widths.get(group)
        share = 1.0 if told is None else 0.0 if told.kept == 0 else told.share
        high = height * (1.0 if hidden is None or hidden.share is None else hidden.share)
        filled = Rectangle((left, bottom + height - high), width * (share or 0.0), high, facecolor=colour)
        filled.set_edgecolor("none")
        axes.add_patch(filled)
        axes.add_patch(Rectangle((left, bottom), width, height, fill=False, edgecolor=colour, linewidth=0.7))
        label = _width_text(group, told) + " refit" * (group in fate.refitted)
        if label:
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            at_left = share is not None and share > 0.5  # where it does not hide the end of the filled part
            x, side = (left + 0.05, "left") if at_left else (left + width - 0.05, "right")
            axes.text(x, middle, label.strip(), fontsize=0.82 * size, ha=side, va="center", bbox=paper)
    axes.text(_BECAME, middle, _became(fate), fontsize=size, va="center", color=GREY if not hosts else "black")
    axes.text(_WIDTH - _MARGIN, middle, _sizes(fate), fontsize=size, ha="right", va="center", color="black")


def _width_text(group: Group, width: Width | None) -> str:
    if width is None:
        return ""
    return f"{width.kept:,} {_UNITS[group]}" if width.share is None else f"{width.share:.0%}"


def _became(fate: LayerFate) -> str:
    others = len(fate.window) > 1
    if fate.fate == "removed":
        return f"merged into {fate.host}, removed" if others and fate.layer != fate.host else "removed"
    if fate.layer != fate.host:
        return f"merged into {fate.host}"
    return f"layer {fate.now}, of {_span(fate.window)}" if others else f"layer {fate.now}"


def _span(window: tuple[int, ...]) -> str:
    """``3–6``; with gaps, where a layer between had been removed before, ``3–6 without 5``."""
    missing = sorted(set(range(window[0], window[-1] + 1)) - set(window))
    named = ", ".join(map(str, missing)) if len(missing) < 3 else f"{len(missing)} of them"
    return f"{window[0]}–{window[-1]}" + f" without {named}" * bool(missing)


def _sizes(fate: LayerFate) -> str:
    if fate.before is None:
        return "" if fate.after is None else _short(fate.after)
    if fate.before == fate.after or fate.after is None:
        return _short(fate.before) + " → ?" * (fate.after is None)
    return f"{_short(fate.before)} → {_short(fate.after)}"


def _draw_bracket(axes: "Axes", window: tuple[int, ...], host: int, row: float) -> None:
    """Joins the layers of a window; the tip is at the one whose module stays."""
    places = {layer: _HEAD + row * (layer + 0.5) for layer in window}
    axes.plot([_BRACKET] * 2, [places[window[0]], places[window[-1]]], color="black", linewidth=1)
    for layer, place in places.items():
        axes.plot([_BRACKET, _BRACKET + 0.08], [place] * 2, color="black", linewidth=1)
        if layer == host:
            axes.scatter([_BRACKET + 0.09], [place], marker=">", s=60 * row, color="black", linewidths=0, zorder=3)


assert tuple(_CELLS) == GROUPS
