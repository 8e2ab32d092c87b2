"""How important the units of coupled structures are, by their weights and gradients (LLM-Pruner, arXiv 2305.11627)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from slm_pl.compression.architecture import decoder_layers
from slm_pl.compression.calibration import distributed, mean_over_ranks
from slm_pl.compression.gradients import layer_gradients
from slm_pl.compression.structures import Key, Part, Structure, hidden_axes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = dict[Key, Tensor]
"""By structure, the score of each of its units, ``[units]``, float64, on the CPU."""
Taylor = Literal["param_first", "param_second", "param_mix", "vectorize"]
Grouping = Literal["sum", "mean", "max", "last"]
Entries = Callable[[Tensor, int], Tensor]
"""Reduces a weight to one number for each entry of an axis."""


class UnitScores:
    """Adds up the importance of units from the importance of the entries of their weights.

    The entries of a part (rows of q, k, v, gate or up, columns of o or down) are brought to one vector for each unit:
    ``[units, head_dim]`` for attention, where the query heads of a KV group are added up, and ``[units, 1]`` for an
    MLP. ``grouping`` then joins the parts, and the entries of a unit are added up. Norms and biases do not count.

    Args:
        units: The structures.
        grouping: ``sum``, ``mean`` or ``max`` of the parts, or the ``last`` of them, the map that writes.
        as_published: Add up the query heads h, h + n, h + 2n, … for the KV group h of n, as the authors' program does
            for grouped-query attention, although other heads go with it.
    """

    def __init__(self, units: Mapping[Key, Structure], grouping: Grouping, as_published: bool = False) -> None:
        self._units = units
        self._grouping = grouping
        self._as_published = as_published
        self._parts: dict[Key, dict[Part, Tensor]] = {key: {} for key in units}

    def add(self, layer: int, name: str, entries_of: Callable[[int], Tensor]) -> None:
        """Takes a parameter of a layer.

        Args:
            layer: The decoder layer.
            name: The parameter's name in it.
            entries_of: Gives the importance of the entries of an axis, ``[length]``.
        """
        for (index, _), structure in self._units.items():
            if index != layer:
                continue
            for part in structure.parts:
                if name == f"{part.path}.weight" and not part.norm:
                    entries = entries_of(part.axis).double().cpu()
                    self._parts[layer, structure.group][part] = self._aligned(entries, part, structure)

    def _aligned(self, entries: Tensor, part: Part, structure: Structure) -> Tensor:
        units, size = structure.units, structure.head_dim
        own = part.of_units(entries, units)
        if self._as_published:
            return own.reshape(-1, units, size).sum(0)
        return own.view(units, -1, size).sum(1)

    def scores(self) -> Scores:
        """The score of every unit.

        Raises:
            FloatingPointError: If one is not finite.
        """
        scores: Scores = {}
        for key, structure in self._units.items():
            parts = torch.stack([self._parts[key][part] for part in structure.parts if not part.norm])
            joined = {
                "sum": lambda p: p.sum(0),
                "mean": lambda p: p.mean(0),
                "max": lambda p: p.amax(0),
                "last": lambda p: p[-1],
            }[self._grouping](parts)
            scores[key] = joined.sum(1)
            _check_finite(scores[key], f"{key[1]} of layer {key[0]}")
        return scores


def _check_finite(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise FloatingPointError(
            f"The importance of {what} is not finite: float16 overflows above 65,504. Load the model with "
            "--model.dtype bfloat16 or float32; if it is in one of these, its weights are broken."
        )


def magnitude(weight: Tensor, axis: int) -> Tensor:
    """Σ w² over the other axis."""
    return _over_others(weight.float().square(), axis)


def _over_others(values: Tensor, axis: int) -> Tensor:
    others = [other for other in range(values.ndim) if other != axis]
    return values.sum(others) if others else values


def weigh(
    model: "PreTrainedModel",
    layers: Iterable[int],
    visit: Callable[[int, str, Callable[[int], Tensor]], None],
    advance: Callable[[str], None] = lambda note: None,
) -> None:
    """Shows every parameter of these layers by its magnitude (Σ w²); ``advance`` is called after each layer."""
    modules = decoder_layers(model)
    for layer in layers:
        for name, parameter in modules[layer].named_parameters():
            weight = parameter.detach()
            visit(layer, name, lambda axis, weight=weight: magnitude(weight, axis))  # type: ignore[misc]
        advance(f"layer {layer}")


def differentiate(
    model: "PreTrainedModel",
    batches: Sequence[Tensor],
    taylor: Taylor,
    visit: Callable[[int, str, Callable[[int], Tensor]], None],
    advance: Callable[[str], None] = lambda note: None,
) -> None:
    """Shows every parameter of every layer by how much the loss changes without it (Taylor expansion).

    With g the gradient of the mean cross-entropy over all predicted tokens, and a the mean over the samples of the
    squared gradient of each sample's own (the diagonal of the empirical Fisher matrix), an entry of a weight counts:

    * ``param_first``: ``|w g|``;
    * ``param_second``: ``w² a``;
    * ``param_mix``: ``|w g − w² a / 2|``;
    * ``vectorize``: w g, and only their sum over a row or column is made positive.

    Args:
        model: A Hugging Face causal language model of a known architecture; it is only read.
        batches: Token ids, each ``[batch, tokens]``; under several processes, this rank's share.
        taylor: Which.
        visit: Gets the layer, the parameter's name in it, and a function from an axis to the importance of its entries.
        advance: Called after each layer.
    """
    second = taylor in ("param_second", "param_mix")
    if second:
        batches = [sample[None] for batch in batches for sample in batch]
    own = [float(sum(ids.numel() - len(ids) for ids in batches)), float(sum(len(ids) for ids in batches))]
    tokens, samples = own
    if distributed():
        share = mean_over_ranks([own])
        tokens, samples = (value * dist.get_world_size() for value in share)
    squares: dict[str, Tensor] = {}
    seen: set[int] = set()

    def take_squares(layer: int, name: str, weight: Tensor, square: Tensor) -> None:
        squares[name] = square

    def take(layer: int, name: str, weight: Tensor, gradient: Tensor) -> None:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        change = wide.mul_(weight).div_(tokens)
        if second:
            curve = squares.pop(name).mul_(weight).mul_(weight).div_(samples)
            change = curve if taylor == "param_second" else change.sub_(curve, alpha=0.5)
        if taylor == "vectorize":
            visit(layer, name, lambda axis: _over_others(change, axis).abs())
        else:
            absolute = change.abs_()
            visit(layer, name, lambda axis: _over_others(absolute, axis))
        if layer not in seen:
            seen.add(layer)
            advance(f"layer {layer}")

    layer_gradients(model, batches, take, visit_squares=take_squares if second else None)


class HiddenScores:
    """Adds up the importance of the hidden state's channels over everything in the decoder layers that uses them.

    Args:
        model: The model.
        grouping: ``sum``, ``mean`` or ``max`` over the parameters.
    """

    def __init__(self, model: "PreTrainedModel", grouping: Grouping) -> None:
        self._axes = hidden_axes(model)
        modules = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = {
            (index, name): modules[id(parameter)]
            for index, layer in enumerate(decoder_layers(model))
            for name, parameter in layer.named_parameters()
        }
        self._grouping = grouping
        self._members: list[Tensor] = []

    def add(self, layer: int, name: str, entries_of: Callable[[int], Tensor]) -> None:
        """Takes a parameter; as :meth:`UnitScores.add`."""
        axis = self._axes.get(self._names[layer, name])
        if axis is not None:
            self._members.append(entries_of(axis).double().cpu())

    def scores(self) -> Tensor:
        """The score of every channel, ``[hidden]``.

        Raises:
            FloatingPointError: If one is not finite.
        """
        members = torch.stack(self._members)
        joined = {"sum": members.sum(0), "mean": members.mean(0), "max": members.amax(0)}[self._grouping]
        _check_finite(joined, "the hidden state")
        return joined
