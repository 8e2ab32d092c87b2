"""Perplexity of a causal language model over windows of token ids."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slm_pl.compression.calibration import batched
from slm_pl.errors import UsageError
from slm_pl.evaluation._model import device_of, evaluation_mode
from slm_pl.evaluation._ranks import together, world
from slm_pl.evaluation.windows import Windows, mean_over

if TYPE_CHECKING:
    from torchmetrics.text import Perplexity


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity and the protocol it was measured with; two values compare only if the protocol is the same.

    Args:
        corpus: Name of the text.
        sequence_length: Tokens of one window; a BOS in front of every window does not count.
        bos: How the beginning-of-sequence token was handled when the windows were cut: ``none``, ``stream`` (one before
            the whole text), ``window`` (one before every window) or ``tokenizer`` (other special tokens before it).
        tokens: Scored targets. Nothing predicts the first token of a window, so that without a stride there are
            ``sequence_length - 1`` in each; with a BOS before each there are ``sequence_length``.
        value: exp(mean cross-entropy over all targets); infinite above about 1e308.
        stderr: Standard error of ``value`` over windows by the delta method; not a number for a single window.
        sha256: Hash of the windows (:attr:`~slm_pl.evaluation.windows.Windows.sha256`): the same name does not make two
            texts the same.
        stride: Tokens from the beginning of a window to that of the next; None if windows do not overlap.
        tail: What became of the tokens behind the last whole window: ``drop`` or ``keep``.
        word_value: Perplexity of a word: exp(mean cross-entropy x tokens of a word), where BOS is no token of the text.
            Unlike ``value`` it compares across tokenizers, if the windows cover the same words: with ``tail: keep`` and
            no ``max_tokens``, since windows end at tokens. None if the words are not known.
        words: Words of the text that the windows cover, as white space separates them.
    """

    corpus: str
    sequence_length: int
    bos: str
    tokens: int
    value: float
    stderr: float
    sha256: str | None = None
    stride: int | None = None
    tail: str = "drop"
    word_value: float | None = None
    words: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("value", self.value), ("word_value", self.word_value)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; a perplexity is above 0")


def perplexity(
    model: nn.Module,
    windows: Windows | Tensor,
    corpus: str,
    bos: str = "none",
    batch_size: int = 4,
    show_progress: bool = True,
) -> PerplexityResult:
    """Measures exp(mean cross-entropy) of every window's targets.

    The mean over equally long windows is the protocol of Shortened LLaMA, LLM-Pruner, FLAP and SLEB alike; they differ
    in how the windows are cut, which is the caller's business. Where windows differ in their targets, as those with a
    stride do, the mean is over all targets, and its standard error that of a ratio: see
    :func:`~slm_pl.evaluation.windows.mean_over`.

    Under several processes of torch.distributed each measures its share of the windows; the result is that of all, on
    every process.

    Args:
        model: A causal language model of transformers, plain or wrapped by PEFT, on whatever device it is, whole on
            every process.
        windows: What to measure on; a tensor is token ids, int64, shape ``[windows, tokens]``, without padding.
        corpus: Name of the text, for the record.
        bos: How the windows of a tensor handle BOS, for the record.
        batch_size: Windows of one forward pass, if they are equally long.
        show_progress: Draw a progress bar.

    Returns:
        The perplexity with its protocol.

    Raises:
        UsageError: If there is nothing to score or ``batch_size`` is below 1.
        FloatingPointError: If the model's logits give no finite loss, in whichever process.
    """
    windows = Windows.of(windows, corpus, bos)
    if batch_size < 1:
        raise UsageError(f"Perplexity got batch_size {batch_size}; allowed is 1 or more.")

    # torchmetrics.text imports transformers and matplotlib: not before it is needed.
    from torchmetrics.text import Perplexity

    # In float64 the sum does not depend on how the windows are shared out.
    metric = Perplexity().to(device_of(model))
    metric.set_dtype(torch.float64)
    rows = list(enumerate(zip(windows.ids, windows.context, strict=True)))
    sums = together(rows, lambda mine: _losses(model, mine, metric, corpus, batch_size, show_progress))

    counts = [len(ids) - context for ids, context in zip(windows.ids, windows.context, strict=True)]
    mean, error = mean_over(sums, counts)
    value = float(metric.compute())  # of all processes
    if not math.isfinite(value):
        # torchmetrics takes the logarithm of float32 probabilities, which are 0 below exp(-103); the loss is finite.
        value = _exp(mean)
    word_value = None
    if windows.words and windows.text_tokens is not None:
        word_value = _exp(mean * windows.text_tokens / windows.words)
    return PerplexityResult(
        corpus,
        windows.sequence_length,
        windows.bos,
        tokens=windows.targets,
        value=value,
        stderr=value * error,  # delta method
        sha256=windows.sha256,
        stride=windows.stride,
        tail=windows.tail,
        word_value=word_value,
        words=windows.words,
    )


def _losses(
    model: nn.Module,
    rows: list[tuple[int, tuple[Tensor, int]]],
    metric: "Perplexity",
    corpus: str,
    batch_size: int,
    show_progress: bool,
) -> list[float]:
    """The negative log-likelihood of each window's targets, as a sum.

    Args:
        model: The model.
        rows: Number, token ids and context of each window.
        metric: Is told of the windows too.
        corpus: Name of the text.
        batch_size: Windows of one forward pass.
        show_progress: Draw a progress bar.
    """
    from rich.progress import track

    device, rank = device_of(model), world()[0]
    sums: list[float] = []
    with evaluation_mode(model), torch.inference_mode():
        batches = batched([ids for _, (ids, _) in rows], batch_size)
        for batch in track(batches, description=f"Perplexity, {corpus}", disable=not show_progress or rank > 0):
            ids = batch.to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            # Window by window: the float32 copies of a whole batch's logits would be the peak of memory.
            for row, tokens in zip(logits, ids, strict=True):
                number, (_, context) = rows[len(sums)]
                scores, targets = row[context - 1 : -1].float(), tokens[context:]
                loss = nn.functional.cross_entropy(scores, targets, reduction="none").double().sum().item()
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"The model's logits on window {number} of {corpus!r} are not finite, so it has no "
                        f"perplexity. The weights are broken or overflow in {logits.dtype}: try dtype float32 or "
                        "bfloat16, or compress less."
                    )
                sums.append(loss)
                metric.update(scores[None], targets[None])
    return sums


def _exp(exponent: float) -> float:
    """The exponential, infinite where it is too large for a float."""
    return float(torch.tensor(exponent, dtype=torch.float64).exp())
