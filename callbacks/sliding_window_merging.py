"""Sliding-Window Merging (arXiv 2502.19159)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks.base import CompressionCallback
from slm_pl.compression.architecture import architecture_of, decoder_layers
from slm_pl.compression.calibration import Layer, LayerReplay
from slm_pl.compression.plan import Consolidation, JSONValue, MergeLayers, OtherParameters, Plan, count_parameters
from slm_pl.compression.scores import flattened_cosine
from slm_pl.compression.surgery import merge
from slm_pl.console import progress
from slm_pl.data import CalibrationSet
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Window = tuple[int, int]
"""Decoder layers ``low..high``, both included, numbered as in the dense model."""
Score = Callable[[tuple[Window, ...], int, int], float]
"""Similarity of the dense model and the one with these windows merged and ``low..high`` merged, too."""


@dataclass(frozen=True)
class Try:
    """One candidate window, compared with the threshold."""

    low: int
    high: int
    similarity: float
    accepted: bool


@dataclass(frozen=True)
class Search:
    """What one threshold leads to.

    Attributes:
        windows: The windows to merge, in the order they were found (from the top down).
        tries: Every comparison.
        lower: Largest similarity that was rejected: down to this threshold the search goes the same way.
        upper: Smallest similarity that was accepted: below this threshold the search goes the same way.
        stopped: It was given up when it was clear that more (``"above"``) or fewer (``"below"``) layers than wanted
            would go.
    """

    windows: tuple[Window, ...]
    tries: tuple[Try, ...]
    lower: float
    upper: float
    stopped: str | None = None

    @property
    def removed(self) -> int:
        """Layers that merging the windows removes."""
        return sum(high - low for low, high in self.windows)


def search_windows(
    score: Score, num_layers: int, threshold: float, skip_last: int = 1, wanted: int | None = None
) -> Search:
    """Grows windows downward from the top while the merged model stays similar to the dense one.

    Algorithm 1 of arXiv 2502.19159 as the authors' program runs it: a window is anchored at ``high`` and grows by one
    layer while the similarity is > ``threshold``; when it fails, the window before is kept and the next one starts at
    the layer that failed; a window of one layer moves down by one. Unlike the program, a window that is still open at
    layer 0 is kept, and a committed model is not tried a second time.

    Args:
        score: Similarity of a candidate.
        num_layers: Decoder layers of the dense model.
        threshold: A candidate is accepted if its similarity is greater.
        skip_last: So many layers at the top are never merged.
        wanted: Give up as soon as it is certain that not exactly so many layers are removed.
    """
    windows: tuple[Window, ...] = ()
    tries: list[Try] = []
    removed = 0
    high = num_layers - 1 - skip_last
    low = high - 1
    stopped = None
    while low >= 0:
        similarity = score(windows, low, high)
        accepted = similarity > threshold
        tries.append(Try(low, high, similarity, accepted))
        if accepted:
            low -= 1
        else:
            if low + 1 < high:
                windows += ((low + 1, high),)
                removed += high - low - 1
            high = low
            low = high - 1
        if wanted is not None:
            at_least, at_most = removed + high - low - 1, removed + high
            if at_least > wanted or at_most < wanted:
                stopped = "above" if at_least > wanted else "below"
                break
    if low + 1 < high:
        windows += ((low + 1, high),)
    return Search(
        windows,
        tuple(tries),
        lower=max((t.similarity for t in tries if not t.accepted), default=-1.0),
        upper=min((t.similarity for t in tries if t.accepted), default=1.0),
        stopped=stopped,
    )


def search_threshold(
    score: Score, num_layers: int, wanted: int, skip_last: int = 1
) -> tuple[Search, float, list[tuple[float, Search]]]:
    """Finds a threshold at which exactly ``wanted`` layers are removed, if there is one.

    A search goes the same way for every threshold in its ``[lower, upper)``, so one run settles a whole interval. The
    number removed falls with the threshold, but not strictly so: bisection finds the step that crosses ``wanted``, and
    if that step jumps over it, all other intervals are tried, from the step outward. Only if none is exact, the search
    at the greatest threshold that removes more is taken, to be ended by :func:`cut_windows`.

    Returns:
        The search, its threshold, and all searches in order. If no threshold is exact, the ``removed`` of the search
        is greater than ``wanted``.
    """
    runs: list[tuple[float, Search]] = []

    def run(threshold: float) -> Search:
        for _, known in runs:
            if known.lower <= threshold < known.upper:
                return known
        runs.append((threshold, search_windows(score, num_layers, threshold, skip_last, wanted)))
        return runs[-1][1]

    low, high = -2.0, 1.0  # below -1 every window is accepted, so the side that removes more is always met
    while low < high:
        threshold = (low + high) / 2
        search = run(threshold)
        if search.stopped is None:
            return search, threshold, runs
        if search.stopped == "above":
            low = search.upper
        else:
            high = search.lower
    down, up = math.nextafter(low, -2.0), high
    while -1 <= down < 1 or -1 <= up < 1:
        for threshold in (up, down):
            if -1 <= threshold < 1:
                search = run(threshold)
                if search.stopped is None:
                    return search, threshold, runs
                up = search.upper if threshold == up else up
                down = math.nextafter(search.lower, -2.0) if threshold == down else down
    threshold, search = max((tried for tried in runs if tried[1].stopped == "above"), key=lambda tried: tried[0])
    return search, threshold, runs


def cut_windows(windows: tuple[Window, ...], wanted: int) -> tuple[Window, ...]:
    """Shrinks the last windows from below until exactly ``wanted`` layers are removed."""
    kept: list[Window] = []
    for low, high in windows:
        room = wanted - sum(top - bottom for bottom, top in kept)
        if room > 0:
            kept.append((max(low, high - room), high))
    return tuple(kept)


class SlidingWindowMerging(CompressionCallback):
    """Merges runs of consecutive decoder layers that do nearly the same thing into one layer each.

    Sliding-Window Merging, https://arxiv.org/abs/2502.19159. From the top of the model downward, a window of layers
    grows while the final hidden states of the merged model stay similar to the dense model's on calibration text.

    Exactly one of ``threshold``, ``remove_layers`` and ``ratio`` is given::

        trainer:
          callbacks:
            - class_path: callbacks.SlidingWindowMerging
              init_args:
                remove_layers: 6

    As published: ``threshold: 0.72``, ``other_parameters: bottom``. That gives the merged layer the norms of the
    window's *bottom* layer, which do not fit the projections of its top layer. On SmolLM2-135M this ruins the model
    (README, "What the published setting does"), so ``top`` is the default here.

    Args:
        threshold: A window grows while the cosine of the flattened final hidden states is greater; in (-1, 1].
        remove_layers: Remove exactly so many layers, by the threshold that does. Where no threshold gives exactly so
            many, the last window is cut to fit and the plan says so (``outcome.cut_to_fit``).
        ratio: Remove this share of all parameters, to the nearest whole layer; in (0, 1).
        consolidation: How a window becomes one layer. ``keep_top``: the projections of its top layer, which is what the
            authors' program computes.
        other_parameters: Whose norms and biases the merged layer takes: ``top``, or ``bottom`` as published.
        skip_last: So many layers at the top are never merged.
        plan_path: Apply this ``plan.json`` and do not search.

    Raises:
        UsageError: If not exactly one of the three controls is given, or one is out of range.
    """

    def __init__(
        self,
        threshold: float | None = None,
        remove_layers: int | None = None,
        ratio: float | None = None,
        consolidation: Consolidation = "keep_top",
        other_parameters: OtherParameters = "top",
        skip_last: int = 1,
        plan_path: str | None = None,
    ) -> None:
        super().__init__(plan_path)
        controls = {"threshold": threshold, "remove_layers": remove_layers, "ratio": ratio}
        given = [f"{name}={value}" for name, value in controls.items() if value is not None]
        if len(given) > 1 or (not given and plan_path is None):
            raise UsageError(
                f"SlidingWindowMerging got {' and '.join(given) or 'none of threshold, remove_layers and ratio'}; give "
                "exactly one of threshold, remove_layers, ratio (or plan_path)."
            )
        if threshold is not None and not -1 < threshold <= 1:
            raise UsageError(f"threshold is {threshold}; a cosine threshold is in (-1, 1]. Published: 0.72.")
        if remove_layers is not None and remove_layers < 1:
            raise UsageError(f"remove_layers is {remove_layers}; give at least 1.")
        if ratio is not None and not 0 < ratio < 1:
            raise UsageError(f"ratio is {ratio}; it is a share of all parameters, in (0, 1). For 20 % give 0.2.")
        if skip_last < 0:
            raise UsageError(f"skip_last is {skip_last}; give 0 or more layers (published: 1).")
        self.threshold = threshold
        self.remove_layers = remove_layers
        self.ratio = ratio
        self.consolidation = consolidation
        self.other_parameters = other_parameters
        self.skip_last = skip_last

    def plan(self, model: "PreTrainedModel", calibration: CalibrationSet) -> Plan:
        """Searches the windows; see the class."""
        architecture = architecture_of(model)
        num_layers = len(decoder_layers(model))
        wanted = self._wanted(model)
        with progress("Searching windows") as advance:
            replay = LayerReplay(model, calibration)
            known: dict[tuple[tuple[Window, ...], int, int], float] = {}

            def merged(low: int, high: int) -> Layer:
                return merge(replay.layers[low : high + 1], self.consolidation, self.other_parameters, architecture)

            def score(windows: tuple[Window, ...], low: int, high: int) -> float:
                key = (windows, low, high)
                if key not in known:
                    candidate: list[tuple[int, Layer]] = [(high, merged(low, high))]
                    above = high + 1
                    for window_low, window_high in reversed(windows):
                        candidate += [(layer, replay.layers[layer]) for layer in range(above, window_low)]
                        candidate.append((window_high, merged(window_low, window_high)))
                        above = window_high + 1
                    candidate += [(layer, replay.layers[layer]) for layer in range(above, num_layers)]
                    known[key] = replay.score(candidate, low, flattened_cosine)
                    advance(f"layers {low}-{high}: {known[key]:.4f}")
                return known[key]

            if wanted is None:
                assert self.threshold is not None
                threshold = self.threshold
                search = search_windows(score, num_layers, threshold, self.skip_last)
                runs = [(threshold, search)]
            else:
                search, threshold, runs = search_threshold(score, num_layers, wanted, self.skip_last)
        windows = search.windows if wanted is None else cut_windows(search.windows, wanted)
        if not windows:
            best = max(known.values(), default=-1.0)
            rank_zero_warn(
                f"SlidingWindowMerging merged nothing: the best similarity seen is {best:.4f}, the threshold "
                f"{threshold}. Lower the threshold below {best:.4f}, or give remove_layers."
            )
        outcome: dict[str, JSONValue] = {
            "threshold": threshold,
            "removed_layers": sum(high - low for low, high in windows),
            "search": next(number for number, (_, run) in enumerate(runs) if run is search),
            "cut_to_fit": windows != search.windows,
            "layer_forwards": replay.layer_forwards,
            "searches": [
                {
                    "threshold": tried,
                    "removed_layers": run.removed,
                    "stopped": run.stopped,
                    "valid_from": run.lower,
                    "valid_below": run.upper,
                }
                for tried, run in runs
            ],
        }
        trace: list[dict[str, JSONValue]] = [
            {"low": t.low, "high": t.high, "similarity": t.similarity, "accepted": t.accepted, "search": number}
            for number, (_, run) in enumerate(runs)
            for t in run.tries
        ]
        steps = [MergeLayers(low, high, self.consolidation, self.other_parameters) for low, high in windows]
        return self.make_plan(model, calibration, list(steps), trace, outcome)

    def _wanted(self, model: "PreTrainedModel") -> int | None:
        """How many layers to remove, or None if the threshold decides."""
        layers = decoder_layers(model)
        most = len(layers) - 1 - self.skip_last
        if most < 1:
            raise UsageError(
                f"The model has {len(layers)} layers and skip_last is {self.skip_last}: no window of two layers fits. "
                "Lower skip_last."
            )
        if self.ratio is not None:
            wanted = round(self.ratio / layers_share(model, 1))
            got = f"ratio {self.ratio} means {wanted} of {len(layers)} layers"
        elif self.remove_layers is not None:
            wanted = self.remove_layers
            got = f"remove_layers is {wanted}, the model has {len(layers)} layers"
        else:
            return None
        if not 1 <= wanted <= most:
            raise UsageError(
                f"{got}; with skip_last {self.skip_last}, 1 to {most} layers can be removed "
                f"(ratio {layers_share(model, 1):.3f} to {layers_share(model, most):.3f})."
            )
        return wanted


def layers_share(model: "PreTrainedModel", removed: int) -> float:
    """The share of all parameters in ``removed`` decoder layers of average size."""
    layers = decoder_layers(model)
    return removed * count_parameters(layers) / len(layers) / count_parameters(model)
