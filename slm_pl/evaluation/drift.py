"""How far a compressed model moved from the dense one: divergence of their next-token distributions."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from slm_pl.compression.architecture import backbone, logits
from slm_pl.compression.calibration import batched
from slm_pl.errors import UsageError
from slm_pl.evaluation._model import device_of, evaluation_mode
from slm_pl.evaluation._ranks import agreed, share, together, world
from slm_pl.evaluation.windows import Windows, mean_over

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

T = TypeVar("T")

# Of one slice of one model's logits in float32; with the work on both, up to six times as much is in memory.
_SLICE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class DriftResult:
    """Distance of a model from the dense one on text, which needs no labels, and the protocol it was measured with.

    Args:
        corpus: Name of the text.
        sequence_length: Tokens of one window.
        bos: As in :class:`~slm_pl.evaluation.perplexity.PerplexityResult`.
        tokens: Positions that were compared.
        reference: The dense model.
        kl: Mean over positions of KL(dense || this model), in nats.
        kl_stderr: Its standard error over windows; not a number for a single window.
        top1_agreement: Share of positions where both models think the same token likeliest, 0 to 1.
        top1_stderr: Its standard error over windows; not a number for a single window.
        sha256: Hash of the token ids.
        stride: As in PerplexityResult.
        tail: As in PerplexityResult.
    """

    corpus: str
    sequence_length: int
    bos: str
    tokens: int
    reference: str
    kl: float
    kl_stderr: float
    top1_agreement: float
    top1_stderr: float
    sha256: str | None = None
    stride: int | None = None
    tail: str = "drop"


@dataclass(frozen=True, eq=False)
class OutputHead:
    """What makes logits of a model's final hidden states, without the model.

    Attributes:
        weight: Of the language-model head, ``[vocabulary, hidden]``.
        bias: Its bias, ``[vocabulary]``, or None.
        config: The model's, for what is done to the logits afterwards.
    """

    weight: Tensor
    bias: Tensor | None
    config: "PreTrainedConfig"

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "OutputHead":
        """Copies a model's head to the CPU: the model may be changed, or freed, afterwards."""
        head = model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        copied = [None if value is None else value.detach().to("cpu", copy=True) for value in (head.weight, bias)]
        return cls(cast(Tensor, copied[0]), copied[1], copy.copy(model.config))  # of the config alone

    def to(self, device: torch.device) -> "OutputHead":
        """The same head on another device."""
        return OutputHead(self.weight.to(device), None if self.bias is None else self.bias.to(device), self.config)

    def get_output_embeddings(self) -> "OutputHead":
        """What :func:`slm_pl.compression.architecture.logits` asks a model for."""
        return self

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits before the model scales or caps them."""
        return nn.functional.linear(hidden, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Reference:
    """What the dense model's distributions over windows can be made of again; small beside its logits.

    Attributes:
        name: The dense model.
        head: Its head.
        states: For each window of this process' share, the final hidden states (after the final norm) of the positions
            that predict a target, ``[targets, hidden]``, on the CPU in the model's dtype.
    """

    name: str
    head: OutputHead
    states: tuple[Tensor, ...]


def reference_states(
    model: "PreTrainedModel",
    windows: Windows | Tensor,
    name: str,
    head: OutputHead | None = None,
    batch_size: int = 4,
    show_progress: bool = True,
) -> Reference:
    """Runs the dense model once.

    Args:
        model: A causal language model of transformers, whole on every process.
        windows: As for :func:`~slm_pl.evaluation.perplexity.perplexity`; a process runs its share of them.
        name: The model's, for the record.
        head: :meth:`OutputHead.of` the model, where several texts share it.
        batch_size: Windows of one forward pass, if they are equally long.
        show_progress: Draw a progress bar.
    """
    windows = Windows.of(windows, name)
    title = f"Dense model, {name}"

    def keep(number: int, states: Tensor) -> Tensor:
        return states.to("cpu", copy=True)

    states = agreed(lambda: _each_window(model, windows, batch_size, title, show_progress, keep))
    return Reference(name, head or OutputHead.of(model), tuple(states))


def drift(
    model: "PreTrainedModel",
    windows: Windows | Tensor,
    reference: Reference,
    corpus: str,
    bos: str = "none",
    batch_size: int = 4,
    show_progress: bool = True,
) -> DriftResult:
    """Compares a model's next-token distributions with those of the dense model.

    Compared are the positions that perplexity scores: all that predict a token of their window, with a stride those
    that no earlier window has compared. The last position of a window predicts nothing that is in it. Both models'
    logits are made as their forward does and then taken to float32, slice by slice.

    Under several processes of torch.distributed each compares its share of the windows; the result is that of all, on
    every process.

    Args:
        model: The compressed model, a causal language model of transformers, whole on every process.
        windows: Those that ``reference`` is of.
        reference: Of :func:`reference_states`, made by the same processes.
        corpus: Name of the text, for the record.
        bos: How the windows of a tensor handle BOS, for the record.
        batch_size: Windows of one forward pass. With that of the reference, an unchanged model drifts by exactly 0.
        show_progress: Draw a progress bar.

    Returns:
        The distance with its protocol. Errors are over windows, :func:`~slm_pl.evaluation.windows.mean_over`.

    Raises:
        UsageError: If there is nothing to compare, ``batch_size`` is below 1, or the vocabularies differ in size.
        FloatingPointError: If the divergence is not finite, in whichever process.
    """
    windows = Windows.of(windows, corpus, bos)
    if batch_size < 1:
        raise UsageError(f"Drift got batch_size {batch_size}; allowed is 1 or more.")
    ours, theirs = len(model.get_output_embeddings().weight), len(reference.head.weight)
    if ours != theirs:
        raise UsageError(
            f"The vocabulary of {reference.name} has {theirs} tokens, that of the compared model {ours}; it has to be "
            "the same one. Give the model that this one was made of as reference."
        )
    dense = dict(zip(share(range(len(windows))), reference.states, strict=True))

    def work(_: list[int]) -> list[tuple[float, int]]:
        head = reference.head.to(device_of(model))

        def compare(number: int, states: Tensor) -> tuple[float, int]:
            found = _distance(model, states, head, dense[number].to(states.device))
            if not math.isfinite(found[0]):
                raise FloatingPointError(
                    f"The divergence from {reference.name} on window {number} of {corpus!r} is not finite. The weights "
                    f"are broken or overflow in {states.dtype}: try dtype float32 or bfloat16, or compress less."
                )
            return found

        return _each_window(model, windows, batch_size, f"Drift, {corpus}", show_progress, compare)

    found = together(range(len(windows)), work)
    counts = [len(ids) - context for ids, context in zip(windows.ids, windows.context, strict=True)]
    kl, kl_error = mean_over([divergence for divergence, _ in found], counts)
    top1, top1_error = mean_over([agreeing for _, agreeing in found], counts)
    return DriftResult(
        corpus,
        windows.sequence_length,
        windows.bos,
        tokens=windows.targets,
        reference=reference.name,
        kl=kl,
        kl_stderr=kl_error,
        top1_agreement=top1,
        top1_stderr=top1_error,
        sha256=windows.sha256,
        stride=windows.stride,
        tail=windows.tail,
    )


def _each_window(
    model: "PreTrainedModel",
    windows: Windows,
    batch_size: int,
    title: str,
    show_progress: bool,
    use: Callable[[int, Tensor], T],
) -> list[T]:
    """Runs a model without its head on this process' share of the windows.

    Args:
        model: The model.
        windows: Of all processes.
        batch_size: Windows of one forward pass, if they are equally long.
        title: Of the progress bar.
        show_progress: Draw one, on the first rank.
        use: Gets the number of each window and the final hidden states that predict its targets, ``[targets, hidden]``.

    Returns:
        What ``use`` makes of each.
    """
    from rich.progress import track

    device, numbers = device_of(model), share(range(len(windows)))
    results: list[T] = []
    with evaluation_mode(model), torch.inference_mode():
        batches = batched([windows.ids[number] for number in numbers], batch_size)
        for batch in track(batches, description=title, disable=not show_progress or world()[0] > 0):
            for states in backbone(model)(input_ids=batch.to(device), use_cache=False).last_hidden_state:
                number = numbers[len(results)]
                results.append(use(number, states[windows.context[number] - 1 : -1]))
    return results


def _distance(model: "PreTrainedModel", own: Tensor, head: OutputHead, dense: Tensor) -> tuple[float, int]:
    """Of final hidden states of the same positions: the sum of KL(dense || own), and how often the likeliest is one."""
    step = max(1, _SLICE_BYTES // (4 * len(head.weight)))
    divergence, agreeing = 0.0, 0
    for mine, theirs in zip(own.split(step), dense.split(step), strict=True):
        q, p = logits(model, mine), logits(cast("PreTrainedModel", head), theirs)
        wide = torch.promote_types(torch.promote_types(p.dtype, q.dtype), torch.float32)
        q, p = q.to(wide), p.to(wide)
        agreeing += int((q.argmax(-1) == p.argmax(-1)).sum())
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        each = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)  # p log p is 0 where p is
        divergence += float(each.clamp(min=0).double().sum())  # by rounding, equal ones may be -1e-7 apart
    return divergence, agreeing
