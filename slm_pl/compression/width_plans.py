"""From units that stay to a plan: what all width methods share."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from slm_pl.compression.architecture import num_layers
from slm_pl.compression.plan import JSONValue, KeepChannels, count_parameters
from slm_pl.compression.structures import Key, Structure
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Units = Mapping[Key, Structure]
Kept = Mapping[Key, Sequence[int]]


def layer_range(model: "PreTrainedModel", bounds: Sequence[int | None], name: str) -> range:
    """The layers from the first bound up to the second, which is left out, as a Python slice reads them.

    Raises:
        UsageError: If there are none.
    """
    total = num_layers(model)
    layers = range(total)[bounds[0] : bounds[1]] if len(bounds) == 2 else range(0)
    if not layers:
        raise UsageError(
            f"{name} is {list(bounds)}, which names no layer of this model with {total}. Give [first, end], such as "
            f"[{min(4, total // 3)}, {-min(2, total // 3)}] or [0, {total}]; the end is left out."
        )
    return layers


def kept_steps(units: Units, kept: Kept, biases: Mapping[Key, str] | None = None) -> list[KeepChannels]:
    """A step for each structure that loses units."""
    return [
        KeepChannels(layer, group, tuple(kept[layer, group]), (biases or {}).get((layer, group)))
        for layer, group in sorted(units)
        if len(kept[layer, group]) < units[layer, group].units
    ]


def kept_trace(
    units: Units, scores: Mapping[Key, Tensor], kept: Kept, scored: Kept | None = None
) -> list[dict[str, JSONValue]]:
    """A row for each structure: how many units it has, how many stay, and the score of each.

    Args:
        units: The structures.
        scores: Of their units.
        kept: The units that stay.
        scored: The units that were there when the scores were taken; None for all.
    """
    rows: list[dict[str, JSONValue]] = []
    for key in sorted(units):
        layer, group = key
        there = None if scored is None else set(scored[key])
        values = [value if there is None or n in there else None for n, value in enumerate(rounded(scores[key]))]
        rows.append(
            {"layer": layer, "group": group, "units": units[key].units, "kept": len(kept[key]), "scores": [*values]}
        )
    return rows


def rounded(scores: Tensor) -> list[JSONValue]:
    """Scores as they are written down: six digits, so that a plan of a large model stays readable."""
    return [float(f"{value:.6g}") for value in scores.tolist()]


def achieved(model: "PreTrainedModel", removed: int, requested: float | None) -> dict[str, JSONValue]:
    """What a plan's outcome says of the size.

    Args:
        model: The model.
        removed: Parameters that go, without those that the plan adds.
        requested: The share of all parameters that was asked for.
    """
    return {
        "requested_ratio": requested,
        "ratio": removed / count_parameters(model),
        "removed_parameters": removed,
    }
