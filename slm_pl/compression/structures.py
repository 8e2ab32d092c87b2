"""Coupled structures: what has to be removed together so that a decoder layer stays a decoder layer.

A *unit* of attention is one key/value head with all query heads that share it (a head, without grouped queries), a unit
of an MLP one intermediate channel. A unit that goes takes its rows of the maps that read the hidden state, their biases
and, where there is a norm over all heads, its entries of that, and its columns of the map that writes.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slm_pl.compression.architecture import (
    GROUPS,
    Architecture,
    Group,
    accepts,
    architecture_of,
    decoder_layers,
    head_sizes,
    hidden_size,
)
from slm_pl.compression.modeling import Layout
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Key = tuple[int, Group]
"""A structure: its decoder layer and its group."""


@dataclass(frozen=True)
class Part:
    """What the units of a structure are in one map (or norm) of a decoder layer.

    Unit u has the ``size`` entries from ``start + u * stride``.

    Attributes:
        path: Of the module in the layer.
        axis: 0 for rows, the map's outputs; 1 for columns, its inputs.
        start: First entry of the first unit.
        stride: From one unit to the next.
        size: Entries of one unit.
        norm: Whether it is a norm's vector and no map.
    """

    path: str
    axis: int
    start: int
    stride: int
    size: int
    norm: bool = False

    def of_units(self, values: Tensor, units: int) -> Tensor:
        """Picks the entries of all units from a tensor whose axis 0 is this part's; ``[units, size, …]``."""
        starts = torch.arange(units, device=values.device) * self.stride + self.start
        return values[starts[:, None] + torch.arange(self.size, device=values.device)]


@dataclass(frozen=True)
class Structure:
    """The units of one group of a decoder layer.

    Attributes:
        group: ``attention`` or ``mlp``.
        units: How many there are.
        parts: What each unit is made of; the map that writes comes last.
        unit_parameters: Parameters of one unit.
        head_dim: Entries of a head; 1 in an MLP.
    """

    group: Group
    units: int
    parts: tuple[Part, ...]
    unit_parameters: int
    head_dim: int

    @property
    def output(self) -> Part:
        """The part in the map that writes the hidden state: the columns of its weight."""
        return self.parts[-1]

    def kept_entries(self, kept: Sequence[int]) -> dict[tuple[str, int], Tensor]:
        """By module and axis, the entries that belong to these units, in order."""
        found: dict[tuple[str, int], list[Tensor]] = {}
        chosen = torch.tensor(list(kept), dtype=torch.long)
        for part in self.parts:
            starts = chosen * part.stride + part.start
            entries = (starts[:, None] + torch.arange(part.size)).flatten()
            found.setdefault((part.path, part.axis), []).append(entries)
        return {key: torch.cat(entries).sort().values for key, entries in found.items()}


def weight_of(layer: nn.Module, path: str) -> Tensor:
    """The weight of a map or norm in a decoder layer."""
    weight = layer.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight


def structure(model: "PreTrainedModel", layer: int, group: Group) -> Structure | None:
    """The units of a group of one decoder layer; None if it has none that can be removed."""
    return _structure(decoder_layers(model)[layer], architecture_of(model), group)


def structures(
    model: "PreTrainedModel", layers: Iterable[int], groups: Iterable[Group] = GROUPS
) -> dict[tuple[int, Group], Structure]:
    """The units of these layers, by layer and group; what has none is left out."""
    groups = tuple(groups)
    found = {(layer, group): structure(model, layer, group) for layer in layers for group in groups}
    return {key: units for key, units in found.items() if units is not None}


def _structure(layer: nn.Module, architecture: Architecture, group: Group) -> Structure | None:
    paths = architecture.attention if group == "attention" else architecture.mlp
    if not paths or (group == "attention" and architecture.fixed_heads):
        return None
    *readers, writer = paths
    try:
        columns = weight_of(layer, writer).shape[1]
    except AttributeError:  # a layer with experts in place of an MLP
        return None
    if columns == 0:
        return None
    if group == "attention":
        size, shared = head_sizes(layer, architecture)
        units = columns // (size * shared)
        parts = _attention_parts(readers, writer, units, size, shared, architecture)
    else:
        size, units = 1, columns
        halves = range(2 if len(readers) == 1 and len(weight_of(layer, readers[0])) == 2 * units else 1)
        parts = [Part(path, 0, half * units, 1, 1) for path in readers for half in halves]
        parts.append(Part(writer, 1, 0, 1, 1))
    return Structure(group, units, tuple(parts), sum(_parameters(layer, part) for part in parts), size)


def _attention_parts(
    readers: list[str], writer: str, units: int, size: int, shared: int, architecture: Architecture
) -> list[Part]:
    queries = size * shared
    if architecture.attention_order == "by_head":
        parts = [Part(readers[0], 0, which * size, 3 * size, size) for which in range(3)]
    elif architecture.attention_order == "stacked":
        keys = units * queries
        parts = [Part(readers[0], 0, 0, queries, queries)]
        parts += [Part(readers[0], 0, start, size, size) for start in (keys, keys + units * size)]
    else:
        parts = [Part(path, 0, 0, own, own) for path, own in zip(readers, (queries, size, size), strict=True)]
    norms = zip(architecture.head_norms, (queries, size), strict=False)
    parts += [Part(path, 0, 0, own, own, norm=True) for path, own in norms]
    return [*parts, Part(writer, 1, 0, queries, queries)]


def _parameters(layer: nn.Module, part: Part) -> int:
    weight, bias = weight_of(layer, part.path), getattr(layer.get_submodule(part.path), "bias", None)
    entry = 1 if weight.ndim == 1 else weight.shape[1 - part.axis]
    return part.size * (entry + int(bias is not None and part.axis == 0))


def width_layout(model: "PreTrainedModel") -> Layout:
    """What ``width_layout`` in the config says: see :mod:`slm_pl.compression.modeling`.

    Args:
        model: A model whose layers have the widths that its stock class gives them.
    """
    architecture = architecture_of(model)
    layout: dict[str, object] = {"layers": architecture.layers}
    for group in GROUPS:
        found = ((layer, _structure(layer, architecture, group)) for layer in decoder_layers(model))
        layer, units = next(((layer, units) for layer, units in found if units is not None), (None, None))
        if layer is None or units is None:
            continue
        sizes: dict[int, dict[str, int]] = {0: {}, 1: {}}
        for part in units.parts:
            sizes[part.axis][part.path] = sizes[part.axis].get(part.path, 0) + part.size
        layout[group] = {
            "module": units.output.path.rpartition(".")[0] or None,  # of OPT, the MLP is the layer itself
            "out": sizes[0],
            "in": sizes[1],
            "heads": units.output.size // units.head_dim,
            "own_config": architecture.attention_order == "stacked" and group == "attention",
            "units": units.units,
            "bias": layer.get_submodule(units.output.path).bias is not None,
        }
    return layout


def layer_width(model: "PreTrainedModel", layer: int, layout: Layout) -> dict[str, int | bool]:
    """The entry of a layer in the config's ``layer_widths``."""
    architecture, module = architecture_of(model), decoder_layers(model)[layer]
    width: dict[str, int | bool] = {}
    for group in GROUPS:
        paths = architecture.attention if group == "attention" else architecture.mlp
        units = _structure(module, architecture, group)
        if units is not None:
            width[group], bias = units.units, module.get_submodule(units.output.path).bias is not None
        elif paths and (output := _emptied(module, paths[-1])) is not None:
            width[group], bias = 0, output.bias is not None
        else:
            continue
        if bias and not layout[group]["bias"]:
            width[f"{group}_bias"] = True
    return width


def _emptied(layer: nn.Module, path: str) -> nn.Linear | None:
    """The output map of a group that lost all its units; None if it did not lose them."""
    try:
        module = layer.get_submodule(path)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear) and module.in_features == 0 else None


def hidden_axes(model: "PreTrainedModel") -> dict[str, int]:
    """Which axis of each parameter belongs to the hidden state between the layers, by the parameter's full name.

    In a decoder layer, these are the inputs of the maps that read it, the outputs of those that write it, and its
    norms; outside, whatever is as wide.
    """
    architecture, width = architecture_of(model), hidden_size(model)
    inside: dict[str, int] = dict(zip(architecture.experts, (1, 2, 1), strict=False))
    for paths in (architecture.attention, architecture.mlp):
        inside |= {f"{path}.weight": 1 for path in paths[:-1]}
        inside |= {f"{path}.{name}": 0 for path in paths[-1:] for name in ("weight", "bias")}
    axes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(f"{architecture.layers}."):
            own = name.removeprefix(f"{architecture.layers}.").partition(".")[2]
            # A norm of the hidden state is the layer's own; one inside attention is of heads.
            norm = (
                parameter.ndim == 1 and own.count(".") == 1 and own.rpartition(".")[0] not in architecture.projections
            )
            if own in inside or norm:
                axes[name] = inside.get(own, 0)
        else:
            wide = [axis for axis, length in enumerate(parameter.shape) if length == width]
            if wide:
                axes[name] = wide[-1]
    return axes


def hidden_channel_parameters(model: "PreTrainedModel") -> tuple[int, int, int]:
    """How many channels the hidden state has, how many parameters each, and how many have to go at a time.

    The kernels that run experts want rows of a multiple of 16 bytes, some configs a multiple of the number of heads.

    Raises:
        UsageError: As :func:`check_hidden`.
    """
    check_hidden(model)
    channels = hidden_size(model)
    parameters = dict(model.named_parameters())
    total = sum(parameters[name].numel() for name in hidden_axes(model))
    step = 8 if architecture_of(model).experts else 1
    if not accepts(model, channels=channels - step):
        step = math.lcm(step, model.config.num_attention_heads)
    return channels, total // channels, step


def check_hidden(model: "PreTrainedModel") -> None:
    """Refuses to make the hidden state narrower where that cannot be said.

    Raises:
        UsageError: If the config cannot say the size of a head beside that of the hidden state.
    """
    if not architecture_of(model).own_head_dim:
        raise UsageError(
            f"The hidden state of a {model.config.model_type} model cannot be made narrower, because its config "
            "derives the size of a head from it. Remove heads and MLP channels."
        )


@contextlib.contextmanager
def masked(
    model: "PreTrainedModel", units: Mapping[Key, Structure], kept: Mapping[Key, Sequence[int]]
) -> Iterator[None]:
    """Runs the model as if only these units were there: what the others hand to the output map is zero.

    This is the narrower model itself, but for a norm over all heads (OLMo 2), which still counts them.
    """
    handles = []
    layers = decoder_layers(model)
    try:
        for key, structure in units.items():
            if len(kept[key]) == structure.units:
                continue
            written = layers[key[0]].get_submodule(structure.output.path)
            weight = weight_of(layers[key[0]], structure.output.path)
            mask = weight.new_zeros(weight.shape[1])
            mask[structure.kept_entries(kept[key])[structure.output.path, 1].to(weight.device)] = 1
            handles.append(written.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,)))
        yield
    finally:
        for handle in handles:
            handle.remove()
