"""A search that looks everywhere: again and again, the cheapest way to merge a window with its neighbour."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slm_pl.compression.architecture import architecture_of
from slm_pl.compression.calibration import Layer, LayerReplay
from slm_pl.compression.plan import Consolidation, JSONValue, MergeLayers, OtherParameters
from slm_pl.compression.scores import Similarity
from slm_pl.compression.surgery import merge
from slm_pl.compression.windows import Window

Partition = tuple[Window, ...]
"""The layers of the dense model cut into windows, from the bottom up; a layer by itself is a window of one."""
Costs = Callable[[Partition], Mapping[int, float]]
"""For a partition, what it costs to merge the windows number i and i + 1; infinite if that ruins the model."""


@dataclass(frozen=True)
class Found:
    """What a search ends with.

    Attributes:
        windows: Those of more than one layer, from the bottom up.
        cost: Of the model with them merged; where the limit ended the search, of the cheapest merger refused.
        trace: Every candidate: ``phase``, first layer (``layer``) and last (``high``) of the window it would make, its
            cost (``score``), and whether it was taken (``removed``); with a beam, also ``of``, the number of the
            partition that it belongs to.
    """

    windows: tuple[Window, ...]
    cost: float
    trace: tuple[dict[str, JSONValue], ...]


def search_best_first(costs: Costs, num_layers: int, wanted: int, beam: int = 1, limit: float = math.inf) -> Found:
    """Merges the neighbouring windows whose merger costs least, until so many layers are gone or it costs too much.

    With ``beam: b``, the b cheapest partitions of every size are gone on with, not the cheapest alone. Of equal costs
    the lower windows are taken.

    Args:
        costs: Scores the ways to go on.
        num_layers: Decoder layers of the dense model.
        wanted: How many are to go.
        beam: How many partitions to go on with.
        limit: A merger is taken if it costs less.

    Raises:
        FloatingPointError: If every way to go on ruins the model.
    """
    kept: list[tuple[float, Partition]] = [(0.0, tuple((layer, layer) for layer in range(num_layers)))]
    trace: list[dict[str, JSONValue]] = []
    for phase in range(wanted):
        tried: dict[Partition, float] = {}
        rows: list[tuple[Partition, dict[str, JSONValue]]] = []
        for number, (_, partition) in enumerate(kept):
            for place, cost in costs(partition).items():
                low, high = partition[place][0], partition[place + 1][1]
                merged = (*partition[:place], (low, high), *partition[place + 2 :])
                row: dict[str, JSONValue] = {"phase": phase, "layer": low, "high": high}
                row["score"] = cost if math.isfinite(cost) else None
                rows.append((merged, row | ({"of": number} if beam > 1 else {})))
                tried.setdefault(merged, cost)
        cheapest = sorted((cost, partition) for partition, cost in tried.items() if math.isfinite(cost))[:beam]
        if not cheapest:
            raise FloatingPointError(
                f"Whatever two windows are merged after {phase} layers, hidden states are not finite. float16 "
                "overflows above 65,504: load the model with --model.dtype bfloat16 or float32."
            )
        going_on = {partition for cost, partition in cheapest if cost < limit}
        trace += [row | {"removed": partition in going_on} for partition, row in rows]
        if not going_on:
            return Found(_merged(kept[0][1]), cheapest[0][0], tuple(trace))
        kept = [found for found in cheapest if found[1] in going_on]
    cost, partition = kept[0]
    return Found(_merged(partition), cost, tuple(trace))


def _merged(partition: Partition) -> tuple[Window, ...]:
    return tuple(window for window in partition if window[0] < window[1])


class MergerCosts:
    """Scores all mergers of neighbouring windows in one walk up the model.

    The states below a merger are those of the partition itself. So the walk carries them along, and only the merged
    layer and what lies above it is run for each candidate: with n windows about n²/2 layers for every sample, half of
    what full passes take. Below the first window of several layers the states are the dense model's, which the replay
    has.

    Args:
        replay: Of the calibration text.
        consolidation: What becomes of the projections of a window.
        other_parameters: And of its norms and biases.
        similarity: Of the final hidden states; what it lacks is the cost.
        skip_last: So many layers at the top are not merged.
        advance: Called after each candidate.
    """

    def __init__(
        self,
        replay: LayerReplay,
        consolidation: Consolidation,
        other_parameters: OtherParameters,
        similarity: Similarity,
        skip_last: int,
        advance: Callable[[str], None] = lambda note: None,
    ) -> None:
        self._replay = replay
        self._how = (consolidation, other_parameters, architecture_of(replay.model))
        self._similarity = similarity
        self._skip_last = skip_last
        self._advance = advance

    @torch.inference_mode()
    def __call__(self, partition: Partition) -> dict[int, float]:
        """What each merger costs, by the number of its lower window."""
        replay = self._replay
        places = range(len(partition) - 1 - self._skip_last)
        first = next((place for place, (low, high) in enumerate(partition) if low < high), len(partition))
        states: list[Tensor] = []
        costs: dict[int, float] = {}
        for place in places:
            low, high = partition[place][0], partition[place + 1][1]
            if place <= first:
                states = [capture.inputs[low] for capture in replay.captures]
            else:
                states = replay.run(*self._layer(*partition[place - 1]), states)
            windows = [(low, high), *partition[place + 2 :]]
            try:
                similarity = replay.score((self._layer(*window) for window in windows), states, self._similarity)
                costs[place] = self._similarity.best - similarity
            except FloatingPointError:
                costs[place] = math.inf
            self._advance(f"layers {low}-{high}: {costs[place]:.4f}")
        return costs

    def _layer(self, low: int, high: int) -> tuple[int, Layer]:
        """What a window becomes, and the layer with whose arguments it is called."""
        layers = self._replay.layers
        if low == high:
            return low, layers[low]
        return MergeLayers(low, high, self._how[0]).host, merge(layers[low : high + 1], *self._how)
