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

A projection that was refitted (:mod:`slm_pl.compression.least_squares`) has the weights that the plan's tensors say.

A layer that keeps some of its channels keeps their weights as they are; the config then says the widths of the layers,
in the fields of the stock class if all layers share them, else in ``layer_widths``.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from slm_pl.compression.architecture import (
    Architecture,
    accepts,
    architecture_of,
    decoder_layers,
    output_of,
    projection_names,
    set_decoder_layers,
    set_equal_widths,
    set_hidden_size,
)
from slm_pl.compression.feasibility import check
from slm_pl.compression.modeling import Layout, shape_layer
from slm_pl.compression.plan import (
    Consolidation,
    DropLayers,
    KeepChannels,
    KeepHidden,
    MergeLayers,
    OtherParameters,
    Plan,
    RefitOutput,
)
from slm_pl.compression.structures import (
    hidden_axes,
    layer_width,
    structure,
    weight_of,
    width_layout,
)

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


Settle = Callable[[Iterable[nn.Parameter]], None]
"""Called with parameters that were made anew."""


def apply(model: "PreTrainedModel", plan: Plan, settle: Settle = lambda parameters: None) -> None:
    """Carries out a plan on the model it was computed on, in place.

    Afterwards the layer count and every per-layer list of the config and each layer's cache index are right:
    ``generate(use_cache=True)`` works, and ``save_pretrained`` writes a checkpoint that stock transformers loads if all
    layers have one width; else :func:`slm_pl.export.save_compressed` adds the code that loads it.

    Args:
        model: The model.
        plan: What is to be done to it.
        settle: Called after each layer (of the hidden state, after each parameter) that became narrower, so that what
            was made anew need not stay in memory.

    Raises:
        UsageError: As :func:`slm_pl.compression.feasibility.check`; the model is unchanged then.
    """
    check(model, plan)
    architecture = architecture_of(model)
    layers = list(decoder_layers(model))
    kept: dict[int, nn.Module] = dict(enumerate(layers))
    narrow = [step for step in plan.steps if isinstance(step, KeepChannels)]
    layout: Layout | None = getattr(model.config, "width_layout", None)
    if narrow and layout is None:
        layout = width_layout(model)  # before anything changes: it describes layers as the stock class makes them
    for narrowed in narrow:
        assert layout is not None
        _keep_channels(model, narrowed, layout, plan.tensors)
        settle(layers[narrowed.layer].parameters())
    for step in plan.steps:
        if isinstance(step, KeepHidden):
            _keep_hidden(model, step.indices, settle)
        elif isinstance(step, MergeLayers):
            window = layers[step.low : step.high + 1]
            merged = merge(window, step.consolidation, step.other_parameters, architecture).materialise()
            for layer in range(step.low, step.high + 1):
                del kept[layer]
            kept[step.host] = merged
        elif isinstance(step, DropLayers):
            for layer in step.layers:
                del kept[layer]
    for step in plan.steps:
        if isinstance(step, RefitOutput):
            _refit(model, step, plan.tensors)
    origins = sorted(kept)
    set_decoder_layers(model, [kept[index] for index in origins], origins)
    if layout is not None:
        _say_widths(model, layout)  # layers that differed may be gone


@torch.no_grad()
def _refit(model: "PreTrainedModel", step: RefitOutput, tensors: Mapping[str, Tensor]) -> None:
    """Writes what was fitted into a projection."""
    output = output_of(model, step.layer, step.group)
    assert output is not None
    output.map.weight.copy_(tensors[step.weight])
    if step.bias is not None:
        output.map.bias.copy_(tensors[step.bias])


@torch.no_grad()
def _keep_channels(model: "PreTrainedModel", step: KeepChannels, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Makes one group of one layer narrower; the weights of its remaining units stay as they are."""
    layer = decoder_layers(model)[step.layer]
    units = structure(model, step.layer, step.group)
    assert units is not None
    width = layer_width(model, step.layer, layout)
    written = layer.get_submodule(units.output.path)
    bias: Tensor | None = written.bias  # type: ignore[assignment]
    if step.bias is not None:
        added = tensors[step.bias].to(written.weight.device, torch.float32)  # type: ignore[arg-type]
        bias = added if bias is None else bias.float() + added
        if written.bias is None:
            width[f"{step.group}_bias"] = True
    values: dict[str, Tensor] = {}
    for (path, axis), entries in units.kept_entries(step.indices).items():
        weight, row_bias = weight_of(layer, path), getattr(layer.get_submodule(path), "bias", None)
        entries = entries.to(weight.device)
        values[f"{path}.weight"] = weight.index_select(axis, entries)
        if axis == 0 and row_bias is not None:
            values[f"{path}.bias"] = row_bias.index_select(0, entries)
    if bias is not None:
        values[f"{units.output.path}.bias"] = bias
    width[step.group] = len(step.indices)
    shape_layer(layer, layout, {step.group: len(step.indices), f"{step.group}_bias": width.get(f"{step.group}_bias")})
    for name, parameter in layer.named_parameters():
        if name in values:  # of a group that was emptied, only the output map is left
            parameter.copy_(values[name])


def _say_widths(model: "PreTrainedModel", layout: Layout) -> None:
    """Writes the widths of the layers into the config: in its own fields if they are equal and it has such, else apart.

    A config that cannot say how large a head is, or how wide an MLP, takes no other width than the one it derives.
    """
    architecture, config = architecture_of(model), model.config
    widths = [layer_width(model, layer, layout) for layer in range(len(decoder_layers(model)))]
    common: dict[str, int] = {}
    stock = True
    for group, can_say in (("attention", architecture.own_head_dim), ("mlp", architecture.intermediate is not None)):
        found = {width[group] for width in widths if group in width}
        if found and found != {layout[group]["units"]}:
            stock = stock and can_say and len(found) == 1 and 0 not in found
            common[group] = max(found)
    groups = common.get("attention")
    heads = None if groups is None else groups * layout["attention"]["heads"]
    stock = stock and (heads is None or accepts(model, heads=heads))
    stock = stock and not any(f"{group}_bias" in width for width in widths for group in ("attention", "mlp"))
    if not stock:
        config.layer_widths, config.width_layout = widths, layout
        return
    for name in ("layer_widths", "width_layout"):
        if hasattr(config, name):
            delattr(config, name)
    set_equal_widths(model, heads, groups, common.get("mlp"))


@torch.no_grad()
def _keep_hidden(model: "PreTrainedModel", indices: tuple[int, ...], settle: Settle) -> None:
    """Makes the hidden state narrower everywhere; the weights of its remaining channels stay as they are."""
    parameters = dict(model.named_parameters())
    for name, axis in hidden_axes(model).items():
        parameter = parameters[name]
        # In place, so that tied tensors stay tied.
        parameter.data = parameter.data.index_select(axis, torch.tensor(indices, device=parameter.device))
        settle([parameter])
    set_hidden_size(model, len(indices))
