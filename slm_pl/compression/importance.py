"""How important decoder layers are by their weights, tensor by tensor."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from slm_pl.compression.architecture import decoder_layers
from slm_pl.compression.calibration import distributed, mean_over_ranks
from slm_pl.compression.gradients import layer_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SLICE = 2**18  # entries that are added up at a time
Importance = dict[int, dict[str, float]]
"""By layer, by the name of the parameter in it."""


def magnitude(model: "PreTrainedModel", layers: Sequence[int], norm_power: int) -> Importance:
    """Σ |w|^p of every parameter (Shortened LLaMA, arXiv 2402.02834, magnitude criterion).

    Raises:
        FloatingPointError: If a weight is not finite.
    """
    modules = decoder_layers(model)
    importance: Importance = {}
    for layer in layers:
        importance[layer] = {name: _power_sum(p.detach(), norm_power) for name, p in modules[layer].named_parameters()}
        for name, value in importance[layer].items():
            if not math.isfinite(value):
                raise FloatingPointError(f"Layer {layer} has weights in {name} that are not finite: they are broken.")
    return importance


def taylor(
    model: "PreTrainedModel",
    batches: Iterable[Tensor],
    kept: Sequence[int],
    norm_power: int,
    per_sample: bool,
    advance: Callable[[str], None] = lambda note: None,
) -> Importance:
    """Σ |w · ∂L/∂w|^p of every parameter, with L the mean cross-entropy per predicted token, in nats.

    The first-order change of the loss if the parameter were zero (Shortened LLaMA, arXiv 2402.02834, Taylor criterion;
    the authors' program sums w · ∂L/∂w over all samples and then takes the absolute value of each entry).

    Args:
        model: A Hugging Face causal language model of a known architecture; it is only read.
        batches: Token ids, each ``[batch, tokens]``; under several processes, this rank's share.
        kept: The layers that the model consists of, in order.
        norm_power: p.
        per_sample: L is that of one sample; the result is the mean over the samples.
        advance: Called after each layer, with ``per_sample`` of every sample.

    Returns:
        The importances, equal on all ranks.

    Raises:
        FloatingPointError: If one is not finite.
    """
    modules = decoder_layers(model)
    names = [(layer, name) for layer in kept for name, _ in modules[layer].named_parameters()]
    tensors, seen = Counter(layer for layer, _ in names), Counter[int]()
    sums: dict[tuple[int, str], float] = {}

    def visit(layer: int, name: str, weight: Tensor, gradient: Tensor) -> None:
        # The gradient is given up: nothing more of its size is made, unless it is in half precision.
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        sums[layer, name] = _power_sum(wide.mul_(weight), norm_power)
        seen[layer] += 1
        if seen[layer] % tensors[layer] == 0:
            advance(f"layer {layer}")

    if per_sample:
        rows: list[list[float]] = []
        for batch in batches:
            for ids in batch:
                tokens = layer_gradients(model, [ids[None]], visit, kept, over_ranks=False)
                rows.append([sums[key] / tokens**norm_power for key in names])
        means = mean_over_ranks(rows)
    else:
        tokens = layer_gradients(model, batches, visit, kept)
        # Every rank has the same sums, and its own share of the tokens.
        share, *means = mean_over_ranks([[float(tokens), *(sums[key] for key in names)]])
        total = share * (dist.get_world_size() if distributed() else 1)
        means = [value / total**norm_power for value in means]
    importance: Importance = {layer: {} for layer in kept}
    for (layer, name), value in zip(names, means, strict=True):
        importance[layer][name] = value
    return importance


def _power_sum(values: Tensor, power: int) -> float:
    """Σ |v|^p in float64, because a layer has more entries than float32 has digits for; a slice at a time."""
    parts = (part.double() for part in values.flatten().split(_SLICE))
    return torch.stack([(part.abs() if power == 1 else part.square()).sum() for part in parts]).sum().item()
