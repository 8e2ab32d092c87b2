"""SLEB: removing redundant blocks one by one (arXiv 2402.09025)."""

from typing import TYPE_CHECKING

from callbacks.base import CompressionCallback
from slm_pl.compression.architecture import num_layers
from slm_pl.compression.least_squares import DropConsolidation, LeastSquares, check_drop_consolidation
from slm_pl.compression.plan import DropLayers, JSONValue, Plan
from slm_pl.compression.removal import RemovalSweep, finite, least
from slm_pl.compression.target import check_memory_budget, check_protected, check_target, removable_layers
from slm_pl.console import progress
from slm_pl.data import CalibrationSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SLEB(CompressionCallback):
    """Removes, again and again, the decoder layer that the model as it is by then misses least.

    SLEB, https://arxiv.org/abs/2402.09025. In each phase every layer that may go is removed by
    itself from what earlier phases left; the one without which the negative log-likelihood of the calibration text is
    lowest goes for good. Of equals the lowest goes.

    Exactly one of ``remove_layers`` and ``ratio`` is given::

        trainer:
          callbacks:
            - class_path: callbacks.SLEB
              init_args: {remove_layers: 6}

    The published setting calibrates on 128 texts of WikiText-2, joined and cut into windows of 2048 tokens::

        data:
          calibration:
            source: Salesforce/wikitext
            name: wikitext-2-raw-v1
            sampling: stream
            samples: 128
            sequence_length: 2048

    A trace row holds the mean negative log-likelihood per token, in nats; null where it is not finite.

    A phase with n layers left runs about n²/2 layers for every sample, half of what full passes take, whatever the
    number of samples; under several processes, each sweeps its share of them.

    Args:
        remove_layers: Remove exactly so many layers.
        ratio: Remove this share of all parameters, to the nearest whole layer; in (0, 1).
        protect_first: So many layers at the bottom stay.
        protect_last: So many layers at the top stay.
        memory_budget: GiB of hidden states, activations and logits beside the weights; the calibration set goes
            through in chunks that fit.
        consolidation: ``drop``: the layers that stay keep their weights; ``least_squares``: the one below each gap is
            refitted on ``data.fitting`` to do what was there (:mod:`slm_pl.compression.least_squares`).
        least_squares: How.
        plan_path: Apply this ``plan.json`` and do not search.

    Raises:
        UsageError: If not exactly one of the two controls is given, or an argument is out of range.
    """

    citation = """\
@inproceedings{song2024sleb,
  title = {{SLEB}: Streamlining {LLMs} through Redundancy Verification and Elimination of Transformer Blocks},
  author = {Song, Jiwon and Oh, Kyungseok and Kim, Taesu and Kim, Hyungjun and Kim, Yulhwa and Kim, Jae-Joon},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  note = {arXiv:2402.09025}
}"""

    def __init__(
        self,
        remove_layers: int | None = None,
        ratio: float | None = None,
        protect_first: int = 1,
        protect_last: int = 1,
        memory_budget: float = 2.0,
        consolidation: DropConsolidation = "drop",
        least_squares: LeastSquares = LeastSquares(),  # noqa: B008  frozen
        plan_path: str | None = None,
    ) -> None:
        super().__init__(plan_path)
        check_drop_consolidation(consolidation)
        check_target("SLEB", plan_path, {"remove_layers": remove_layers, "ratio": ratio})
        check_protected(protect_first, protect_last)
        check_memory_budget(memory_budget)
        self.remove_layers = remove_layers
        self.ratio = ratio
        self.protect_first = protect_first
        self.protect_last = protect_last
        self.memory_budget = memory_budget
        self.consolidation = consolidation
        self.least_squares = least_squares

    def plan(self, model: "PreTrainedModel", calibration: CalibrationSet) -> Plan:
        """Searches greedily; see the class."""
        candidates, wanted = removable_layers(
            model, self.remove_layers, self.ratio, self.protect_first, self.protect_last
        )
        with progress("Measuring the dense model") as advance:
            sweep = RemovalSweep(model, calibration, self.memory_budget, advance)
        kept = list(range(num_layers(model)))
        order: list[int] = []
        trace: list[dict[str, JSONValue]] = []
        steps = sweep.chunks * sum(len(candidates) - phase for phase in range(wanted))
        with progress(f"Removing {wanted} layers", steps) as advance:
            for phase in range(wanted):
                scores = sweep.score(kept, candidates, advance)
                (gone,) = least(scores, 1)
                trace += [
                    {"phase": phase, "layer": layer, "score": finite(score), "removed": layer == gone}
                    for layer, score in scores.items()
                ]
                order.append(gone)
                kept.remove(gone)
                candidates.remove(gone)
        outcome: dict[str, JSONValue] = {
            "score": "negative log-likelihood without the layer, nats per token",
            "dense_score": sweep.dense,
            "order": list(order),
            "removed_layers": wanted,
            "layer_forwards": sweep.layer_forwards,
            "head_forwards": sweep.head_forwards,
        }
        return self.make_plan(model, calibration, [DropLayers(tuple(sorted(order)))], trace, outcome)
