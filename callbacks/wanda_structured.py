"""Wanda on whole structures, layer after layer (Wanda-sp)."""

import functools
from typing import TYPE_CHECKING

from torch import Tensor

from callbacks.base import CompressionCallback
from callbacks.flap import FLAP
from slm_pl.compression.allotment import equal_share, lowest_in_each, removed_parameters, wanted_parameters
from slm_pl.compression.architecture import decoder_layers, num_layers
from slm_pl.compression.calibration import Arguments, capture, run_layers
from slm_pl.compression.fluctuation import InputStatistics, check_finite, watch, weighted_norm
from slm_pl.compression.plan import JSONValue, Plan
from slm_pl.compression.structures import Key, masked, structures, weight_of
from slm_pl.compression.target import check_target
from slm_pl.compression.unit_scores import Scores
from slm_pl.compression.width_plans import achieved, kept_steps, kept_trace
from slm_pl.console import progress
from slm_pl.data import CalibrationSet
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WandaStructured(CompressionCallback):
    """Removes the attention units and MLP channels of small weights and small inputs, layer after layer.

    Wanda, https://arxiv.org/abs/2306.11695, on whole structures, as the authors of FLAP
    (https://arxiv.org/abs/2312.11983) compare with and their released script runs: a channel c that goes into an output
    map with the weight W is worth mean |W_c| · ‖x_c‖, a unit the sum over its channels. Each layer is measured on what
    the layers below give after they were pruned; all lose the same share::

        trainer:
          callbacks:
            - class_path: callbacks.WandaStructured
              init_args: {ratio: 0.2}

    Args:
        ratio: Remove this share of all parameters, exact to one unit; in (0, 1).
        plan_path: Apply this ``plan.json`` and do not search.

    Raises:
        UsageError: If ``ratio`` is missing or out of range.
    """

    citation = f"""\
@article{{sun2023wanda,
  title = {{A Simple and Effective Pruning Approach for Large Language Models}},
  author = {{Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico}},
  journal = {{arXiv preprint arXiv:2306.11695}},
  year = {{2023}}
}}

{FLAP.citation}"""

    computes_with_weights = True

    def __init__(self, ratio: float | None = None, plan_path: str | None = None) -> None:
        super().__init__(plan_path)
        check_target("WandaStructured", plan_path, {"ratio": ratio})
        self.ratio = ratio

    def plan(self, model: "PreTrainedModel", calibration: CalibrationSet) -> Plan:
        """Measures and prunes layer after layer; see the class."""
        assert self.ratio is not None
        units = structures(model, range(num_layers(model)))
        if not units:
            raise UsageError(f"No {model.config.model_type} layer of this model has units that can be removed.")
        counts = equal_share(units, wanted_parameters(model, self.ratio, units))
        layers = list(decoder_layers(model))
        hidden: list[Tensor] = []
        arguments: list[list[Arguments]] = []
        for ids in calibration:
            seen = capture(model, ids, only_first=True)
            hidden.append(seen.inputs[0])
            arguments.append(seen.arguments)
        scores: Scores = {}
        kept: dict[Key, list[int]] = {}
        with progress("Pruning layer after layer", len(layers)) as advance:
            for index in range(len(layers)):
                here = {key: own for key, own in units.items() if key[0] == index}
                statistics = InputStatistics(model, here)
                handles = [
                    watch(layers[index], own, functools.partial(statistics.take, key)) for key, own in here.items()
                ]
                try:
                    for state, others in zip(hidden, arguments, strict=True):
                        run_layers(layers, [index], state, others)
                finally:
                    for handle in handles:
                        handle.remove()
                found = statistics.over_ranks()
                check_finite(found)
                for key, own in here.items():
                    weight = weight_of(layers[index], own.output.path).detach()
                    scores[key] = own.output.of_units(weighted_norm(weight, found[key]), own.units).sum(1).cpu()
                kept |= lowest_in_each({key: scores[key] for key in here}, {key: counts[key] for key in here})
                with masked(model, here, kept):
                    hidden = [
                        run_layers(layers, [index], state, others)
                        for state, others in zip(hidden, arguments, strict=True)
                    ]
                advance(f"layer {index}")
        outcome: dict[str, JSONValue] = {
            "score": "mean |w| · ‖x‖, summed over a unit",
            **achieved(model, removed_parameters(units, kept), self.ratio),
        }
        return self.make_plan(model, calibration, [*kept_steps(units, kept)], kept_trace(units, scores, kept), outcome)
