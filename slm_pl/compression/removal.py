"""What a model loses with each of its decoder layers: one sweep scores the removal of every one of them.

The hidden states before a layer do not change when it is removed. So a sweep walks up the model once with the prefix;
at every candidate it runs the layers above it and the head on the prefix's state, then lets the prefix advance by that
layer. With n layers and all of them candidates, that is ``n - 1 + n(n - 1)/2`` layer forwards instead of the
``n(n - 1)`` of full passes, with one hidden state beside the candidate's, and no model is copied.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from slm_pl.compression.architecture import decoder_layers
from slm_pl.compression.calibration import (
    Arguments,
    batched,
    capture,
    first_input,
    mean_over_ranks,
    run_layers,
    sample_number,
    token_losses,
)
from slm_pl.memory import TensorBytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Chunk:
    """Samples that go through the layers together, and the keyword arguments of each layer for them."""

    ids: Tensor
    arguments: list[Arguments]


class RemovalSweep:
    """Scores models that lack one more decoder layer, by their cross-entropy on calibration text.

    Args:
        model: A Hugging Face causal language model of a known architecture; it is only read.
        batches: Token ids, each ``[batch, tokens]``; under several processes, this rank's share.
        memory_budget: GiB of hidden states, activations and logits beside the weights. The samples go through in
            chunks of as many as fit, measured on one of them; how they were batched does not matter.
        advance: Called after each chunk of the dense pass.

    Attributes:
        dense: Mean cross-entropy of the whole model, nats per token.
        chunk_size: Samples of a chunk.
        layer_forwards: Decoder-layer forwards of every sample so far, the dense pass included.
        head_forwards: The same of the language-model head.

    Raises:
        FloatingPointError: If the cross-entropy of the whole model is not finite.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: "PreTrainedModel",
        batches: Iterable[Tensor],
        memory_budget: float,
        advance: Callable[[str], None] = lambda note: None,
    ) -> None:
        samples = [sample for batch in batches for sample in batch]
        self.model = model
        self.layers = list(decoder_layers(model))
        budget = memory_budget * 2**30
        # The loss of a slice holds its logits, their float32 form and one temporary.
        self._logits_bytes = int(min(48 * 2**20, budget / 8))
        fitting = int((budget - 3 * self._logits_bytes) // self._sample_bytes(samples, budget))
        self.chunk_size = max(1, min(fitting, len(samples)))
        self._chunks: list[_Chunk] = []
        known: dict[torch.Size, list[Arguments]] = {}
        rows: list[list[float]] = []
        for ids in batched(samples, self.chunk_size):
            dense = capture(model, ids, only_first=True)
            arguments = _shared(dense.arguments, known.get(ids.shape, dense.arguments))
            self._chunks.append(_Chunk(dense.ids, arguments))
            known.setdefault(ids.shape, arguments)
            rows += self._rows([self._losses(dense.output, dense.ids)], dense.ids)
            advance(f"{self.chunk_size} samples at a time")
        broken = (index for index, row in enumerate(rows) if not math.isfinite(row[0]))
        fault = next(((sample_number(index), "the dense model gives") for index in broken), None)
        total, tokens = mean_over_ranks(rows, fault)
        self.dense = total / tokens
        self.layer_forwards = len(self.layers)
        self.head_forwards = 1

    @torch.inference_mode()
    def score(
        self, kept: Sequence[int], candidates: Collection[int], advance: Callable[[str], None] = lambda note: None
    ) -> dict[int, float]:
        """Removes each candidate in turn from the layers that are left.

        Args:
            kept: The layers that are left, in order, by their number in the whole model.
            candidates: Those of them to remove, each by itself.
            advance: Called after each candidate of each chunk.

        Returns:
            For each candidate, the mean cross-entropy without it, nats per token over the samples of all ranks;
            infinite if that of a sample is not finite, as half precision may overflow without one of the first layers.
        """
        places = [place for place, layer in enumerate(kept) if layer in candidates]
        rows: list[list[float]] = []
        for chunk in self._chunks:
            prefix = first_input(self.model, chunk.ids)
            reached = 0
            losses: list[Tensor] = []
            for place in places:
                prefix = run_layers(self.layers, kept[reached:place], prefix, chunk.arguments)
                reached = place
                output = run_layers(self.layers, kept[place + 1 :], prefix, chunk.arguments)
                losses.append(self._losses(output, chunk.ids))
                advance(f"without layer {kept[place]}")
            rows += self._rows(losses, chunk.ids)
        self.layer_forwards += places[-1] + sum(len(kept) - 1 - place for place in places)
        self.head_forwards += len(places)
        # A ruinous candidate is no reason to stop: where its loss is not finite, a flag is averaged instead.
        flagged = [
            [*(x if math.isfinite(x) else 0.0 for x in row), *(float(not math.isfinite(x)) for x in row[:-1])]
            for row in rows
        ]
        means = mean_over_ranks(flagged)
        sums, tokens, faults = means[: len(places)], means[len(places)], means[len(places) + 1 :]
        return {
            kept[place]: math.inf if fault else total / tokens
            for place, total, fault in zip(places, sums, faults, strict=True)
        }

    @property
    def chunks(self) -> int:
        """How many chunks this rank has."""
        return len(self._chunks)

    def _losses(self, output: Tensor, ids: Tensor) -> Tensor:
        """Cross-entropy of each sample, summed over its tokens, ``[batch]``; left on the device."""
        return token_losses(self.model, output, ids, self._logits_bytes).double().sum(1)

    def _rows(self, losses: list[Tensor], ids: Tensor) -> list[list[float]]:
        """For each sample its cross-entropy under each model, and how many tokens were predicted."""
        return [[*row, float(ids.shape[1] - 1)] for row in torch.stack(losses, dim=1).tolist()]

    def _sample_bytes(self, samples: list[Tensor], budget: float) -> int:
        """Bytes that the longest sample takes on its way through the layers, the prefix's hidden state included."""
        longest = max(samples, key=len, default=None)
        if longest is None:
            return 1  # more ranks than samples: nothing goes through here
        with TensorBytes(self.model) as tensors:
            hidden = capture(self.model, longest[None], only_first=True).output
        needed = tensors.peak + hidden.numel() * hidden.element_size()
        if needed + 3 * self._logits_bytes > budget:
            rank_zero_warn(
                f"One calibration sample of {len(longest)} tokens needs {needed / 2**30:.2f} GiB beside its "
                f"logits, more than memory_budget = {budget / 2**30:g} GiB allows; samples go through one at a time. "
                "Raise memory_budget, or lower calibration.sequence_length."
            )
        return needed


def _shared(arguments: list[Arguments], known: list[Arguments]) -> list[Arguments]:
    """Refers to equal tensors of another chunk instead of keeping them twice; masks of long samples are large."""

    def same(a: object, b: object) -> object:
        if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
            return tuple(same(x, y) for x, y in zip(a, b, strict=True))
        equal = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return b if equal else a

    return [
        {name: same(value, others.get(name)) for name, value in own.items()}
        for own, others in zip(arguments, known, strict=True)
    ]


def least(scores: Mapping[int, float], count: int) -> list[int]:
    """The layers of least score, the least first; of equals the lowest.

    Raises:
        FloatingPointError: If so many scores are not finite.
    """
    ranked = sorted(scores, key=lambda layer: (scores[layer], layer))[:count]
    if broken := [layer for layer in ranked if not math.isfinite(scores[layer])]:
        raise FloatingPointError(
            f"Without any of the layers {broken} the model gives hidden states that are not finite, so {count} cannot "
            "be chosen. float16 overflows above 65,504: load the model with --model.dtype bfloat16 or float32."
        )
    return ranked


def finite(score: float) -> float | None:
    """A score for plan.json, which knows no infinity."""
    return score if math.isfinite(score) else None
