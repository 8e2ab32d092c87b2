"""Sliding-Window Merging (arXiv 2502.19159)."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks.base import CompressionCallback
from slm_pl.compression.architecture import architecture_of, num_layers
from slm_pl.compression.calibration import Layer, LayerReplay
from slm_pl.compression.plan import Consolidation, JSONValue, MergeLayers, OtherParameters, Plan
from slm_pl.compression.scores import CKA, LEAST_TOKENS, FlattenedCosine, Kernel, Similarity
from slm_pl.compression.surgery import GrowingWindow, MergedLayer, check_consolidation, merge
from slm_pl.compression.target import check_target, layers_to_remove
from slm_pl.compression.windows import Window, cut_windows, search_threshold, search_windows
from slm_pl.console import progress
from slm_pl.data import CalibrationSet
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    As published: ``configs/parts/slm_published.yaml`` (``threshold: 0.72``, ``other_parameters: bottom``), which gives
    the merged layer the norms of the window's *bottom* layer. On SmolLM2-135M that ruins the model whatever the
    projections (README, "Which consolidation"), so ``top`` is the default here.

    With θ_low … θ_high the parameters of the window's layers, a merged layer has the projections

    * ``keep_top``: θ_high, which is what the authors' program computes;
    * ``keep_bottom``: θ_low, their ablation "delete";
    * ``sum``: θ_low + Σ_{k=low+1..high} (θ_k − θ_low), the paper's figure and LaCo's formula; for a window of two
      layers this is θ_high;
    * ``mean``: Σ_{k=low..high} θ_k / (high − low + 1), their ablation "average" with the division it forgets.

    Args:
        threshold: A window grows while the similarity is greater; in (-1, 1].
        remove_layers: Remove exactly so many layers, by the threshold that does. Where no threshold gives exactly so
            many, the last window is cut to fit and the plan says so (``outcome.cut_to_fit``).
        ratio: Remove this share of all parameters, to the nearest whole layer; in (0, 1).
        consolidation: Which projections the merged layer gets; ``sum`` and ``mean`` not for models with experts.
        other_parameters: Whose norms and biases it takes: ``top``, ``bottom`` as published, or their ``mean``.
        similarity: ``cosine`` of the flattened final hidden states, as published; or ``cka``, the centered kernel
            alignment of the tokens' final hidden states, which is blind to rotation and scale.
        kernel: Of the alignment: ``linear``, or ``rbf`` with the median distance as bandwidth.
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
        similarity: Literal["cosine", "cka"] = "cosine",
        kernel: Kernel = "linear",
        skip_last: int = 1,
        plan_path: str | None = None,
    ) -> None:
        super().__init__(plan_path)
        controls = {"threshold": threshold, "remove_layers": remove_layers, "ratio": ratio}
        check_target("SlidingWindowMerging", plan_path, controls)
        if threshold is not None and not -1 < threshold <= 1:
            raise UsageError(f"threshold is {threshold}; a similarity threshold is in (-1, 1]. Published: 0.72.")
        if skip_last < 0:
            raise UsageError(f"skip_last is {skip_last}; give 0 or more layers (published: 1).")
        if kernel != "linear" and similarity != "cka":
            raise UsageError(f"kernel is {kernel!r}, but similarity {similarity!r} has no kernel. Set similarity: cka.")
        self.threshold = threshold
        self.remove_layers = remove_layers
        self.ratio = ratio
        self.consolidation = consolidation
        self.other_parameters = other_parameters
        self.similarity = similarity
        self.kernel = kernel
        self.skip_last = skip_last

    def plan(self, model: "PreTrainedModel", calibration: CalibrationSet) -> Plan:
        """Searches the windows; see the class."""
        check_consolidation(model, self.consolidation, self.other_parameters)
        if self.similarity == "cka" and calibration.shortest < LEAST_TOKENS:
            raise UsageError(
                f"similarity is 'cka', which needs samples of at least {LEAST_TOKENS} tokens; the shortest calibration "
                f"sample has {calibration.shortest}. Give longer ones, or similarity: cosine."
            )
        wanted = self._wanted(model)
        similarity: Similarity = FlattenedCosine() if self.similarity == "cosine" else CKA(self.kernel)
        with progress("Searching windows") as advance:
            replay = LayerReplay(model, calibration)
            candidates = Candidates(model, replay, self.consolidation, self.other_parameters, similarity, advance)
            total = len(replay.layers)
            if wanted is None:
                assert self.threshold is not None
                threshold = self.threshold
                search = search_windows(candidates.score, total, threshold, self.skip_last)
                runs = [(threshold, search)]
            else:
                search, threshold, runs = search_threshold(candidates.score, total, wanted, self.skip_last)
        windows = search.windows if wanted is None else cut_windows(search.windows, wanted)
        if not windows:
            best = max(candidates.scores.values(), default=-1.0)
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
        total = num_layers(model)
        most = total - 1 - self.skip_last
        if most < 1:
            raise UsageError(
                f"The model has {total} layers and skip_last is {self.skip_last}: no window of two layers fits. "
                "Lower skip_last."
            )
        if self.remove_layers is None and self.ratio is None:
            return None
        return layers_to_remove(model, self.remove_layers, self.ratio, most, f"with skip_last {self.skip_last}")


class Candidates:
    """Scores candidate models, none of them twice, by replaying the layers from the lowest window up.

    The window that grows is updated in place. Windows above it that are settled are merged again whenever their turn
    comes, a fraction of the work of one layer. So at most two merged layers are in memory, whatever the number of
    windows: the one that grows, and a settled one while it is run.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        replay: LayerReplay,
        consolidation: Consolidation,
        other_parameters: OtherParameters,
        similarity: Similarity,
        advance: Callable[[str], None],
    ) -> None:
        self.scores: dict[tuple[tuple[Window, ...], int, int], float] = {}
        self._replay = replay
        self._how = (consolidation, other_parameters, architecture_of(model))
        self._similarity = similarity
        self._advance = advance
        self._growing: GrowingWindow | None = None
        self._grown: Window = (0, 0)

    def score(self, windows: tuple[Window, ...], low: int, high: int) -> float:
        """Similarity of the dense model and the one with ``windows`` and the window ``low..high`` below them merged."""
        key = (windows, low, high)
        if key not in self.scores:
            candidate = self._layers(self._grow(low, high), windows, high)
            self.scores[key] = self._replay.score(candidate, low, self._similarity)
            self._advance(f"layers {low}-{high}: {self.scores[key]:.4f}")
        return self.scores[key]

    def _grow(self, low: int, high: int) -> MergedLayer:
        layers = self._replay.layers
        if self._growing is None or self._grown[1] != high or self._grown[0] < low:
            self._growing, self._grown = GrowingWindow(layers[high], *self._how), (high, high)
        for below in range(self._grown[0] - 1, low - 1, -1):
            self._growing.grow(layers[below])
        self._grown = (low, high)
        return self._growing.layer()

    def _layers(self, lowest: MergedLayer, windows: tuple[Window, ...], high: int) -> Iterator[tuple[int, Layer]]:
        """The candidate's layers from the lowest window up, each made when its turn comes."""
        layers = self._replay.layers

        def origin(low: int, high: int) -> int:
            return MergeLayers(low, high, self._how[0]).host

        yield origin(self._grown[0], high), lowest
        del lowest
        above = high + 1
        for window_low, window_high in reversed(windows):
            for layer in range(above, window_low):
                yield layer, layers[layer]
            yield origin(window_low, window_high), merge(layers[window_low : window_high + 1], *self._how)
            above = window_high + 1
        for layer in range(above, len(layers)):
            yield layer, layers[layer]
