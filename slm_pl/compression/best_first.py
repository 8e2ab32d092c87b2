"""A search that looks everywhere: again and again, the cheapest way to merge a window with its neighbour.

Greedy removal of the layer that is missed least is SLEB's idea (https://arxiv.org/abs/2402.09025). Ours are that it
merges, with every consolidation and score of this project, the walk in which no candidate runs what lies below it, and
that it can refit each candidate by least squares before it is scored.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from slm_pl.compression.architecture import architecture_of
from slm_pl.compression.calibration import Layer, LayerReplay, mean_over_ranks
from slm_pl.compression.normal_equations import NormalEquations, fitted_outputs
from slm_pl.compression.plan import JSONValue, MergeLayers
from slm_pl.compression.scores import Similarity
from slm_pl.compression.surgery import MergedLayer, merge

PORTION = 4
"""How many candidates a lazy search scores in one walk."""
Partition = tuple[MergeLayers, ...]
"""The layers of the dense model cut into windows, from the bottom up; a layer by itself is a window of one."""
Merger = tuple[int, MergeLayers]
"""Of a partition: the number of the lower of two neighbouring windows, and what the two become."""


class Costs(Protocol):
    """What a search asks."""

    @property
    def dense(self) -> float:
        """What the dense model costs."""

    def mergers(self, partition: Partition) -> list[Merger]:
        """All ways to go on."""

    def __call__(self, partition: Partition, mergers: Collection[Merger]) -> dict[Merger, float]:
        """What these cost; infinite if one ruins the model."""


@dataclass(frozen=True)
class Found:
    """What a search ends with.

    Attributes:
        windows: Those of more than one layer, from the bottom up.
        cost: Of the model with them merged; where the limit ended the search, of the cheapest merger refused.
        trace: Every candidate that was scored: ``phase``, first layer (``layer``) and last (``high``) of the window it
            would make, how (``consolidation``), its cost (``score``), and whether it was taken (``removed``); with a
            beam, also ``of``, the number of the partition that it belongs to.
    """

    windows: Partition
    cost: float
    trace: tuple[dict[str, JSONValue], ...]


def search_best_first(
    costs: Costs, num_layers: int, wanted: int, beam: int = 1, limit: float = math.inf, lazy: bool = False
) -> Found:
    """Merges the neighbouring windows whose merger costs least, until so many layers are gone or it costs too much.

    Of equal costs the first is taken.

    Args:
        costs: Scores the ways to go on.
        num_layers: Decoder layers of the dense model.
        wanted: How many are to go.
        beam: How many of the cheapest partitions of every size to go on with.
        limit: A merger is taken if it costs less.
        lazy: Score again only what :func:`_lazily` does.

    Raises:
        FloatingPointError: If every way to go on ruins the model.
    """
    kept: list[Partition] = [tuple(MergeLayers(layer, layer) for layer in range(num_layers))]
    cost = costs.dense if lazy else math.nan  # only then is it asked for before the first merger
    added: dict[MergeLayers, float] = {}
    trace: list[dict[str, JSONValue]] = []
    for phase in range(wanted):
        tried: dict[Partition, float] = {}
        rows: list[tuple[Partition, dict[str, JSONValue]]] = []
        for number, partition in enumerate(kept):
            scored = _lazily(costs, partition, cost, added) if lazy else costs(partition, costs.mergers(partition))
            for (place, window), found in scored.items():
                merged = (*partition[:place], window, *partition[place + 2 :])
                row: dict[str, JSONValue] = {"phase": phase, "layer": window.low, "high": window.high}
                row |= {"consolidation": window.consolidation, "score": found if math.isfinite(found) else None}
                rows.append((merged, row | ({"of": number} if beam > 1 else {})))
                tried.setdefault(merged, found)
        cheapest = sorted((p for p, found in tried.items() if math.isfinite(found)), key=tried.__getitem__)[:beam]
        if not cheapest:
            raise FloatingPointError(
                f"Whatever two windows are merged after {phase} layers, hidden states are not finite. float16 "
                "overflows above 65,504: load the model with --model.dtype bfloat16 or float32."
            )
        cost = tried[cheapest[0]]
        going_on = [partition for partition in cheapest if tried[partition] < limit]
        trace += [row | {"removed": partition in going_on} for partition, row in rows]
        if not going_on:
            break
        kept = going_on
    return Found(tuple(window for window in kept[0] if window.low < window.high), cost, tuple(trace))


def _lazily(costs: Costs, partition: Partition, cost: float, added: dict[MergeLayers, float]) -> dict[Merger, float]:
    """Scores mergers in the order of what they added when they were last scored, as long as one may be the cheapest.

    What a merger adds to the cost rarely falls when others are made before it. If it never did, the cheapest would be
    found for certain (lazy greedy: Minoux 1978, https://doi.org/10.1007/BFb0006528).

    Args:
        costs: Scores the ways to go on.
        partition: Where they go on from.
        cost: Of the partition.
        added: By window, what it added to the cost of the partition that it was last scored with; is kept up to date.
    """
    scored: dict[Merger, float] = {}
    waiting = sorted(costs.mergers(partition), key=lambda merger: added.get(merger[1], -math.inf))
    while waiting:
        expected = cost + added.get(waiting[0][1], -math.inf)
        if scored and min(scored.values()) <= expected:
            break
        new = sum(merger[1] not in added for merger in waiting)
        portion, waiting = waiting[: max(new, PORTION)], waiting[max(new, PORTION) :]
        found = costs(partition, portion)
        scored |= found
        added |= {window: value - cost for (_, window), value in found.items()}
    return scored


@dataclass(frozen=True)
class Refit:
    """How candidates are refitted before they are scored.

    Attributes:
        replay: Of the text that they are fitted on.
        ridge: λ, see :mod:`slm_pl.compression.least_squares`.
    """

    replay: LayerReplay
    ridge: float


class MergerCosts:
    """Scores all mergers of neighbouring windows in one walk up the model.

    The states below a merger are those of the partition itself. So the walk carries them along, and only the merged
    layer and what lies above it is run for each candidate: with n windows about n²/2 layers for every sample, half of
    what full passes take. Below the first window of several layers the states are the dense model's, which the replay
    has. With refits, the text that they are fitted on goes up with the walk, each candidate runs its one layer on it
    and solves once, and so does each window of the partition that the walk comes by. A lazy search walks once for every
    portion of its candidates.

    Args:
        replay: Of the calibration text.
        ways: What may become of a window: each merger is tried in all of them.
        similarity: Of the final hidden states; what it lacks is the cost.
        skip_last: So many layers at the top are not merged.
        refit: Refit what the MLP of a merged layer writes, toward the dense state behind its window.
        advance: Called after each candidate.
    """

    def __init__(
        self,
        replay: LayerReplay,
        ways: Sequence[MergeLayers],
        similarity: Similarity,
        skip_last: int,
        refit: Refit | None = None,
        advance: Callable[[str], None] = lambda note: None,
    ) -> None:
        self._replay, self._similarity, self._skip_last = replay, similarity, skip_last
        self._ways, self._refit, self._advance = ways, refit, advance
        self._architecture = architecture_of(replay.model)
        self._fitted: dict[MergeLayers, MergedLayer] = {}  # windows of the partition, and one that is scored
        self._partition: Partition = ()
        self._cheapest: tuple[float, MergeLayers, MergedLayer] | None = None  # of its mergers

    @property
    def dense(self) -> float:
        """That of the dense model: what the similarity of a model with itself lacks."""
        finals = [(capture.final, capture.ids) for capture in self._replay.captures]
        rows = [row for final, ids in finals for row in self._similarity.statistics(final, final, ids).tolist()]
        return self._similarity.best - self._similarity.combine(mean_over_ranks(rows))

    def mergers(self, partition: Partition) -> list[Merger]:
        """All of neighbouring windows, in all ways."""
        return [
            (place, MergeLayers(lower.low, upper.high, way.consolidation, way.other_parameters))
            for place, (lower, upper) in enumerate(pairwise(partition[: len(partition) - self._skip_last]))
            for way in self._ways
        ]

    @torch.inference_mode()
    def __call__(self, partition: Partition, mergers: Collection[Merger]) -> dict[Merger, float]:
        """Scores these mergers of a partition."""
        if partition != self._partition:
            # A fit stands until a walk comes by its window. Of the mergers, only the one that was made is remembered.
            if self._cheapest is not None:
                self._fitted[self._cheapest[1]] = self._cheapest[2]
            self._fitted = {window: layer for window, layer in self._fitted.items() if window in partition}
            self._partition, self._cheapest = partition, None
        first = next((place for place, window in enumerate(partition) if window.low < window.high), len(partition))
        replays = [self._replay] + ([self._refit.replay] if self._refit is not None else [])
        states: list[list[Tensor]] = []
        costs: dict[Merger, float] = {}
        for place in range(max(place for place, _ in mergers) + 1):
            if place <= first:
                low = partition[place].low
                states = [[capture.inputs[low] for capture in replay.captures] for replay in replays]
            else:
                below = partition[place - 1]
                if self._refit is not None and below.low < below.high:
                    self._fitted[below] = self._fit(below, states[-1], self._refit)
                origin, layer = self._layer(below)
                states = [replay.run(origin, layer, own) for replay, own in zip(replays, states, strict=True)]
            for merger in mergers:
                if merger[0] != place:
                    continue
                window = merger[1]
                if self._refit is not None:
                    self._fitted[window] = self._fit(window, states[-1], self._refit)
                windows = (window, *partition[place + 2 :])
                try:
                    found = self._replay.score((self._layer(w) for w in windows), states[0], self._similarity)
                    costs[merger] = self._similarity.best - found
                except FloatingPointError:
                    costs[merger] = math.inf
                refitted = self._fitted.pop(window, None)
                if refitted is not None and (self._cheapest is None or costs[merger] < self._cheapest[0]):
                    self._cheapest = costs[merger], window, refitted
                self._advance(f"layers {window.low}-{window.high}: {costs[merger]:.4f}")
        return costs

    def _layer(self, window: MergeLayers) -> tuple[int, Layer]:
        """What a window becomes, and the layer with whose arguments it is called."""
        if window.low == window.high:
            return window.low, self._replay.layers[window.low]
        return window.host, self._fitted.get(window) or self._merged(window)

    def _merged(self, window: MergeLayers) -> MergedLayer:
        layers = self._replay.layers[window.low : window.high + 1]
        return merge(layers, window.consolidation, window.other_parameters, self._architecture)

    def _fit(self, window: MergeLayers, states: Sequence[Tensor], refit: Refit) -> MergedLayer:
        """The merged layer, refitted on the states that reach it."""
        layer = self._merged(window)
        outputs = fitted_outputs(self._replay.model, window.host, "mlp")
        if not outputs:
            return layer
        equations = NormalEquations(outputs[0][1])
        for hidden, capture in zip(states, refit.replay.captures, strict=True):
            target = [*capture.inputs, capture.output][window.high + 1]
            equations.observe(layer, hidden, capture.arguments[window.host], target)
        refit.replay.layer_forwards += 1
        equations.over_ranks()
        return equations.refitted(layer, refit.ridge)[0]
