"""How many layers are to go: the controls that all depth methods share."""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from slm_pl.compression.architecture import decoder_layers, num_layers
from slm_pl.compression.plan import count_parameters
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_target(method: str, plan_path: str | None, controls: Mapping[str, float | None]) -> None:
    """Holds the controls of a method to their ranges.

    Args:
        method: Its name, for messages.
        plan_path: With a plan, no control is needed.
        controls: The controls by name; ``remove_layers``, ``ratio`` and ``layer_ratio`` are held to their ranges.

    Raises:
        UsageError: If not exactly one of them is given, or one is out of range.
    """
    given = [f"{name}={value}" for name, value in controls.items() if value is not None]
    if len(given) > 1 or (not given and plan_path is None):
        *first, last = controls
        if not first:
            raise UsageError(f"{method} got no {last}; give {last} (or plan_path).")
        got = " and ".join(given) or f"none of {', '.join(first)} and {last}"
        raise UsageError(f"{method} got {got}; give exactly one of {', '.join(controls)} (or plan_path).")
    remove_layers, ratio = controls.get("remove_layers"), controls.get("ratio")
    if remove_layers is not None and remove_layers < 1:
        raise UsageError(f"remove_layers is {remove_layers}; give at least 1.")
    layer_ratio = controls.get("layer_ratio")
    if layer_ratio is not None and not 0 < layer_ratio < 1:
        raise UsageError(f"layer_ratio is {layer_ratio}; it is a share of each layer's units, in (0, 1).")
    if ratio is not None and not 0 < ratio < 1:
        raise UsageError(f"ratio is {ratio}; it is a share of all parameters, in (0, 1). For 20 % give 0.2.")


def share_of_each(ratio: float, methods: int) -> float:
    """What each of several methods removes of what the one before left, so that together they remove ``ratio``."""
    return ratio if methods == 1 else 1 - (1 - ratio) ** (1 / methods)


def give_ratio(ratio: float, callbacks: Sequence[MutableMapping[str, Any]]) -> None:
    """Tells the compression callbacks of a config how much to remove.

    Args:
        ratio: The share of all parameters.
        callbacks: Of the config, ``class_path`` and all of ``init_args``; changed in place.

    Raises:
        UsageError: If none of them takes a ratio, or it is out of range.
    """
    methods = [callback["init_args"] for callback in callbacks if "ratio" in (callback.get("init_args") or {})]
    if any(arguments.get("plan_path") for arguments in methods):
        raise UsageError(
            f"ratio is {ratio}, and a plan is given that says what to remove. Leave out one of them (--ratio null)."
        )
    if not methods:
        raise UsageError(
            f"ratio is {ratio}, and no callback removes a share of the model. Add one to trainer.callbacks."
        )
    if not 0 < ratio < 1:
        raise UsageError(f"ratio is {ratio}; it is a share of all parameters, in (0, 1). For 20 % give 0.2.")
    for arguments in methods:
        for other in ("remove_layers", "threshold", "layer_ratio", "layers"):
            if other in arguments:
                arguments[other] = None
        arguments["ratio"] = share_of_each(ratio, len(methods))


def check_protected(protect_first: int, protect_last: int) -> None:
    """Holds the numbers of protected layers to their range.

    Raises:
        UsageError: If one is negative.
    """
    for name, value in (("protect_first", protect_first), ("protect_last", protect_last)):
        if value < 0:
            raise UsageError(f"{name} is {value}; give 0 or more layers.")


def check_memory_budget(memory_budget: float) -> None:
    """Holds a memory budget to its range.

    Raises:
        UsageError: If it is not positive.
    """
    if not 0 < memory_budget < math.inf:
        raise UsageError(f"memory_budget is {memory_budget}; give a positive number of GiB, such as 2.")


def removable_layers(
    model: "PreTrainedModel", remove_layers: int | None, ratio: float | None, protect_first: int, protect_last: int
) -> tuple[list[int], int]:
    """Which decoder layers may be removed, and how many of them are to go; see :func:`layers_to_remove`."""
    total = num_layers(model)
    candidates = list(range(protect_first, total - protect_last))
    limits = f"with protect_first {protect_first} and protect_last {protect_last}"
    if not candidates:
        raise UsageError(f"The model has {total} layers; {limits}, all of them stay. Lower these.")
    return candidates, layers_to_remove(model, remove_layers, ratio, min(len(candidates), total - 1), limits)


def layers_to_remove(
    model: "PreTrainedModel", remove_layers: int | None, ratio: float | None, most: int, limits: str
) -> int:
    """How many layers a model is to lose.

    Args:
        model: The model.
        remove_layers: So many.
        ratio: Or this share of all parameters, to the nearest whole layer.
        most: How many can be removed.
        limits: What limits them, for messages: ``with skip_last 1``.

    Raises:
        UsageError: If it is none, or more than can be removed.
    """
    total = num_layers(model)
    if ratio is not None:
        wanted = round(ratio / layers_share(model, 1))
        got = f"ratio {ratio} means {wanted} of {total} layers"
    else:
        assert remove_layers is not None
        wanted = remove_layers
        got = f"remove_layers is {wanted}, the model has {total} layers"
    if not 1 <= wanted <= most:
        raise UsageError(
            f"{got}; {limits}, 1 to {most} layers can be removed "
            f"(ratio {layers_share(model, 1):.3f} to {layers_share(model, most):.3f})."
        )
    return wanted


def layers_share(model: "PreTrainedModel", removed: int) -> float:
    """The share of all parameters in ``removed`` decoder layers of average size."""
    layers = decoder_layers(model)
    return removed * count_parameters(layers) / len(layers) / count_parameters(model)
