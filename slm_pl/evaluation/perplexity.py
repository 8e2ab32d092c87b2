"""Perplexity of a causal language model over windows of token ids."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slm_pl.errors import UsageError
from slm_pl.evaluation._model import device_of, evaluation_mode


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity and the protocol it was measured with; two values compare only if the protocol is the same.

    Args:
        corpus: Name of the text.
        sequence_length: Tokens of one window.
        bos: How the beginning-of-sequence token was handled when the windows were cut: ``none`` or ``stream`` (one
            before the whole text).
        tokens: Scored targets, ``sequence_length - 1`` of each window.
        value: exp(mean cross-entropy over all targets); infinite above about 1e308.
        stderr: Standard error of ``value`` over windows by the delta method; not a number for a single window.
        sha256: Hash of the token ids: the same name does not make two texts the same.
        stride: Tokens from the beginning of a window to that of the next; None if windows do not overlap.
        tail: What became of the tokens behind the last whole window: ``drop`` or ``keep``.
        word_value: Perplexity of a word: exp(mean cross-entropy x tokens of a word). Unlike ``value`` it compares across
            tokenizers.
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


def perplexity(
    model: nn.Module, windows: Tensor, corpus: str, bos: str, batch_size: int = 4, show_progress: bool = True
) -> PerplexityResult:
    """Measures exp(mean cross-entropy) of every window's shifted targets.

    The mean over equally long windows is the protocol of Shortened LLaMA, LLM-Pruner, FLAP and SLEB alike; they differ
    in how the windows are cut, which is the caller's business.

    Args:
        model: A causal language model of transformers, plain or wrapped by PEFT, on whatever device it is.
        windows: Token ids, int64, shape ``[windows, sequence_length]``; no padding.
        corpus: Name of the text, for the record.
        bos: How the windows handle BOS, for the record.
        batch_size: Windows of one forward pass.
        show_progress: Draw a progress bar.

    Returns:
        The perplexity with its protocol.

    Raises:
        UsageError: If there is nothing to score or ``batch_size`` is below 1.
        FloatingPointError: If the model's logits give no finite loss.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UsageError(
            f"Perplexity of {corpus!r} got token ids of shape {list(windows.shape)}; at least one window of two "
            "tokens is needed. Give a longer text or a shorter sequence_length."
        )
    if batch_size < 1:
        raise UsageError(f"Perplexity got batch_size {batch_size}; allowed is 1 or more.")

    # torchmetrics.text imports transformers and matplotlib: not before it is needed.
    from rich.progress import track
    from torchmetrics.text import Perplexity

    device = device_of(model)
    metric = Perplexity().to(device)
    means: list[float] = []
    with evaluation_mode(model), torch.inference_mode():
        batches = windows.split(batch_size)
        for batch in track(batches, description=f"Perplexity, {corpus}", disable=not show_progress):
            ids = batch.to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            # Window by window: the float32 copies of a whole batch's logits would be the peak of memory.
            for row, targets in zip(logits[:, :-1], ids[:, 1:], strict=True):
                row = row.float()
                mean = nn.functional.cross_entropy(row, targets, reduction="none").double().mean().item()
                if not math.isfinite(mean):
                    raise FloatingPointError(
                        f"The model's logits on window {len(means)} of {corpus!r} are not finite, so it has no "
                        f"perplexity. The weights are broken or overflow in {logits.dtype}: try dtype float32 or "
                        "bfloat16, or compress less."
                    )
                means.append(mean)
                metric.update(row[None], targets[None])

    n, s = windows.shape
    nll = torch.tensor(means, dtype=torch.float64)
    value = float(metric.compute())
    if not math.isfinite(value):
        # torchmetrics takes the logarithm of float32 probabilities, which are 0 below exp(-103); the loss is finite.
        value = float(nll.mean().exp())
    stderr = value * float(nll.std(correction=1)) / math.sqrt(n) if n > 1 else math.nan
    digest = hashlib.sha256(windows.cpu().contiguous().numpy().tobytes()).hexdigest()
    return PerplexityResult(corpus, s, bos, tokens=n * (s - 1), value=value, stderr=stderr, sha256=digest)
