"""Hidden states captured once, decoder layers replayed from any depth.

A candidate that changes the layers from ``low`` up sees the same input at ``low`` as the dense model. So one dense pass
records the input of every layer, and a candidate is run from there; nothing below ``low`` and no language-model head is
ever computed again, and no model is copied.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slm_pl.compression.architecture import backbone, decoder_layers, final_hidden_state
from slm_pl.compression.scores import Similarity, next_token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Layer = Callable[..., Tensor | tuple[Tensor, ...]]
Arguments = dict[str, object]
"""Keyword arguments of a decoder layer."""


@dataclass(frozen=True)
class Capture:
    """One batch of the dense pass.

    Attributes:
        ids: Token ids, ``[batch, tokens]``, on the model's device.
        inputs: The hidden state that each decoder layer received, ``[batch, tokens, hidden]``, by layer.
        arguments: The keyword arguments that the model passed to each layer (masks, position embeddings, …).
        output: What the last decoder layer returned.
        final: The final hidden state: ``output`` after the final norm.
    """

    ids: Tensor
    inputs: list[Tensor]
    arguments: list[Arguments]
    output: Tensor
    final: Tensor


def capture(model: "PreTrainedModel", ids: Tensor, only_first: bool = False) -> Capture:
    """Runs the dense model without its head and records what its decoder layers get.

    Args:
        model: A Hugging Face causal language model of a known architecture; it is only read.
        ids: Token ids, ``[batch, tokens]``, on whatever device.
        only_first: Keep the hidden state that the first layer received alone, not that of every layer.
    """
    layers = decoder_layers(model)
    ids = ids.to(next(model.parameters()).device)
    inputs: list[Tensor] = []
    arguments: list[Arguments] = []

    def record(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        # Returns None: a value would replace the arguments of the layer.
        hidden, others = _split(args, kwargs)
        if not (only_first and inputs):
            inputs.append(hidden)
        arguments.append(others)

    outputs: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda *call: outputs.append(first_of(call[-1]))))
    try:
        final = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return Capture(ids, inputs, arguments, outputs[0], final)


class _Reached(Exception):
    """Carries what the first decoder layer received out of the model's forward."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def first_input(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    """What the first decoder layer receives, ``[batch, tokens, hidden]``; no decoder layer is run."""

    def stop(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        raise _Reached(_split(args, kwargs)[0])

    handle = decoder_layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        backbone(model)(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise AssertionError("the model did not call its first decoder layer")


def _split(args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Tensor, Arguments]:
    """The hidden state among a layer's arguments, and the keyword arguments beside it."""
    others = dict(kwargs)
    hidden = args[0] if args else others.pop("hidden_states")
    assert isinstance(hidden, Tensor)
    return hidden, others


def batched(samples: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
    """Puts ``size`` consecutive samples of equal length into each batch.

    Args:
        samples: Token ids, each ``[tokens]``.
        size: Most samples of a batch.
    """
    batches: list[Tensor] = []
    for _, run in groupby(samples, key=len):
        equal = list(run)
        batches += [torch.stack(equal[start : start + size]) for start in range(0, len(equal), size)]
    return tuple(batches)


def run_layers(
    layers: Sequence[nn.Module], indices: Iterable[int], hidden: Tensor, arguments: Sequence[Arguments]
) -> Tensor:
    """Runs these of the model's decoder layers, in this order, each with the arguments the model gave it."""
    for index in indices:
        hidden = first_of(layers[index](hidden, **arguments[index]))
    return hidden


def token_losses(model: "PreTrainedModel", hidden: Tensor, ids: Tensor, logits_bytes: int = 48 * 2**20) -> Tensor:
    """Cross-entropy of every next token, in nats, from the output of the last decoder layer.

    The logits of a slice of the tokens at a time are in memory, in float32.

    Args:
        model: Lends its final norm and its language-model head.
        hidden: Output of the last decoder layer, ``[batch, tokens, hidden]``.
        ids: Token ids, ``[batch, tokens]``.
        logits_bytes: Most bytes of the logits of one slice.

    Returns:
        ``[batch, tokens - 1]``, float32 (float64 of a float64 model).
    """
    return next_token_losses(model, final_hidden_state(model, hidden[:, :-1]), ids, logits_bytes)


class LayerReplay:
    """Runs changed decoder layers on the captured hidden states of the dense model.

    Memory above the weights: the captured inputs, ``layers × samples × tokens × hidden`` elements, the hidden states of
    the candidate, one layer deep, and the activations of one layer on one batch.

    Args:
        model: A Hugging Face causal language model of a known architecture; it is only read.
        batches: Token ids, each ``[batch, tokens]``; under several processes, this rank's share.

    Attributes:
        layer_forwards: Decoder-layer forwards of every batch so far; the dense pass is included. It does not depend on
            how many batches this rank holds.

    Raises:
        FloatingPointError: If a hidden state of the dense model is not finite.
    """

    @torch.inference_mode()
    def __init__(self, model: "PreTrainedModel", batches: Iterable[Tensor]) -> None:
        self.model = model
        self.layers: list[nn.Module] = list(decoder_layers(model))
        self.layer_forwards = len(self.layers)
        self.captures = [capture(model, batch) for batch in batches]
        states = [[*(_finite(hidden) for hidden in c.inputs), _finite(c.final)] for c in self.captures]
        stages = ["the embeddings", *(f"layer {index}" for index in range(len(self.layers)))]
        stages[-1] += " or the final norm"
        mean_over_ranks([], _first_fault(states, stages, "of the dense model"))

    @torch.inference_mode()
    def run(self, origin: int, layer: Layer, states: Sequence[Tensor]) -> list[Tensor]:
        """Runs one layer on a hidden state of every batch, with the keyword arguments of the dense layer ``origin``."""
        self.layer_forwards += 1
        pairs = zip(states, self.captures, strict=True)
        return [first_of(layer(hidden, **capture.arguments[origin])) for hidden, capture in pairs]

    @torch.inference_mode()
    def score(
        self, candidate: Iterable[tuple[int, Layer]], start: int | Sequence[Tensor], similarity: Similarity
    ) -> float:
        """Compares a candidate with the dense model.

        Each layer is run on every batch, and forgotten before the next one is asked for, so that a candidate which
        makes its layers as they are iterated over holds one of them at a time.

        Args:
            candidate: The layers from ``start`` to the end, each with the index of the dense layer whose keyword
                arguments it is called with.
            start: The dense layer at whose input the candidate starts, or a hidden state of every batch.
            similarity: Compares the final hidden states of the dense model and the candidate.

        Returns:
            The similarity over the samples of all ranks.

        Raises:
            FloatingPointError: If a hidden state of the candidate is not finite.
        """
        hidden = [capture.inputs[start] for capture in self.captures] if isinstance(start, int) else list(start)
        states: list[list[Tensor]] = [[] for _ in self.captures]
        origins: list[int] = []
        for origin, layer in candidate:
            origins.append(origin)
            for number, capture in enumerate(self.captures):
                hidden[number] = first_of(layer(hidden[number], **capture.arguments[origin]))
                states[number].append(_finite(hidden[number]))
            del layer  # before the next one is made
        self.layer_forwards += len(origins)
        values: list[list[float]] = []
        for number, capture in enumerate(self.captures):
            final = final_hidden_state(self.model, hidden[number])
            states[number].append(_finite(final))
            values += similarity.statistics(capture.final, final, capture.ids).tolist()
        stages = [f"layer {origin}" for origin in origins]
        stages[0] += ", where the merged window stands,"
        stages.append("the final norm")
        return similarity.combine(mean_over_ranks(values, _first_fault(states, stages, "of the candidate")))


def first_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden state among what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def _finite(hidden: Tensor) -> Tensor:
    """Whether each sample is finite, ``[batch]``; left on the device, so that nothing waits for it."""
    return torch.isfinite(hidden).flatten(1).all(1)


Fault = tuple[int, str]
"""A sample's number in the whole calibration set, and what is wrong with it."""


def _first_fault(states: list[list[Tensor]], stages: list[str], whose: str) -> Fault | None:
    """Finds the first sample of this rank that is not finite, and where it became so.

    Args:
        states: By batch, then by stage: whether each sample is finite after it.
        stages: Names of the stages, in order.
        whose: Which model.
    """
    sample = 0
    for batch in states:
        finite = torch.stack(batch).tolist()  # [stage][sample]
        for column in zip(*finite, strict=True):
            if not all(column):
                stage = stages[column.index(False)]
                return sample_number(sample), f"{stage} {whose} gives"
            sample += 1
    return None


def sample_number(index: int) -> int:
    """The number in the whole calibration set of this rank's sample; ranks take them in turn, as ``shard`` deals."""
    return dist.get_rank() + dist.get_world_size() * index if distributed() else index


def distributed() -> bool:
    """Whether this process is one of several that work together."""
    return dist.is_available() and dist.is_initialized()


def mean_over_ranks(values: list[list[float]], fault: Fault | None = None) -> list[float]:
    """The mean of each column of rows that are spread over the ranks; all ranks get the same, whatever the spread.

    ``math.fsum`` rounds once, so that the order in which ranks hold the samples does not matter.

    Args:
        values: This rank's rows, one for each sample.
        fault: What this rank found wrong.

    Raises:
        FloatingPointError: On all ranks, if one of them has a fault or a number is not finite.
    """
    everything = [(values, fault)]
    if distributed():
        everything = [([], None)] * dist.get_world_size()
        dist.all_gather_object(everything, (values, fault))
    rows = [row for part, _ in everything for row in part]
    faults = [found for _, found in everything if found is not None]
    if not faults and all(math.isfinite(value) for row in rows for value in row):
        return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    where = "The score of a calibration sample is not a finite number"
    if faults:
        sample, what = min(faults)
        where = f"On calibration sample {sample}, {what} hidden states that are not finite"
    raise FloatingPointError(
        f"{where}, so nothing can be compared. float16 overflows above 65,504, which single channels of Llama-2-like "
        "models reach: load the model with --model.dtype bfloat16 or float32. If it is in one of these, its "
        "weights are broken."
    )
