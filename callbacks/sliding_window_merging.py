"""Sliding-Window Merging (arXiv 2502.19159)."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, cast

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from callbacks.base import CompressionCallback
from slm_pl.compression.architecture import num_layers
from slm_pl.compression.best_first import MergerCosts, Refit, search_best_first
from slm_pl.compression.calibration import LayerReplay, batched, sample_number
from slm_pl.compression.candidates import Candidates
from slm_pl.compression.feasibility import check_consolidation
from slm_pl.compression.least_squares import LeastSquares
from slm_pl.compression.plan import Consolidation, JSONValue, MergeLayers, OtherParameters, Plan
from slm_pl.compression.scores import (
    CKA,
    LEAST_TOKENS,
    Divergence,
    FlattenedCosine,
    Kernel,
    Likelihood,
    Similarity,
    TokenCosine,
)
from slm_pl.compression.target import check_target, layers_to_remove
from slm_pl.compression.windows import cut_windows, search_threshold, search_windows
from slm_pl.console import progress
from slm_pl.data import CalibrationSet
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FITTED_AT_ONCE = 8
"""Samples in a batch of those that candidates are fitted on."""
Row = dict[str, JSONValue]
Advance = Callable[[str], None]
Decision = tuple[Sequence[MergeLayers], list[Row], Row]
"""The windows to merge, the trace of the search, and what it ended with."""


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
    * ``mean``: Σ_{k=low..high} θ_k / (high − low + 1), their ablation "average" with the division it forgets;
    * ``least_squares``: θ_low, with ``down_proj`` refitted so that the layer does what the window did
      (:mod:`slm_pl.compression.least_squares`): ours, after an idea of ReplaceMe (https://arxiv.org/abs/2505.02819).

    ``search: best_first`` is ours, too, and greedy like SLEB's (https://arxiv.org/abs/2402.09025), which drops single
    layers: of all ways to merge a window with its neighbour, the one that costs least is taken, again and again. The
    published search walks once, from the top downward.

    Args:
        threshold: A window grows while the similarity is greater; in (-1, 1].
        remove_layers: Remove exactly so many layers, by the threshold that does. Where no threshold gives exactly so
            many, the last window is cut to fit and the plan says so (``outcome.cut_to_fit``).
        ratio: Remove this share of all parameters, to the nearest whole layer; in (0, 1).
        consolidation: Which projections the merged layer gets; ``sum`` and ``mean`` not for models with experts.
        other_parameters: Whose norms and biases it takes: ``top``, ``bottom`` as published, or their ``mean``. With
            ``least_squares`` the layer that stays keeps its own.
        search: ``top_down``, as published, or ``best_first``.
        similarity: ``cosine`` of the flattened final hidden states, as published; ``token_cosine``, the mean cosine of
            the tokens without the first of each sample; ``cka``, the centered kernel alignment of the tokens' final
            hidden states, which is blind to rotation and scale; with ``best_first`` also ``kl``, the divergence from
            the dense model's distribution of the next token, and ``loss``, the cross-entropy of the calibration text.
        kernel: Of the alignment: ``linear``, or ``rbf`` with the median distance as bandwidth.
        beam: With ``best_first``, go on with so many of the cheapest models of every size.
        least_squares: How layers are refitted.
        refit_candidates: With ``best_first`` and ``least_squares``, refit every candidate before it is scored, once as
            the lowest layer of its window and once as the highest: on three of four calibration samples, and scored on
            the fourth. Give some 64 samples.
        lazy: With ``best_first``, score a merger again only if what it added to the cost when it was last scored leaves
            it a chance to be the cheapest: several times faster, and rarely another result.
        skip_last: So many layers at the top are never merged.
        plan_path: Apply this ``plan.json`` and do not search.

    Raises:
        UsageError: If not exactly one of the three controls is given, or one is out of range.
    """

    citation = """\
@article{ding2025slidingwindow,
  title = {Sliding-Window Merging for Compacting Patch-Redundant Layers in {LLMs}},
  author = {Ding, Xuan and Sun, Rui and Zhang, Yunjian and Yan, Xiu and Zhou, Yueqi and Huang, Kaihao and Fu, Suzhong
    and Aviles-Rivero, Angelica I. and Xie, Chuanlong and Zhu, Yao},
  journal = {arXiv preprint arXiv:2502.19159},
  year = {2025}
}"""

    def __init__(
        self,
        threshold: float | None = None,
        remove_layers: int | None = None,
        ratio: float | None = None,
        consolidation: Literal["keep_top", "keep_bottom", "sum", "mean", "least_squares"] = "keep_top",
        other_parameters: OtherParameters = "top",
        search: Literal["top_down", "best_first"] = "top_down",
        similarity: Literal["cosine", "token_cosine", "cka", "kl", "loss"] = "cosine",
        kernel: Kernel = "linear",
        beam: int = 1,
        skip_last: int = 1,
        least_squares: LeastSquares = LeastSquares(),  # noqa: B008  frozen
        refit_candidates: bool = False,
        lazy: bool = False,
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
        if search == "top_down" and similarity in ("kl", "loss"):
            raise UsageError(
                f"similarity {similarity!r} has no threshold that windows grow to. Set search: best_first."
            )
        if similarity in ("kl", "loss") and threshold is not None:
            raise UsageError(f"threshold is of a similarity; {similarity!r} is none. Give remove_layers or ratio.")
        if beam < 1 or (beam > 1 and search != "best_first"):
            raise UsageError(f"beam is {beam}; with search best_first, give 1 or more. top_down has none.")
        if lazy and (search != "best_first" or beam > 1):
            raise UsageError("lazy is of search best_first with beam 1. Leave it out.")
        if consolidation == "least_squares" and other_parameters != "top":
            raise UsageError(
                f"other_parameters is {other_parameters!r}; with consolidation least_squares the layer that stays "
                "keeps its own norms and biases. Leave it out."
            )
        if refit_candidates and beam > 1:
            raise UsageError(f"beam is {beam}; with refit_candidates, one model of every size is gone on with.")
        if refit_candidates and (search, consolidation) != ("best_first", "least_squares"):
            raise UsageError(
                f"refit_candidates is of search best_first with consolidation least_squares; these are {search} and "
                f"{consolidation}. Leave it out."
            )
        self.threshold = threshold
        self.remove_layers = remove_layers
        self.ratio = ratio
        self.consolidation = consolidation
        self.other_parameters = other_parameters
        self.search = search
        self.similarity = similarity
        self.kernel = kernel
        self.beam = beam
        self.skip_last = skip_last
        self.least_squares = least_squares
        self.refit_candidates = refit_candidates
        self.lazy = lazy

    @property
    def _how(self) -> tuple[Consolidation, OtherParameters]:
        """What the plan merges with; what is refitted comes on top of it."""
        if self.consolidation == "least_squares":
            return "keep_bottom", "bottom"
        return cast(Consolidation, self.consolidation), self.other_parameters

    def plan(self, model: "PreTrainedModel", calibration: CalibrationSet) -> Plan:
        """Searches the windows; see the class."""
        check_consolidation(model, *self._how)
        if self.similarity == "cka" and calibration.shortest < LEAST_TOKENS:
            raise UsageError(
                f"similarity is 'cka', which needs samples of at least {LEAST_TOKENS} tokens; the shortest calibration "
                f"sample has {calibration.shortest}. Give longer ones, or similarity: cosine."
            )
        wanted = self._wanted(model)
        decide = self._top_down if self.search == "top_down" else self._best_first
        with progress("Searching windows") as advance:
            steps, trace, outcome = decide(model, calibration, wanted, advance)
        outcome["removed_layers"] = sum(step.high - step.low for step in steps)
        return self.make_plan(model, calibration, list(steps), trace, outcome)

    def _similarity(self, model: "PreTrainedModel") -> Similarity:
        if self.similarity == "kl":
            return Divergence(model)
        if self.similarity == "loss":
            return Likelihood(model)
        if self.similarity == "cka":
            return CKA(self.kernel)
        return FlattenedCosine() if self.similarity == "cosine" else TokenCosine()

    def _top_down(
        self, model: "PreTrainedModel", calibration: CalibrationSet, wanted: int | None, advance: Advance
    ) -> Decision:
        """The published search."""
        replay = LayerReplay(model, calibration)
        candidates = Candidates(replay, *self._how, self._similarity(model), advance)
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
            self._warn_of_nothing(max(candidates.scores.values(), default=-1.0), threshold)
        outcome: Row = {
            "threshold": threshold,
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
        trace: list[Row] = [
            {"low": t.low, "high": t.high, "similarity": t.similarity, "accepted": t.accepted, "search": number}
            for number, (_, run) in enumerate(runs)
            for t in run.tries
        ]
        return [MergeLayers(low, high, *self._how) for low, high in windows], trace, outcome

    def _best_first(
        self, model: "PreTrainedModel", calibration: CalibrationSet, wanted: int | None, advance: Advance
    ) -> Decision:
        """The search that looks everywhere."""
        samples = [sample for batch in calibration for sample in batch]
        refit = None
        ways = [MergeLayers(0, 0, *self._how)]
        if self.refit_candidates:
            if calibration.text.samples < 4:
                raise UsageError(
                    f"refit_candidates got {calibration.text.samples} calibration samples; it fits on three of four, "
                    "so it needs at least 4. Raise data.calibration.samples, to some 64."
                )
            scored_on = [sample_number(index) % 4 == 3 for index in range(len(samples))]
            learnt = batched([s for s, held in zip(samples, scored_on, strict=True) if not held], FITTED_AT_ONCE)
            samples = [s for s, held in zip(samples, scored_on, strict=True) if held]
            refit = Refit(LayerReplay(model, learnt), self.least_squares.middle_ridge)
            ways.append(MergeLayers(0, 0, "keep_top", "top"))
        scored = LayerReplay(model, batched(samples, calibration.text.batch_size))
        similarity = self._similarity(model)
        costs = MergerCosts(scored, ways, similarity, self.skip_last, refit, advance)
        limit = math.inf if self.threshold is None else similarity.best - self.threshold
        found = search_best_first(costs, len(scored.layers), wanted or self._most(model), self.beam, limit, self.lazy)
        if not found.windows:
            self._warn_of_nothing(similarity.best - found.cost, cast(float, self.threshold))
        scores = {
            "kl": "KL divergence from the dense model, nats per token",
            "loss": "negative log-likelihood with the window merged, nats per token",
        }
        outcome: Row = {
            "score": scores.get(self.similarity, f"1 - {self.similarity} to the dense model"),
            "cost": found.cost,
            "layer_forwards": scored.layer_forwards,
        }
        if refit is not None:
            outcome["fitted_layer_forwards"] = refit.replay.layer_forwards
        return found.windows, list(found.trace), outcome

    def _warn_of_nothing(self, best: float, threshold: float) -> None:
        rank_zero_warn(
            f"SlidingWindowMerging merged nothing: the best similarity seen is {best:.4f}, the threshold "
            f"{threshold}. Lower the threshold below {best:.4f}, or give remove_layers."
        )

    def _most(self, model: "PreTrainedModel") -> int:
        return num_layers(model) - 1 - self.skip_last

    def _wanted(self, model: "PreTrainedModel") -> int | None:
        """How many layers to remove, or None if the threshold decides."""
        total, most = num_layers(model), self._most(model)
        if most < 1:
            raise UsageError(
                f"The model has {total} layers and skip_last is {self.skip_last}: no window of two layers fits. "
                "Lower skip_last."
            )
        if self.remove_layers is None and self.ratio is None:
            return None
        return layers_to_remove(model, self.remove_layers, self.ratio, most, f"with skip_last {self.skip_last}")
