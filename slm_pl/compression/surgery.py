"""The only file that changes weights or layers: ``apply(model, plan)``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from slm_pl.compression.architecture import (
    Architecture,
    architecture_of,
    decoder_layers,
    projection_names,
    set_decoder_layers,
)
from slm_pl.compression.plan import Base, Consolidation, DropLayers, MergeLayers, OtherParameters, Plan
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MergedLayer:
    """One layer that stands for a window, described without touching or copying the layers it comes from.

    Attributes:
        host: The layer whose module is used.
        parameters: Parameters of ``host`` to be replaced, by name; tensors of the other layers, not copies.
    """

    host: nn.Module
    parameters: dict[str, Tensor]

    def __call__(self, hidden: Tensor, **kwargs: object) -> Tensor:
        """Runs the layer as it would be after :meth:`materialise`."""
        if not self.parameters:
            return self.host(hidden, **kwargs)
        return functional_call(self.host, self.parameters, (hidden,), kwargs)

    @torch.no_grad()
    def materialise(self) -> nn.Module:
        """Writes the replaced parameters into the host and returns it."""
        own = dict(self.host.named_parameters())
        for name, value in self.parameters.items():
            own[name].copy_(value)
        return self.host


def merge(
    window: list[nn.Module],
    consolidation: Consolidation,
    other_parameters: OtherParameters,
    architecture: Architecture,
) -> MergedLayer:
    """Describes the layer that a window of consecutive decoder layers becomes. The search scores what this returns.

    ``keep_top`` takes the projections (q, k, v, o, gate, up, down) of the window's top layer. This is what the authors'
    program computes: it writes θ ← θ + (θ_k − θ)·f from the bottom to the top of the window with f = 1, so that each
    step overwrites the one before (Sliding-Window Merging, arXiv 2502.19159, and its ``SLM.py``).

    Args:
        window: The layers from the lowest to the highest.
        consolidation: How the projections are formed.
        other_parameters: Whose norms and biases are taken: ``top``, or ``bottom`` as in the authors' program.
        architecture: Says which parameters are projections.
    """
    assert consolidation == "keep_top"
    top, bottom = window[-1], window[0]
    if other_parameters == "top" or len(window) == 1:
        return MergedLayer(top, {})
    projections = set(projection_names(architecture))
    return MergedLayer(top, {name: p for name, p in bottom.named_parameters() if name not in projections})


def check(model: "PreTrainedModel", plan: Plan) -> None:
    """Refuses a plan that was not computed on this model, or whose steps do not fit it.

    Raises:
        UsageError: If model type, layer count or parameter count differ, if an index is out of range, if steps overlap
            or if no layer would be left.
    """
    actual = Base.of(model)
    for name in ("model_type", "num_layers", "num_parameters"):
        got, expected = getattr(actual, name), getattr(plan.base, name)
        if got != expected:
            raise UsageError(
                f"The plan was computed on a model with {name} {expected} ({plan.base.pretrained}); this model has "
                f"{name} {got} ({actual.pretrained}). Apply it to the model it was computed on, or search again."
            )
    gone: list[int] = []
    for step in plan.steps:
        touched = list(range(step.low, step.high + 1)) if isinstance(step, MergeLayers) else list(step.layers)
        if isinstance(step, MergeLayers) and len(touched) < 2:
            raise UsageError(f"The plan merges the window {step.low}..{step.high}; a window has at least two layers.")
        if any(not 0 <= layer < actual.num_layers for layer in touched):
            raise UsageError(
                f"The plan touches layers {touched}; this model has 0..{actual.num_layers - 1}. Correct the plan."
            )
        gone += touched
    if len(gone) != len(set(gone)):
        raise UsageError("The plan touches a layer twice. Let its steps name each layer once.")
    if actual.num_layers == sum(len(step.layers) for step in plan.steps if isinstance(step, DropLayers)):
        raise UsageError(f"The plan removes all {actual.num_layers} layers. Keep at least one.")


def apply(model: "PreTrainedModel", plan: Plan) -> None:
    """Carries out a plan on the model it was computed on, in place.

    Afterwards the layer count and every per-layer list of the config and each layer's cache index are right:
    ``generate(use_cache=True)`` works and ``save_pretrained`` writes a checkpoint that stock transformers loads.

    Raises:
        UsageError: As :func:`check`; the model is unchanged then.
    """
    check(model, plan)
    architecture = architecture_of(model)
    layers = list(decoder_layers(model))
    kept: dict[int, nn.Module] = dict(enumerate(layers))
    for step in plan.steps:
        if isinstance(step, MergeLayers):
            window = layers[step.low : step.high + 1]
            merged = merge(window, step.consolidation, step.other_parameters, architecture).materialise()
            for layer in range(step.low, step.high + 1):
                del kept[layer]
            kept[step.high] = merged  # the host of a merged layer is the window's top
        else:
            for layer in step.layers:
                del kept[layer]
    origins = sorted(kept)
    set_decoder_layers(model, [kept[index] for index in origins], origins)
