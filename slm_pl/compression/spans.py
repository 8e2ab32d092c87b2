"""Which layers of the model that a plan was computed on each layer that stays stands for."""

from dataclasses import dataclass

from slm_pl.compression.plan import DropLayers, MergeLayers, Plan


@dataclass(frozen=True)
class Span:
    """A decoder layer that a plan keeps, and the layers it then stands for.

    Attributes:
        layer: The one that stays.
        low: First layer of the span.
        high: Its last; the next span begins behind it.
        merge: The step that made it, or None where layers around it were dropped or nothing happened to it.
    """

    layer: int
    low: int
    high: int
    merge: MergeLayers | None

    @property
    def alone(self) -> bool:
        """Whether it stands for itself only."""
        return self.low == self.layer == self.high


def spans(plan: Plan) -> list[Span]:
    """Cuts the layers that a plan was computed on into spans, one for each layer that stays, from the bottom up.

    A dropped layer belongs to the kept one below it, and where there is none, to the first one above.
    """
    merges = {step.host: step for step in plan.steps if isinstance(step, MergeLayers)}
    gone = {layer for step in plan.steps if isinstance(step, DropLayers) for layer in step.layers}
    for step in merges.values():
        gone |= set(range(step.low, step.high + 1)) - {step.host}
    kept = [layer for layer in range(plan.base.num_layers) if layer not in gone]
    lows = [merges[layer].low if layer in merges else layer for layer in kept]
    lows[0] = 0
    highs = [low - 1 for low in lows[1:]] + [plan.base.num_layers - 1]
    return [Span(layer, low, high, merges.get(layer)) for layer, low, high in zip(kept, lows, highs, strict=True)]
