"""Whether a plan can be carried out on a model: looked at before anything changes."""

from typing import TYPE_CHECKING

import torch

from slm_pl.compression.architecture import (
    accepts,
    architecture_of,
    decoder_layers,
    hidden_size,
    output_of,
    projection_names,
)
from slm_pl.compression.plan import (
    Base,
    Consolidation,
    DropLayers,
    KeepChannels,
    KeepHidden,
    MergeLayers,
    OtherParameters,
    Plan,
    RefitOutput,
)
from slm_pl.compression.spans import spans
from slm_pl.compression.structures import check_hidden, structure
from slm_pl.errors import UsageError
from slm_pl.quantization import compress_first, quantization_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_consolidation(
    model: "PreTrainedModel", consolidation: Consolidation, other_parameters: OtherParameters
) -> None:
    """Refuses to form what does not exist: of experts, which do not correspond from layer to layer, or across widths.

    Raises:
        UsageError: If sums or means are asked for and the model has experts, or if parameters of several layers would
            have to fit into one and these differ in width.
    """
    architecture = architecture_of(model)
    mixes = consolidation in ("sum", "mean")
    if architecture.experts and mixes:
        raise UsageError(
            f"consolidation is {consolidation!r}, but a {model.config.model_type} model has experts, and those of one "
            "layer do not correspond to those of another. Use keep_top or keep_bottom."
        )
    own = "bottom" if consolidation == "keep_bottom" else "top"
    projections = projection_names(architecture)
    mixed = [mixes, other_parameters != own]
    shapes = [
        {name: p.shape for name, p in layer.named_parameters() if mixed[name not in projections]}
        for layer in decoder_layers(model)
    ]
    for layer, found in enumerate(shapes):
        differing = sorted(name for name in {**found, **shapes[0]} if found.get(name) != shapes[0].get(name))
        if differing:
            raise UsageError(
                f"consolidation {consolidation} with other_parameters {other_parameters} takes parameters of several "
                f"layers, but layers 0 and {layer} of this model differ in width ({differing[0]}: "
                f"{_shape(shapes[0], differing[0])} and {_shape(found, differing[0])}). Use keep_top with "
                "other_parameters top, keep_bottom with bottom, or merge before the width is pruned."
            )


def _shape(shapes: dict[str, torch.Size], name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "none"


def check(model: "PreTrainedModel", plan: Plan) -> None:
    """Refuses a plan that was not computed on this model, or whose steps do not fit it.

    Raises:
        UsageError: If the model is another one, its weights are quantised, a step names a layer or unit that does not
            exist or is touched twice, no layer would be left, or parameters that do not correspond would be mixed.
    """
    actual = Base.of(model)
    if (found := quantization_of(model.config)) is not None:
        raise compress_first(actual.pretrained, found, "cut or merged")
    for name in ("model_type", "num_layers", "num_parameters"):
        got, expected = getattr(actual, name), getattr(plan.base, name)
        if got != expected:
            raise UsageError(
                f"The plan was computed on a model with {name} {expected} ({plan.base.pretrained}); this model has "
                f"{name} {got} ({actual.pretrained}). Apply it to the model it was computed on, or search again."
            )
    gone: list[int] = []
    narrowed: set[int] = set()
    refitted = [step for step in plan.steps if isinstance(step, RefitOutput)]
    for step in plan.steps:
        if isinstance(step, RefitOutput):
            continue  # looked at when it is known which layers stay
        if isinstance(step, KeepHidden):
            if len(plan.steps) > 1:
                raise UsageError(
                    "The plan makes the hidden state narrower among other steps. Make it a plan of its own."
                )
            check_hidden(model)
            _check_indices(step.indices, hidden_size(model), "the hidden state")
            if not step.indices or not accepts(model, channels=len(step.indices)):
                raise UsageError(
                    f"The plan keeps {len(step.indices)} channels of the hidden state, which the config of a "
                    f"{model.config.model_type} model does not take: it wants a multiple of its number of heads."
                )
            continue
        touched = _touched(step)
        if isinstance(step, MergeLayers) and len(touched) < 2:
            raise UsageError(f"The plan merges the window {step.low}..{step.high}; a window has at least two layers.")
        if any(not 0 <= layer < actual.num_layers for layer in touched):
            raise UsageError(
                f"The plan touches layers {touched}; this model has 0..{actual.num_layers - 1}. Correct the plan."
            )
        if isinstance(step, KeepChannels):
            _check_channels(model, plan, step)
            narrowed.add(step.layer)
            continue
        if isinstance(step, MergeLayers):
            check_consolidation(model, step.consolidation, step.other_parameters)
        gone += touched
    channels = [(step.layer, step.group) for step in plan.steps if isinstance(step, KeepChannels)]
    if len(gone) != len(set(gone)) or narrowed & set(gone) or len(channels) != len(set(channels)):
        raise UsageError("The plan touches a layer twice. Let its steps name each layer once.")
    if actual.num_layers == sum(len(step.layers) for step in plan.steps if isinstance(step, DropLayers)):
        raise UsageError(f"The plan removes all {actual.num_layers} layers. Keep at least one.")
    for step in refitted:
        _check_refit(model, plan, step, narrowed)
    if len({(step.layer, step.group) for step in refitted}) != len(refitted):
        raise UsageError("The plan refits a projection twice. Let its steps name each one once.")


def _check_refit(model: "PreTrainedModel", plan: Plan, step: RefitOutput, narrowed: set[int]) -> None:
    what = f"{step.group} of layer {step.layer}"
    if step.layer not in [span.layer for span in spans(plan)] or step.layer in narrowed:
        raise UsageError(
            f"The plan refits {what}, which does not stay as it is. Name a layer that is kept or hosts a merged window."
        )
    output = output_of(model, step.layer, step.group)
    if output is None:
        raise UsageError(f"The plan refits {what}, which writes through no linear map that could be refitted.")
    wanted: dict[str | None, torch.Size] = {step.weight: output.map.weight.shape}
    if output.map.bias is not None or step.bias is not None:
        wanted[step.bias] = output.map.weight.shape[:1]
    if (output.map.bias is None) != (step.bias is None):
        has, gives = ("no" if absent is None else "a" for absent in (output.map.bias, step.bias))
        raise UsageError(f"The plan gives {what} {gives} bias, but it has {has} bias. Make the plan again.")
    for name, shape in wanted.items():
        tensor = plan.tensors.get(str(name))
        if tensor is None or tensor.shape != shape:
            got = "it is missing" if tensor is None else f"its shape is {tuple(tensor.shape)}"
            raise UsageError(
                f"The plan writes the tensor {name!r} into {what}; {got}, needed is {tuple(shape)}. Keep the plan's "
                ".tensors.safetensors file beside it."
            )
        if not torch.isfinite(tensor.to(model.dtype)).all():
            raise UsageError(
                f"The weights that {what} is to get hold numbers that are not finite in {model.dtype}. Load the model "
                "with --model.dtype bfloat16 or float32."
            )


def _touched(step: MergeLayers | DropLayers | KeepChannels) -> list[int]:
    if isinstance(step, MergeLayers):
        return list(range(step.low, step.high + 1))
    return [step.layer] if isinstance(step, KeepChannels) else list(step.layers)


def _check_channels(model: "PreTrainedModel", plan: Plan, step: KeepChannels) -> None:
    units = structure(model, step.layer, step.group)
    if units is None:
        raise UsageError(f"The plan makes {step.group} of layer {step.layer} narrower, which has no units to remove.")
    _check_indices(step.indices, units.units, f"{step.group} of layer {step.layer}")
    if step.bias is not None:
        bias = plan.tensors.get(step.bias)
        if bias is not None and bias.shape == (hidden_size(model),) and not torch.isfinite(bias.to(model.dtype)).all():
            raise UsageError(
                f"The bias that {step.group} of layer {step.layer} is to get holds numbers that are not finite in "
                f"{model.dtype}. Load the model with --model.dtype bfloat16 or float32, or set bias_compensation false."
            )
        if bias is None or bias.shape != (hidden_size(model),):
            got = "it is missing" if bias is None else f"its shape is {tuple(bias.shape)}"
            raise UsageError(
                f"The plan adds the tensor {step.bias!r} to a bias; {got}, needed are {hidden_size(model)} "
                "numbers. Keep the plan's .tensors.safetensors file beside it."
            )


def _check_indices(indices: tuple[int, ...], units: int, what: str) -> None:
    if list(indices) != sorted(set(indices)) or any(not 0 <= index < units for index in indices):
        raise UsageError(
            f"The plan keeps {len(indices)} units of {what}, which has {units}; the indices must ascend within "
            f"0..{units - 1}. Correct the plan."
        )
