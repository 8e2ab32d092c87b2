"""Hidden states captured once, decoder layers replayed from any depth.

A candidate that changes the layers from ``low`` up sees the same input at ``low`` as the dense model. So one dense pass
records the input of every layer, and a candidate is run from there; nothing below ``low`` and no language-model head is
ever computed again, and no model is copied.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slm_pl.compression.architecture import backbone, decoder_layers, final_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Layer = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Capture:
    """One batch of the dense pass.

    Attributes:
        inputs: The hidden state that each decoder layer received, ``[batch, tokens, hidden]``, by layer.
        arguments: The keyword arguments that the model passed to each layer (masks, position embeddings, …).
        final: The final hidden state, after the final norm.
    """

    inputs: list[Tensor]
    arguments: list[dict[str, object]]
    final: Tensor


class LayerReplay:
    """Runs changed decoder layers on the captured hidden states of the dense model.

    Memory above the weights: the captured inputs, ``layers × samples × tokens × hidden`` elements, and the activations
    of one layer.

    Args:
        model: A Hugging Face causal language model of a known architecture; it is only read.
        batches: Token ids, each ``[batch, tokens]``.

    Attributes:
        layer_forwards: Decoder-layer forwards of every batch so far; the dense pass is included. It does not depend on
            how many batches this rank holds.
    """

    @torch.inference_mode()
    def __init__(self, model: "PreTrainedModel", batches: Iterable[Tensor]) -> None:
        self.layers: list[nn.Module] = list(decoder_layers(model))
        self.norm = final_norm(model)
        self.layer_forwards = len(self.layers)
        device = next(model.parameters()).device
        self.captures = [self._capture(model, batch.to(device)) for batch in batches]

    def _capture(self, model: "PreTrainedModel", ids: Tensor) -> Capture:
        inputs: list[Tensor] = []
        arguments: list[dict[str, object]] = []

        def record(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            # Returns None: a value would replace the arguments of the layer.
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            assert isinstance(hidden, Tensor)
            inputs.append(hidden)
            arguments.append(kwargs)

        handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self.layers]
        try:
            final = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        return Capture(inputs, arguments, final)

    @torch.inference_mode()
    def score(
        self, candidate: Sequence[tuple[int, Layer]], low: int, similarity: Callable[[Tensor, Tensor], Tensor]
    ) -> float:
        """Compares a candidate with the dense model.

        Args:
            candidate: The layers from ``low`` to the end, each with the index of the dense layer whose keyword
                arguments it is called with.
            low: The dense layer at whose input the candidate starts.
            similarity: From the final hidden states of the dense model and the candidate, each
                ``[batch, tokens, hidden]``, to one number for each sample, ``[batch]``.

        Returns:
            The mean over the samples of all ranks.

        Raises:
            FloatingPointError: If a similarity is not finite.
        """
        values: list[float] = []
        for capture in self.captures:
            hidden = capture.inputs[low]
            for origin, layer in candidate:
                output = layer(hidden, **capture.arguments[origin])
                hidden = output[0] if isinstance(output, tuple) else output
            values += similarity(capture.final, self.norm(hidden)).tolist()
        self.layer_forwards += len(candidate)
        return mean_over_ranks(values)


def mean_over_ranks(values: list[float]) -> float:
    """The mean of numbers that are spread over the ranks; all ranks get the same, whatever the spread.

    ``math.fsum`` rounds once, so that the order in which ranks hold the samples does not matter.

    Raises:
        FloatingPointError: If a number is not finite.
    """
    everything = [values]
    if dist.is_available() and dist.is_initialized():
        everything = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everything, values)
    flat = [value for part in everything for value in part]
    if not all(map(math.isfinite, flat)):
        raise FloatingPointError(
            "The hidden states of the calibration text are not finite, so no window can be compared. "
            "Load the model in another precision: --model.dtype bfloat16 or float32."
        )
    return math.fsum(flat) / len(flat)
