"""Block influence (ShortGPT, arXiv 2403.03853) and angular distance (arXiv 2403.17887)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

from callbacks.base import CompressionCallback
from slm_pl.compression.architecture import num_layers
from slm_pl.compression.calibration import capture, mean_over_ranks
from slm_pl.compression.least_squares import DropConsolidation, LeastSquares, check_drop_consolidation
from slm_pl.compression.plan import DropLayers, JSONValue, Plan
from slm_pl.compression.scores import angular_distance, block_influence
from slm_pl.compression.target import check_target, layers_to_remove
from slm_pl.console import progress
from slm_pl.data import CalibrationSet
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEEPER_LAYERS = """\
@article{gromov2024unreasonable,
  title = {The Unreasonable Ineffectiveness of the Deeper Layers},
  author = {Gromov, Andrey and Tirumala, Kushal and Shapourian, Hassan and Glorioso, Paolo and Roberts, Daniel A.},
  journal = {arXiv preprint arXiv:2403.17887},
  year = {2024}
}"""


class BlockInfluence(CompressionCallback):
    """Removes the decoder layers that turn the hidden state least.

    * ``cosine``: the layers of least block influence, one minus the mean cosine of a token's hidden state before and
      after the layer (ShortGPT, https://arxiv.org/abs/2403.03853).
    * ``angular``: the run of n consecutive layers across which the last token's hidden state turns least,
      arccos(cosine)/π averaged over the samples (Gromov et al., https://arxiv.org/abs/2403.17887).

    Exactly one of ``remove_layers`` and ``ratio`` is given::

        trainer:
          callbacks:
            - class_path: callbacks.BlockInfluence
              init_args: {distance: angular, remove_layers: 6}

    Hidden states are those between the layers; that of the last layer is taken before the final norm. It costs one
    forward pass without the language-model head.

    Args:
        distance: The influence.
        remove_layers: Remove exactly so many layers.
        ratio: Remove this share of all parameters, to the nearest whole layer; in (0, 1).
        consolidation: ``drop``: the layers that stay keep their weights; ``least_squares``: the one below each gap is
            refitted on ``data.fitting`` to do what was there (:mod:`slm_pl.compression.least_squares`).
        least_squares: How.
        plan_path: Apply this ``plan.json`` and do not search.

    Raises:
        UsageError: If not exactly one of the two controls is given, or one is out of range.
    """

    citation = """\
@article{men2024shortgpt,
  title = {{ShortGPT}: Layers in Large Language Models are More Redundant Than You Expect},
  author = {Men, Xin and Xu, Mingyu and Zhang, Qingyu and Wang, Bingning and Lin, Hongyu and Lu, Yaojie and Han, Xianpei
    and Chen, Weipeng},
  journal = {arXiv preprint arXiv:2403.03853},
  year = {2024}
}"""

    @classmethod
    def cite(cls, arguments: Mapping[str, JSONValue]) -> str:
        """The paper whose distance it is."""
        return DEEPER_LAYERS if arguments.get("distance") == "angular" else cls.citation

    def __init__(
        self,
        distance: Literal["cosine", "angular"] = "cosine",
        remove_layers: int | None = None,
        ratio: float | None = None,
        consolidation: DropConsolidation = "drop",
        least_squares: LeastSquares = LeastSquares(),  # noqa: B008  frozen
        plan_path: str | None = None,
    ) -> None:
        super().__init__(plan_path)
        check_drop_consolidation(consolidation)
        check_target("BlockInfluence", plan_path, {"remove_layers": remove_layers, "ratio": ratio})
        if distance not in ("cosine", "angular"):
            raise UsageError(f"distance is {distance!r}; allowed are cosine and angular.")
        self.distance = distance
        self.remove_layers = remove_layers
        self.ratio = ratio
        self.consolidation = consolidation
        self.least_squares = least_squares

    def plan(self, model: "PreTrainedModel", calibration: CalibrationSet) -> Plan:
        """Measures all layers in one pass; see the class."""
        layers = range(num_layers(model))
        wanted = layers_to_remove(model, self.remove_layers, self.ratio, len(layers) - 1, "since one has to stay")
        trace: list[dict[str, JSONValue]]
        if self.distance == "cosine":
            scores = self._distances(model, calibration, 1)
            order = sorted(layers, key=lambda layer: (scores[layer], layer))[:wanted]
            trace = [
                {"phase": 0, "layer": layer, "score": score, "removed": layer in order}
                for layer, score in enumerate(scores)
            ]
        else:
            scores = self._distances(model, calibration, wanted)
            start = min(range(len(scores)), key=lambda layer: (scores[layer], layer))
            order = list(range(start, start + wanted))
            trace = [
                {"phase": 0, "layer": low, "high": low + wanted - 1, "score": score, "removed": low == start}
                for low, score in enumerate(scores)
            ]
        outcome: dict[str, JSONValue] = {
            "score": "block influence" if self.distance == "cosine" else f"angular distance across {wanted} layers",
            "order": list(order),
            "removed_layers": wanted,
            "layer_forwards": num_layers(model),
        }
        return self.make_plan(model, calibration, [DropLayers(tuple(sorted(order)))], trace, outcome)

    @torch.inference_mode()
    def _distances(self, model: "PreTrainedModel", calibration: CalibrationSet, apart: int) -> list[float]:
        """For each layer, how far the hidden states before it and ``apart`` layers further are from each other."""
        rows: list[list[float]] = []
        with progress("Comparing hidden states", len(calibration)) as advance:
            for ids in calibration:
                dense = capture(model, ids)
                states = [*dense.inputs, dense.output]
                pairs = zip(states[:-apart], states[apart:], strict=True)
                if self.distance == "cosine":
                    sums = [block_influence(before, after).sum(1) for before, after in pairs]
                    counted = float(ids.shape[1])
                else:
                    sums = [angular_distance(before[:, -1], after[:, -1]) for before, after in pairs]
                    counted = 1.0
                rows += [[counted, *row] for row in torch.stack(sums, dim=1).tolist()]
                advance(f"{ids.shape[1]} tokens")
        total, *means = mean_over_ranks(rows)
        return [value / total for value in means]
