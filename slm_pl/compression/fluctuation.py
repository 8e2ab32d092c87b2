"""What goes into the output maps of attention and the MLPs: how large each channel is, and how it fluctuates."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slm_pl.compression.architecture import backbone, decoder_layers
from slm_pl.compression.calibration import distributed
from slm_pl.compression.structures import Key, Structure, weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class ChannelStatistics:
    """Moments of the input channels of one output map, over all tokens of all samples.

    Attributes:
        tokens: How many tokens.
        total: Σ x, ``[channels]``, float64.
        squares: Σ x², ``[channels]``, float64.
        published: Both as the authors' program for FLAP updates them.
    """

    tokens: int
    total: Tensor
    squares: Tensor
    published: "PublishedFluctuation | None" = None

    @property
    def mean(self) -> Tensor:
        """Σ x / n: the baseline of FLAP's bias compensation."""
        return self.total / self.tokens

    @property
    def variance(self) -> Tensor:
        """Σ (x − mean)² / (n − 1): the fluctuation metric's variance (FLAP, arXiv 2312.11983)."""
        return (self.squares - self.total.square() / self.tokens).clamp_min(0) / max(1, self.tokens - 1)

    @property
    def norm(self) -> Tensor:
        """√Σ x² (Wanda, arXiv 2306.11695)."""
        return self.squares.sqrt()


def weighted_norm(weight: Tensor, found: ChannelStatistics) -> Tensor:
    """Mean |W_c| · ‖x_c‖ of every input channel c of an output map (Wanda; FLAP's metric WIFN), ``[channels]``."""
    return weight.abs().double().mean(0) * found.norm


@dataclass
class PublishedFluctuation:
    """FLAP's statistics with the arithmetic of the authors' program.

    It keeps the mean over the samples of each sample's mean over its tokens. Its update of the fluctuation F subtracts
    the old mean from the samples, but that variable is the one it has updated just before; so sample k adds
    Σ_t (x_t − mean_k)² / k, and the first sample nothing.

    Attributes:
        samples: Samples so far.
        mean: ``[channels]``, float32.
        fluctuation: F, ``[channels]``, float32.
    """

    samples: int
    mean: Tensor
    fluctuation: Tensor

    def add(self, sample: Tensor) -> None:
        """Takes one sample, ``[tokens, channels]``."""
        sample = sample.float()
        self.samples += 1
        k = self.samples
        self.mean = self.mean * ((k - 1) / k) + sample.mean(0) / k
        if k > 1:
            spread = (sample - self.mean).square().sum(0)
            self.fluctuation = self.fluctuation * ((k - 2) / (k - 1)) + spread / k


def watch(
    layer: nn.Module, structure: Structure, take: Callable[[Tensor], None]
) -> "torch.utils.hooks.RemovableHandle":
    """Hands what goes into a structure's output map to ``take``, ``[batch, tokens, channels]``; returns the hook."""
    module = layer.get_submodule(structure.output.path)

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        take(args[0].detach())

    return module.register_forward_pre_hook(see)


class InputStatistics:
    """Collects :class:`ChannelStatistics` of several structures while the model runs.

    Args:
        model: The model.
        units: The structures.
        published: Also with the arithmetic of FLAP's program.
    """

    def __init__(self, model: "PreTrainedModel", units: Mapping[Key, Structure], published: bool = False) -> None:
        self.found: dict[Key, ChannelStatistics] = {}
        layers = decoder_layers(model)
        for key, structure in units.items():
            weight = weight_of(layers[key[0]], structure.output.path)
            zeros = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
            own = PublishedFluctuation(0, zeros.float(), zeros.float()) if published else None
            self.found[key] = ChannelStatistics(0, zeros.clone(), zeros.clone(), own)

    def take(self, key: Key, inputs: Tensor, samples: int = 1) -> None:
        """Adds what went into one structure's output map.

        Args:
            key: The structure.
            inputs: ``[…, channels]``; some models put all tokens of a batch in one row.
            samples: How many samples that is; only the published arithmetic asks.
        """
        own = self.found[key]
        tokens = inputs.reshape(-1, inputs.shape[-1])
        wide = tokens.double()
        own.tokens += len(tokens)
        own.total += wide.sum(0)
        own.squares += wide.square().sum(0)  # not in place: of a float64 model these are its own activations
        if own.published is not None:
            for sample in tokens.view(samples, -1, tokens.shape[-1]):
                own.published.add(sample)

    def over_ranks(self) -> dict[Key, ChannelStatistics]:
        """The statistics of all ranks' samples together, on every rank."""
        if distributed():
            for own in self.found.values():
                count = own.total.new_tensor([own.tokens])
                for value in (count, own.total, own.squares):
                    dist.all_reduce(value)
                own.tokens = int(count.item())
        return self.found


def input_statistics(
    model: "PreTrainedModel",
    batches: Iterable[Tensor],
    units: Mapping[Key, Structure],
    published: bool = False,
    advance: Callable[[str], None] = lambda note: None,
) -> dict[Key, ChannelStatistics]:
    """Runs the model once over the calibration text and keeps the moments of what its output maps get.

    One forward of each decoder layer for each sample, without the head; three numbers for each channel are kept.

    Args:
        model: A Hugging Face causal language model of a known architecture; it is only read.
        batches: Token ids, each ``[batch, tokens]``; under several processes, this rank's share.
        units: The structures to look at.
        published: Also with the arithmetic of FLAP's program, which depends on the order of the samples.
        advance: Called after each batch.

    Raises:
        FloatingPointError: If an input is not finite.
    """
    statistics = InputStatistics(model, units, published)
    layers = decoder_layers(model)
    device = next(model.parameters()).device
    size = 0
    handles = [
        watch(layers[key[0]], structure, lambda inputs, key=key: statistics.take(key, inputs, size))  # type: ignore[misc]
        for key, structure in units.items()
    ]
    try:
        for ids in batches:
            size = len(ids)
            backbone(model)(input_ids=ids.to(device), use_cache=False)
            advance("")
    finally:
        for handle in handles:
            handle.remove()
    found = statistics.over_ranks()
    check_finite(found)
    return found


def check_finite(found: Mapping[Key, ChannelStatistics]) -> None:
    """Refuses statistics that are not finite.

    Raises:
        FloatingPointError: If one is not.
    """
    for (layer, group), own in found.items():
        if not torch.isfinite(own.squares).all():
            raise FloatingPointError(
                f"On the calibration text, {group} of layer {layer} has activations that are not finite. float16 "
                "overflows above 65,504: load the model with --model.dtype bfloat16 or float32. If it is in one of "
                "these, its weights are broken."
            )
