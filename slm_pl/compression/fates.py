"""What became of every layer of the dense model, as the plans that were carried out one after another say it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from slm_pl.compression.architecture import MOST_LAYERS, Group
from slm_pl.compression.plan import DropLayers, JSONValue, KeepChannels, KeepHidden, MergeLayers, Plan, RefitOutput
from slm_pl.errors import UsageError

_MOST_UNITS = 10_000_000  # of a plan that may come from a stranger's file

Fate = Literal["kept", "merged", "removed"]


@dataclass(frozen=True)
class Width:
    """How much of something is left.

    Attributes:
        kept: How many units.
        units: How many the dense model had; None if no plan tells.
    """

    kept: int
    units: int | None

    @property
    def share(self) -> float | None:
        """What is left of 1; None if no plan tells."""
        return self.kept / self.units if self.units else None


@dataclass(frozen=True)
class LayerFate:
    """What became of one layer of the dense model.

    Attributes:
        layer: Its number in the dense model, from 0.
        fate: ``kept``: a layer of its own; ``merged``: it became one layer with others; ``removed``: nothing of it is
            left, whether or not it was merged before.
        now: The number, in the compressed model, of the layer that it is or is part of; None if it was removed.
        window: The dense model's layers that it was merged with, itself among them, ascending; itself alone if with
            none.
        host: Which of these the module of the merged layer comes from.
        widths: What is left of the attention (KV groups) and of the MLP (channels) where a plan made them narrower.
            Of a merged layer, only the host has them.
        refitted: The groups whose output map was refitted by least squares. Of a merged layer, only the host has them.
        before: Parameters that it had; None if that is not known.
        after: Parameters of the layer that is left, for the layer that hosts it; 0 for all others; None if that is not
            known.
    """

    layer: int
    fate: Fate
    now: int | None
    window: tuple[int, ...]
    host: int
    widths: dict[Group, Width] = field(default_factory=dict)
    refitted: tuple[Group, ...] = ()
    before: int | None = None
    after: int | None = None


@dataclass
class _Layer:
    """A layer of the model between two plans."""

    window: tuple[int, ...]
    host: int
    widths: dict[Group, Width]
    refitted: set[Group]


def layer_fates(
    plans: Sequence[Plan], before: Sequence[int] | None = None, after: Sequence[int] | None = None
) -> tuple[LayerFate, ...]:
    """Follows every layer of the dense model through the plans.

    The steps of each plan refer to the model it was computed on; what comes out refers to the dense one.

    Args:
        plans: What was done, in order; at least one.
        before: Parameters of each layer of the dense model, if they are known.
        after: Parameters of each layer of the compressed model, if they are known.

    Returns:
        One fate for each layer of the dense model, in order.

    Raises:
        UsageError: If the plans do not follow on each other, name layers that are not there, or if there are not as
            many figures as layers.
    """
    dense = plans[0].base.num_layers
    if not 0 < dense <= MOST_LAYERS:
        raise UsageError(f"The plan is of a model with {dense} layers; a map is drawn of 1 to {MOST_LAYERS}.")
    layers = [_Layer((layer,), layer, {}, set()) for layer in range(dense)]
    lost: dict[int, _Layer] = {}
    for number, plan in enumerate(plans, start=1):
        if plan.base.num_layers != len(layers):
            raise UsageError(
                f"Plan {number} was computed on a model with {plan.base.num_layers} layers, and the plans before it "
                f"leave {len(layers)}. Give all plans of one model, in the order they were carried out."
            )
        layers = _carried_out(plan, number, layers, lost)
    for name, figures, expected in (("before", before, dense), ("after", after, len(layers))):
        if figures is not None and len(figures) != expected:
            raise UsageError(f"There are {len(figures)} layers' parameters {name}, and {expected} layers.")
    fates: dict[int, LayerFate] = {}
    for now, layer in enumerate(layers):
        for member in layer.window:
            host = member == layer.host
            fates[member] = LayerFate(
                layer=member,
                fate="kept" if len(layer.window) == 1 else "merged",
                now=now,
                window=layer.window,
                host=layer.host,
                widths=layer.widths if host else {},
                refitted=tuple(sorted(layer.refitted)) if host else (),
                before=None if before is None else before[member],
                after=0 if not host else None if after is None else after[now],
            )
    for member, layer in lost.items():
        known = None if before is None else before[member]
        fates[member] = LayerFate(member, "removed", None, layer.window, layer.host, before=known, after=0)
    return tuple(fates[layer] for layer in range(dense))


def _carried_out(plan: Plan, number: int, layers: list[_Layer], lost: dict[int, _Layer]) -> list[_Layer]:
    """The layers that a plan leaves; what it removes goes to ``lost``, by the dense model's numbers."""
    left: dict[int, _Layer] = dict(enumerate(layers))

    def there(index: int) -> _Layer:
        if index not in left:
            raise UsageError(
                f"Plan {number} names layer {index}, which its model of {len(layers)} layers does not have, or twice."
            )
        return left[index]

    units = _units(plan)
    for step in plan.steps:
        if isinstance(step, KeepChannels):
            layer = there(step.layer)
            known = layer.widths.get(step.group)
            told = units.get((step.layer, step.group)) if known is None else known.units
            layer.widths[step.group] = _width(len(step.indices), told)
        elif isinstance(step, MergeLayers):
            # As many as there are at most: the bounds of a stranger's window may be any numbers.
            window = [there(index) for index in range(step.low, min(step.high, step.low + len(layers)) + 1)]
            if len(window) < 2:
                raise UsageError(f"Plan {number} merges the window {step.low}..{step.high}, which is not two layers.")
            host = there(step.host)
            for index in range(step.low, step.high + 1):
                del left[index]
            members = tuple(sorted(member for layer in window for member in layer.window))
            left[step.host] = _Layer(members, host.host, host.widths, host.refitted)
        elif isinstance(step, DropLayers):
            for index in step.layers:
                layer = there(index)
                del left[index]
                lost.update(dict.fromkeys(layer.window, layer))
    for step in plan.steps:
        if isinstance(step, RefitOutput):
            there(step.layer).refitted.add(step.group)
    return [left[index] for index in sorted(left)]


def _units(plan: Plan) -> dict[tuple[int, str], int]:
    """By layer and group, how many units the trace says there were; it may come from a stranger's file."""
    found: dict[tuple[int, str], int] = {}
    for row in plan.trace:
        layer, group, units = row.get("layer"), row.get("group"), row.get("units")
        if type(layer) is int and isinstance(group, str) and _is_count(units):
            assert isinstance(units, int)
            found[layer, group] = units
    return found


def _is_count(units: JSONValue) -> bool:
    return type(units) is int and 0 < units < _MOST_UNITS


def hidden_width(plans: Sequence[Plan]) -> Width | None:
    """How many channels of the hidden state are left; None if no plan made it narrower."""
    width: Width | None = None
    for plan in plans:
        for step in plan.steps:
            if isinstance(step, KeepHidden):
                rows = [row.get("units") for row in plan.trace if row.get("group") == "hidden"]
                counts = [units for units in rows if _is_count(units) and isinstance(units, int)]
                units = width.units if width is not None else counts[-1] if counts else None
                width = _width(len(step.indices), units)
    return width


def _width(kept: int, units: int | None) -> Width:
    return Width(kept, None if units is None or units < kept else units)
