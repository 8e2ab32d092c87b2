"""Shortened LLaMA: one-shot removal of unimportant blocks (arXiv 2402.02834)."""

import math
from typing import TYPE_CHECKING, Literal

from callbacks.base import CompressionCallback
from slm_pl.compression.architecture import num_layers
from slm_pl.compression.importance import Importance, magnitude, taylor
from slm_pl.compression.least_squares import DropConsolidation, LeastSquares, check_drop_consolidation
from slm_pl.compression.plan import DropLayers, JSONValue, Plan
from slm_pl.compression.removal import RemovalSweep, finite, least
from slm_pl.compression.target import check_memory_budget, check_protected, check_target, removable_layers
from slm_pl.console import progress
from slm_pl.data import CalibrationSet
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = dict[str, JSONValue]


class ShortenedLLaMA(CompressionCallback):
    """Removes the decoder layers of least importance, all at once.

    Shortened LLaMA, https://arxiv.org/abs/2402.02834. The importance of a layer is one of

    * ``perplexity``: of the calibration text without the layer (their PPL);
    * ``taylor``: Σ |S|^p over the layer's weights with S = w · ∂L/∂w, where L is the mean cross-entropy of the whole
      calibration set. Samples may cancel in S; with ``per_sample`` they cannot: the mean over the samples of the sum
      with each sample's own L (their Taylor);
    * ``magnitude``: Σ |w|^p over the layer's weights (their magnitude); no calibration text is read.

    Exactly one of ``remove_layers`` and ``ratio`` is given::

        trainer:
          callbacks:
            - class_path: callbacks.ShortenedLLaMA
              init_args: {criterion: taylor, remove_layers: 6}

    The first four and the last two layers stay, as in the authors' program (its "+" heuristic); their scores are in the
    trace nevertheless. A trace row of ``taylor`` and ``magnitude`` also holds the score of every tensor.

    ``taylor`` runs layers again in the backward pass (gradient checkpointing) and keeps no gradients: above the weights
    it needs the inputs of all layers (layers × samples × tokens × hidden elements), the activations of one layer on one
    calibration batch, and the largest tensor's gradient if all samples are one batch or with ``per_sample`` (then also
    the inputs of one sample only); else the sum of one layer's gradients, in float32.

    Args:
        criterion: The importance.
        remove_layers: Remove exactly so many layers.
        ratio: Remove this share of all parameters, to the nearest whole layer; in (0, 1).
        protect_first: So many layers at the bottom stay.
        protect_last: So many layers at the top stay.
        one_shot: Score the whole model once; else remove one layer at a time and score what is left again.
        norm_power: p, of ``taylor`` and ``magnitude``.
        per_sample: Of ``taylor``: take the absolute value for each sample by itself.
        memory_budget: Of ``perplexity``: GiB of hidden states, activations and logits beside the weights, 2 if not
            given; the calibration set goes through in chunks that fit.
        consolidation: ``drop``: the layers that stay keep their weights; ``least_squares``: the one below each gap is
            refitted on ``data.fitting`` to do what was there (:mod:`slm_pl.compression.least_squares`).
        least_squares: How.
        plan_path: Apply this ``plan.json`` and do not search.

    Raises:
        UsageError: If not exactly one of the two controls is given, or an argument is out of range or has no meaning
            for the criterion.
    """

    citation = """\
@article{kim2024shortened,
  title = {Shortened {LLaMA}: Depth Pruning for Large Language Models with Comparison of Retraining Methods},
  author = {Kim, Bo-Kyeong and Kim, Geonmin and Kim, Tae-Ho and Castells, Thibault and Choi, Shinkook and Shin, Junho
    and Song, Hyoung-Kyu},
  journal = {arXiv preprint arXiv:2402.02834},
  year = {2024}
}"""

    def __init__(
        self,
        criterion: Literal["perplexity", "taylor", "magnitude"] = "perplexity",
        remove_layers: int | None = None,
        ratio: float | None = None,
        protect_first: int = 4,
        protect_last: int = 2,
        one_shot: bool = True,
        norm_power: Literal[1, 2] = 1,
        per_sample: bool = False,
        memory_budget: float | None = None,
        consolidation: DropConsolidation = "drop",
        least_squares: LeastSquares = LeastSquares(),  # noqa: B008  frozen
        plan_path: str | None = None,
    ) -> None:
        super().__init__(plan_path)
        check_drop_consolidation(consolidation)
        check_target("ShortenedLLaMA", plan_path, {"remove_layers": remove_layers, "ratio": ratio})
        check_protected(protect_first, protect_last)
        if memory_budget is not None:
            check_memory_budget(memory_budget)
            if criterion != "perplexity":
                raise UsageError(f"memory_budget is of criterion perplexity; criterion is {criterion}. Leave it out.")
        if criterion not in ("perplexity", "taylor", "magnitude"):
            raise UsageError(f"criterion is {criterion!r}; allowed are perplexity, taylor and magnitude.")
        if norm_power not in (1, 2):
            raise UsageError(f"norm_power is {norm_power}; allowed are 1 and 2.")
        if norm_power != 1 and criterion == "perplexity":
            raise UsageError("norm_power is of taylor and magnitude; criterion perplexity has none. Leave it out.")
        if per_sample and criterion != "taylor":
            raise UsageError(f"per_sample is of criterion taylor; criterion is {criterion}. Leave it out.")
        self.criterion = criterion
        self.remove_layers = remove_layers
        self.ratio = ratio
        self.protect_first = protect_first
        self.protect_last = protect_last
        self.one_shot = one_shot
        self.norm_power = norm_power
        self.per_sample = per_sample
        self.memory_budget = memory_budget
        self.consolidation = consolidation
        self.least_squares = least_squares

    @property
    def uses_calibration(self) -> bool:
        """All but ``magnitude`` do."""
        return self.criterion != "magnitude"

    def plan(self, model: "PreTrainedModel", calibration: CalibrationSet) -> Plan:
        """Scores the layers and takes the least important; see the class."""
        candidates, wanted = removable_layers(
            model, self.remove_layers, self.ratio, self.protect_first, self.protect_last
        )
        kept = list(range(num_layers(model)))
        order: list[int] = []
        trace: list[Row] = []
        power = "" if self.norm_power == 1 else "²"
        scores_of = {
            "perplexity": "perplexity without the layer",
            "taylor": f"sum of |w · ∂L/∂w|{power}",
            "magnitude": f"sum of |w|{power}",
        }
        outcome: Row = {"score": scores_of[self.criterion]}
        if self.criterion == "perplexity":
            with progress("Measuring the dense model") as advance:
                sweep = RemovalSweep(model, calibration, self.memory_budget or 2.0, advance)
            outcome["dense_score"] = finite(_perplexity(sweep.dense))
        for phase in range(1 if self.one_shot else wanted):
            # The first phase also shows how important the protected layers are.
            scored = candidates if phase else kept
            details: dict[int, Row] = {}
            if self.criterion == "perplexity":
                scores = _without_each(sweep, kept, scored)
            else:
                tensors = self._of_weights(model, calibration, kept, scored)
                scores = {layer: math.fsum(tensors[layer].values()) for layer in scored}
                details = {layer: {"tensors": {**tensors[layer]}} for layer in scored}
            gone = least({layer: scores[layer] for layer in candidates}, wanted if self.one_shot else 1)
            trace += [
                {
                    "phase": phase,
                    "layer": layer,
                    "score": finite(scores[layer]),
                    **details.get(layer, {}),
                    "removed": layer in gone,
                    "protected": layer not in candidates,
                }
                for layer in scored
            ]
            order += gone
            kept = [layer for layer in kept if layer not in gone]
            candidates = [layer for layer in candidates if layer not in gone]
        outcome |= {"order": list(order), "removed_layers": wanted}
        if self.criterion == "perplexity":
            outcome |= {"layer_forwards": sweep.layer_forwards, "head_forwards": sweep.head_forwards}
        return self.make_plan(model, calibration, [DropLayers(tuple(sorted(order)))], trace, outcome)

    def _of_weights(
        self, model: "PreTrainedModel", calibration: CalibrationSet, kept: list[int], scored: list[int]
    ) -> Importance:
        """What each tensor of each layer adds to the layer's importance."""
        if self.criterion == "magnitude":
            return magnitude(model, scored, self.norm_power)
        passes = calibration.samples if self.per_sample else 1
        with progress("Taking gradients", passes * len(kept)) as advance:
            return taylor(model, calibration, kept, self.norm_power, self.per_sample, advance)


def _without_each(sweep: RemovalSweep, kept: list[int], scored: list[int]) -> dict[int, float]:
    """By layer, the perplexity without it."""
    with progress("Removing each layer", sweep.chunks * len(scored)) as advance:
        losses = sweep.score(kept, scored, advance)
    return {layer: _perplexity(loss) for layer, loss in losses.items()}


def _perplexity(loss: float) -> float:
    """Of a mean cross-entropy in nats; a ruined model's may be beyond all numbers."""
    return math.exp(loss) if loss < 700 else math.inf
