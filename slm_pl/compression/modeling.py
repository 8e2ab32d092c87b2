"""Decoder layers of unequal widths, as an addition to the model classes of transformers.

This file stands alone: a checkpoint whose layers differ in width brings a copy of it along (``modeling_pruned.py``), so
that it loads where slm_pl is not installed. It reads two entries of the config:

* ``layer_widths``: for each decoder layer, how many KV groups its attention and how many channels its MLP has, and
  whether their output maps have a bias that the base model's have not.
* ``width_layout``: which modules that concerns, and how many rows or columns each unit has in them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Layout = Mapping[str, Any]
"""What ``width_layout`` holds: ``layers``, and by group ``module``, ``out``, ``in``, ``heads``, ``own_config``, and of
the base model ``units`` and ``bias``."""
Width = Mapping[str, Any]
"""One entry of ``layer_widths``: ``attention``, ``mlp``, ``attention_bias``, ``mlp_bias``."""


class EmptyAttention(nn.Module):
    """Stands for an attention that lost all its heads: no query, no key, no value, no score.

    What is left of it is its output map, which takes nothing and gives its bias, if any.

    Args:
        name: Of the output map.
        output: The output map.
        layer_idx: Where the layer stands in the key/value cache.
    """

    def __init__(self, name: str, output: nn.Linear, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.output = name
        self.add_module(name, output)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: Any) -> tuple[Tensor, None]:
        """Gives the bias for every token. The cache hears how many there are, since masks are made from it."""
        cache = kwargs.get("past_key_values")
        cache = kwargs.get("layer_past") if cache is None else cache
        if cache is not None:
            counted = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(counted, counted, self.layer_idx)
        return _constant(getattr(self, self.output).bias, hidden_states), None


class EmptyMLP(nn.Module):
    """Stands for an MLP that lost all its channels; as :class:`EmptyAttention`."""

    def __init__(self, name: str, output: nn.Linear) -> None:
        super().__init__()
        self.output = name
        self.add_module(name, output)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Gives the bias for every token; added to the residual where the model leaves that to its MLP."""
        output = _constant(getattr(self, self.output).bias, hidden_states)
        return output if residual is None else residual + output


def _constant(bias: Tensor | None, hidden_states: Tensor) -> Tensor:
    """What a map without inputs gives."""
    return (hidden_states.new_zeros(1) if bias is None else bias).expand(hidden_states.shape)


class OwnHeads:
    """A config in which one attention module finds its own number of heads; all else is the model's.

    Args:
        config: The model's.
        num_attention_heads: The module's.
    """

    def __init__(self, config: object, num_attention_heads: int) -> None:
        self.__dict__.update(config=config, num_attention_heads=num_attention_heads)

    def __getattr__(self, name: str) -> Any:
        if name == "config":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.config, name)


def shape_layer(layer: nn.Module, layout: Layout, width: Width) -> None:
    """Gives a decoder layer the shapes of a width. Parameters that change shape are left to be filled.

    Args:
        layer: The decoder layer, changed in place.
        layout: Which modules to change.
        width: What it is to have.
    """
    for group in ("attention", "mlp"):
        units, parts = width.get(group), layout.get(group)
        if units is None or parts is None:
            continue
        (output,) = parts["in"]
        written: Any = layer.get_submodule(output)
        _resize(written, "weight", 1, units * parts["in"][output])
        written.in_features = units * parts["in"][output]
        if width.get(f"{group}_bias") and written.bias is None:
            written.bias = nn.Parameter(written.weight.new_zeros(written.weight.shape[0]))
        if units == 0 and parts["module"] is not None:
            holder, _, name = parts["module"].rpartition(".")
            own: Any = layer.get_submodule(parts["module"])
            last = output.rpartition(".")[2]
            empty = EmptyAttention(last, written, own.layer_idx) if group == "attention" else EmptyMLP(last, written)
            setattr(layer.get_submodule(holder), name, empty)
            continue
        for path, size in parts["out"].items():
            module = layer.get_submodule(path)
            _resize(module, "weight", 0, units * size)
            if getattr(module, "bias", None) is not None:
                _resize(module, "bias", 0, units * size)
            if hasattr(module, "out_features"):
                module.out_features = units * size
        if group == "attention":
            _count_heads(layer.get_submodule(parts["module"]), units, units * parts["heads"], parts["own_config"])


def _resize(module: nn.Module, name: str, axis: int, length: int) -> None:
    old = getattr(module, name)
    if old.shape[axis] == length:
        return
    shape = [*old.shape[:axis], length, *old.shape[axis + 1 :]]
    setattr(module, name, nn.Parameter(torch.empty(shape, dtype=old.dtype, device=old.device), old.requires_grad))


def _count_heads(attention: Any, groups: int, heads: int, own_config: bool) -> None:
    """Some attention modules keep their number of heads."""
    for name, value in (("num_heads", heads), ("num_attention_heads", heads), ("num_key_value_heads", groups)):
        if hasattr(attention, name):
            setattr(attention, name, value)
    if own_config:
        config = getattr(attention.config, "config", attention.config)
        attention.config = OwnHeads(config, heads)


def shape_layers(model: nn.Module, layout: Layout, widths: "list[Width]") -> None:
    """Gives all decoder layers their widths; see :func:`shape_layer`."""
    layers = list(model.get_submodule(layout["layers"]).children())
    if len(layers) != len(widths):
        raise ValueError(f"layer_widths has {len(widths)} entries; the model has {len(layers)} decoder layers")
    for layer, width in zip(layers, widths, strict=True):
        shape_layer(layer, layout, width)


def with_widths(stock: type, layout_of: Callable[[Any], Layout] | None = None) -> type:
    """Derives from a model class of transformers one whose layers have the widths that the config says.

    Args:
        stock: Such as ``LlamaForCausalLM``.
        layout_of: Gives the layout for a model with the stock widths; by default it is read from the config.
    """

    class Pruned(stock):
        """A model whose decoder layers differ in width."""

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            if layout_of is not None:
                config.width_layout = layout_of(self)
            shape_layers(self, config.width_layout, config.layer_widths)

    Pruned.__name__ = Pruned.__qualname__ = f"Pruned{stock.__name__}"
    return Pruned
