"""The only file that changes weights or layers: ``apply(model, plan)``.

What the projections of a window of decoder layers ``low..high``, with parameters θ_low … θ_high, become in the merged
layer (Sliding-Window Merging, arXiv 2502.19159):

* ``keep_top``: θ_high. The authors' program computes this: it writes θ ← θ + (θ_k − θ)·f from low to high with f = 1,
  so that each step overwrites the one before.
* ``keep_bottom``: θ_low. The same with f = 0, their ablation "delete".
* ``sum``: θ_low + Σ_{k=low+1..high} (θ_k − θ_low). The paper's figure, and LaCo (arXiv 2402.11187).
* ``mean``: Σ_{k=low..high} θ_k / (high − low + 1). Their ablation "average", which forgets to divide.

The other parameters (norms, biases, q_norm, k_norm) are those of the ``top`` or the ``bottom`` layer (the authors'
program), or their ``mean``.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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


Rule = Literal["top", "bottom", "sum", "mean"]
_PROJECTION_RULES: dict[Consolidation, Rule] = {
    "keep_top": "top",
    "keep_bottom": "bottom",
    "sum": "sum",
    "mean": "mean",
}


@dataclass(frozen=True)
class MergedLayer:
    """One layer that stands for a window, described without touching or copying the layers it comes from.

    Attributes:
        host: The layer whose module is used.
        parameters: Parameters of ``host`` to be replaced, by name, in its precision.
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


class GrowingWindow:
    """The merged layer of a window that grows downward, one layer at a time.

    What is kept from a layer is referred to, not copied. Sums and means are the only memory: one layer in float32
    (float64 for a float64 model), updated in place. With n layers in the window so far and the next layer below it::

        sum   M ← M + (n − 1)(θ_bottom − θ_below)
        mean  M ← M + (θ_below − M) / (n + 1)

    Args:
        top: The window's top layer; the window begins with it alone.
        consolidation: How the projections are formed; the formulas stand at the top of this module.
        other_parameters: The same for all other parameters.
        architecture: Says which parameters are projections.
    """

    def __init__(
        self,
        top: nn.Module,
        consolidation: Consolidation,
        other_parameters: OtherParameters,
        architecture: Architecture,
    ) -> None:
        self._top = self._bottom = top
        self._size = 1
        self._keeps_bottom = consolidation == "keep_bottom"
        self._projections = projection_names(architecture)
        self._projection_rule = _PROJECTION_RULES[consolidation]
        self._other_rule: Rule = other_parameters
        self._merged: dict[str, Tensor] = {}

    def _rule(self, name: str) -> Rule:
        return self._projection_rule if name in self._projections else self._other_rule

    @torch.no_grad()
    def grow(self, below: nn.Module) -> None:
        """Takes the next layer below into the window."""
        if self._size == 1:
            for name, p in self._top.named_parameters():
                if self._rule(name) in ("sum", "mean"):
                    wide = torch.promote_types(p.dtype, torch.float32)
                    self._merged[name] = p.detach().to(wide, copy=True)
        old, new = dict(self._bottom.named_parameters()), dict(below.named_parameters())
        for name, merged in self._merged.items():
            value = new[name].to(merged.dtype)
            if self._rule(name) == "mean":
                merged.lerp_(value, 1 / (self._size + 1))
            elif self._size > 1:  # the sum over a pair is its top layer
                merged.add_(old[name].to(merged.dtype) - value, alpha=self._size - 1)
        self._bottom = below
        self._size += 1

    def layer(self) -> MergedLayer:
        """The merged layer of the window so far; it holds until the window grows again."""
        host = self._bottom if self._keeps_bottom else self._top
        sources = {"top": dict(self._top.named_parameters()), "bottom": dict(self._bottom.named_parameters())}
        parameters: dict[str, Tensor] = {}
        if self._size > 1:
            for name, own in host.named_parameters():
                rule = self._rule(name)
                value = sources[rule][name] if rule in sources else self._merged[name].to(own.dtype)
                if value is not own:
                    parameters[name] = value
        return MergedLayer(host, parameters)


def merge(
    window: list[nn.Module],
    consolidation: Consolidation,
    other_parameters: OtherParameters,
    architecture: Architecture,
) -> MergedLayer:
    """Describes the layer that a window of decoder layers becomes. The search scores what this returns.

    Args:
        window: The layers from the lowest to the highest.
        consolidation: How the projections are formed; the formulas stand at the top of this module.
        other_parameters: The same for norms and biases.
        architecture: Says which parameters are projections.
    """
    growing = GrowingWindow(window[-1], consolidation, other_parameters, architecture)
    for layer in reversed(window[:-1]):
        growing.grow(layer)
    return growing.layer()


def check_consolidation(model: "PreTrainedModel", consolidation: Consolidation) -> None:
    """Refuses sums and means of experts, which do not correspond from layer to layer.

    Raises:
        UsageError: If the model has experts and ``consolidation`` is not a keep mode.
    """
    if architecture_of(model).experts and consolidation in ("sum", "mean"):
        raise UsageError(
            f"consolidation is {consolidation!r}, but a {model.config.model_type} model has experts, and those of one "
            "layer do not correspond to those of another. Use keep_top or keep_bottom."
        )


def check(model: "PreTrainedModel", plan: Plan) -> None:
    """Refuses a plan that was not computed on this model, or whose steps do not fit it.

    Raises:
        UsageError: If model type, layer count or parameter count differ, if an index is out of range, if steps overlap,
            if no layer would be left, or if experts would be averaged.
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
        if isinstance(step, MergeLayers):
            check_consolidation(model, step.consolidation)
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
            kept[step.host] = merged
        else:
            for layer in step.layers:
                del kept[layer]
    origins = sorted(kept)
    set_decoder_layers(model, [kept[index] for index in origins], origins)
