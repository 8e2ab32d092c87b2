"""Windows of token ids that a model is measured on, and means over them with their errors."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slm_pl.errors import UsageError


@dataclass(frozen=True, eq=False)
class Windows:
    """Pieces of a text that a model reads each by itself, and what it is asked about in them.

    The targets of a window are its tokens from ``context`` on; the positions before them, ``context - 1`` and on,
    predict them. What comes earlier is read only.

    Attributes:
        ids: Token ids of each window, int64 ``[tokens]``, on the CPU.
        context: How many tokens of each window are no targets: at least 1, as nothing predicts the first.
        sequence_length: Tokens of text in a whole window; a BOS in front of every window does not count.
        bos: ``none``, ``stream`` (one BOS in front of the whole text), ``window`` (one in front of every window) or
            ``tokenizer`` (other special tokens in front of the text).
        stride: Tokens from the beginning of a window to that of the next; None if windows do not overlap.
        tail: ``keep`` if the last window may be shorter, else ``drop``.
        text_tokens: Tokens of the text that the windows cover, each once, without BOS; None if that is not known.
        words: Words of that text, as white space separates them; None if that is not known.
    """

    ids: tuple[Tensor, ...]
    context: tuple[int, ...]
    sequence_length: int
    bos: str = "none"
    stride: int | None = None
    tail: str = "drop"
    text_tokens: int | None = None
    words: int | None = None

    @classmethod
    def of(cls, ids: "Tensor | Windows", corpus: str, bos: str = "none") -> "Windows":
        """Takes windows as they are, or the rows of a tensor ``[windows, tokens]`` as windows that do not overlap.

        Args:
            ids: The windows; no padding.
            corpus: Name of the text, for the message.
            bos: What the rows of a tensor begin with.

        Raises:
            UsageError: If there is no target in them.
        """
        if isinstance(ids, Windows):
            shape = str([len(window) for window in ids.ids[:3]])
            windows, good = ids, len(ids) > 0 and ids.targets > 0
        else:
            shape = str(list(ids.shape))
            good = ids.ndim == 2 and ids.shape[0] > 0 and ids.shape[1] > 1
            windows = cls(tuple(ids.cpu()), (1,) * len(ids), ids.shape[-1], bos)
        if not good:
            raise UsageError(
                f"The text {corpus!r} came as token ids of shape {shape}; at least one window of two tokens is needed. "
                "Give a longer text or a shorter sequence_length."
            )
        return windows

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Tokens that are predicted, in all windows."""
        return sum(len(ids) - context for ids, context in zip(self.ids, self.context, strict=True))

    @property
    def protocol(self) -> list[object]:
        """All but the ids that decides what is recorded."""
        return [self.sequence_length, self.bos, self.stride, self.tail, self.text_tokens, self.words]

    @property
    def sha256(self) -> str:
        """Hash of what is read and predicted.

        Of windows of equal length in which nothing but the first token is context it is that of the ids alone, as int64
        in the machine's byte order; otherwise that of the ids, then the length and the context of each window.
        """
        digest = hashlib.sha256()
        for ids in self.ids:
            digest.update(ids.contiguous().numpy().tobytes())
        shapes = [(len(ids), context) for ids, context in zip(self.ids, self.context, strict=True)]
        if any(shape != (len(self.ids[0]), 1) for shape in shapes):
            digest.update(torch.tensor(shapes, dtype=torch.int64).numpy().tobytes())
        return digest.hexdigest()


def cut(
    stream: Sequence[int], sequence_length: int, stride: int | None = None, tail: str = "drop", bos: int | None = None
) -> tuple[tuple[Tensor, ...], tuple[int, ...], int]:
    """Cuts a text into windows.

    Without a stride they do not overlap, and the first token of each is no target unless a BOS stands before it. With a
    stride, a window begins every ``stride`` tokens, and its targets are the tokens that no window before it has scored.
    With ``tail: keep``, every token of the stream but the first is then scored exactly once.

    Args:
        stream: The token ids of the text.
        sequence_length: Of them in a window.
        stride: Less than ``sequence_length``, or None.
        tail: ``keep`` makes a shorter last window of what does not fill one, if there is a target in it.
        bos: A token in front of every window.

    Returns:
        The windows, the context of each (see :class:`Windows`), and how many tokens of the stream they cover.
    """
    ids = torch.tensor(stream, dtype=torch.int64)
    front = torch.tensor([] if bos is None else [bos], dtype=torch.int64)
    windows: list[Tensor] = []
    context: list[int] = []
    scored = 0
    for begin in range(0, len(ids), stride or sequence_length):
        piece = ids[begin : begin + sequence_length]
        if len(piece) < sequence_length and tail == "drop":
            break
        window = torch.cat([front, piece])
        known = max(1, len(front) + scored - begin)
        if known == len(window):
            break
        windows.append(window)
        context.append(known)
        scored = begin + len(piece)
        if scored == len(ids):
            break
    return tuple(windows), tuple(context), scored


def mean_over(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """The mean over all tokens of windows, and its standard error over windows.

    Windows are the units: tokens of one window are not independent. The mean is a ratio, the sum of all sums by the sum
    of all counts, and its error is that of a ratio estimator: a window weighs as much as it has tokens, and deviates by
    its sum less its count times the mean. For windows with equal counts it is the standard error of their means. It
    takes windows for independent of each other, which neighbours that overlap hardly are.

    Args:
        sums: Of the quantity, over the tokens of each window.
        counts: Tokens of each window.

    Returns:
        The mean and its error; the error of a single window is not a number.
    """
    total, count = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    mean = float(total.sum() / count.sum())
    n = len(sums)
    if n < 2:
        return mean, math.nan
    deviation = total - mean * count
    variance = float(deviation.square().sum()) / (n - 1) / n
    return mean, math.sqrt(variance) / float(count.mean())
