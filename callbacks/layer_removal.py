"""Designated layers, and the baselines that look at nothing."""

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from callbacks.base import CompressionCallback
from callbacks.block_influence import DEEPER_LAYERS
from slm_pl.compression.architecture import num_layers
from slm_pl.compression.least_squares import DropConsolidation, LeastSquares, check_drop_consolidation
from slm_pl.compression.plan import DropLayers, JSONValue, Plan
from slm_pl.compression.target import check_protected, check_target, removable_layers
from slm_pl.data import CalibrationSet
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LayerRemoval(CompressionCallback):
    """Removes the decoder layers it is told to, or the ones that any method should do better than.

    Designated layers are how SLEB's published lists (https://arxiv.org/abs/2402.09025) are used again; ``reverse`` and
    ``random`` are the baselines of Gromov et al. (https://arxiv.org/abs/2403.17887, "simple strategy") and of chance::

        trainer:
          callbacks:
            - class_path: callbacks.LayerRemoval
              init_args: {layers: [14, 5, 18]}

    No calibration text is read.

    Args:
        layers: Exactly these, numbered from 0.
        order: Or, with ``remove_layers`` or ``ratio``: ``reverse``, the deepest layers below the protected ones;
            ``random``, a draw from all that are not protected.
        remove_layers: With ``order``, remove exactly so many layers.
        ratio: With ``order``, remove this share of all parameters, to the nearest whole layer; in (0, 1).
        protect_first: With ``order``, so many layers at the bottom stay; none if not given.
        protect_last: With ``order``, so many layers at the top stay; one if not given.
        seed: Of the draw; 1234 if not given.
        consolidation: ``drop``: the layers that stay keep their weights; ``least_squares``: the one below each gap is
            refitted on ``data.fitting`` to do what was there (:mod:`slm_pl.compression.least_squares`).
        least_squares: How.
        plan_path: Apply this ``plan.json`` and decide nothing.

    Raises:
        UsageError: If not exactly one of ``layers`` and ``order`` is given, or an argument is out of range.
    """

    citation = DEEPER_LAYERS

    @classmethod
    def cite(cls, arguments: Mapping[str, JSONValue]) -> str:
        """A paper for the order that comes from one; layers that someone named, or drew, come from none."""
        return cls.citation if arguments.get("order") == "reverse" else ""

    def __init__(
        self,
        layers: list[int] | None = None,
        order: Literal["reverse", "random"] | None = None,
        remove_layers: int | None = None,
        ratio: float | None = None,
        protect_first: int | None = None,
        protect_last: int | None = None,
        seed: int | None = None,
        consolidation: DropConsolidation = "drop",
        least_squares: LeastSquares = LeastSquares(),  # noqa: B008  frozen
        plan_path: str | None = None,
    ) -> None:
        super().__init__(plan_path)
        check_drop_consolidation(consolidation)
        if order is not None:
            if layers is not None:
                raise UsageError(f"LayerRemoval got layers={layers} and order={order}; give one of them.")
            if order not in ("reverse", "random"):
                raise UsageError(f"order is {order!r}; allowed are reverse and random.")
            check_target("LayerRemoval", plan_path, {"remove_layers": remove_layers, "ratio": ratio})
        elif remove_layers is not None or ratio is not None:
            raise UsageError(
                f"LayerRemoval got remove_layers={remove_layers} and ratio={ratio}, which say how many; give order, "
                "reverse or random, to say which. Or give layers alone."
            )
        elif layers is not None:
            twice = sorted({layer for layer in layers if layers.count(layer) > 1})
            if not layers or twice or min(layers) < 0:
                got = f"{twice} more than once" if twice else f"{layers}"
                raise UsageError(f"layers names {got}; give each layer to remove once, numbered from 0.")
            if protect_first is not None or protect_last is not None:
                raise UsageError("protect_first and protect_last are of order; with layers, exactly these go.")
        elif plan_path is None:
            raise UsageError("LayerRemoval got neither layers nor order; give one of them (or plan_path).")
        if seed is not None and order != "random":
            raise UsageError(f"seed is {seed}, but only order random draws. Leave it out.")
        check_protected(protect_first or 0, protect_last or 0)
        self.layers = layers
        self.order = order
        self.remove_layers = remove_layers
        self.ratio = ratio
        self.protect_first = protect_first
        self.protect_last = protect_last
        self.seed = seed
        self.consolidation = consolidation
        self.least_squares = least_squares

    @property
    def uses_calibration(self) -> bool:
        """It looks at nothing."""
        return False

    def plan(self, model: "PreTrainedModel", calibration: CalibrationSet) -> Plan:
        """Takes the layers as told; see the class."""
        if self.layers is not None:
            gone, total = list(self.layers), num_layers(model)
            if max(gone) >= total:
                wrong = [layer for layer in gone if layer >= total]
                raise UsageError(f"layers names {wrong}; this model has the layers 0 to {total - 1}.")
            if len(gone) == total:
                raise UsageError(f"layers names all {total} layers of this model. Keep at least one.")
        else:
            first, last = self.protect_first or 0, 1 if self.protect_last is None else self.protect_last
            candidates, wanted = removable_layers(model, self.remove_layers, self.ratio, first, last)
            drawn = random.Random(1234 if self.seed is None else self.seed).sample(candidates, len(candidates))
            gone = (candidates[::-1] if self.order == "reverse" else drawn)[:wanted]
        outcome: dict[str, JSONValue] = {"order": list(gone), "removed_layers": len(gone)}
        return self.make_plan(model, calibration, [DropLayers(tuple(sorted(gone)))], [], outcome)
