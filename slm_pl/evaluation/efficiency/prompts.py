"""Prompts of exact length, from real text."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Batch:
    """Prompts of one batch, on the CPU.

    Args:
        ids: Token ids of shape (batch, tokens), padded on the left.
        mask: 1 for a token, 0 for padding; the same shape.
    """

    ids: Tensor
    mask: Tensor


class Prompts:
    """Gives batches of prompts; the same for every model with this tokenizer.

    Args:
        tokenizer: Of the model.
        texts: What to continue where no length is asked for, in turn over the rows of a batch. Shorter ones are padded
            on the left. None where every point names a length.

    Raises:
        UsageError: If a text has no token, or there is none.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str] | None = None) -> None:
        self.texts = texts
        self._tokenizer = tokenizer
        self._prose: list[int] | None = None
        self._texts: list[list[int]] = []
        if texts is not None:
            self._texts = [list(tokenizer(text)["input_ids"]) for text in texts]
            if not self._texts or not all(self._texts):
                raise UsageError("Efficiency got a prompt without a single token. Give a prompt of at least one word.")

    def text_tokens(self, batch_size: int) -> int:
        """Tokens of the longest text in a batch of them."""
        return max(map(len, self._texts[:batch_size]))

    def batch(self, batch_size: int, tokens: int | None) -> Batch:
        """Prompts for one batch.

        Args:
            batch_size: How many.
            tokens: Length of each, as prose of exactly that many tokens, another passage in every row; None for the
                texts.
        """
        if tokens is not None:
            ids = torch.tensor([self._passage(row, tokens) for row in range(batch_size)])
            return Batch(ids, torch.ones_like(ids))
        rows = [self._texts[row % len(self._texts)] for row in range(batch_size)]
        length = max(map(len, rows))
        pad = self._tokenizer.pad_token_id
        fill = [0 if pad is None else pad]
        ids = torch.tensor([fill * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return Batch(ids, mask)

    def _passage(self, row: int, tokens: int) -> list[int]:
        if self._prose is None:
            from slm_pl.data.embedded import topic_texts

            text = "\n\n".join(topic_texts("heldout"))
            # The model's limit is none of this text as a whole, of which every prompt is a small part.
            self._prose = list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        start = [] if self._first() is None else [self._first()]
        needed = tokens - len(start)
        length = len(self._prose)
        # Around the end of the text, as often as that takes, but no two rows begin at the same word.
        at = row * next(stride for stride in itertools.count(needed) if math.gcd(stride, length) == 1)
        words = [self._prose[(at + place) % length] for place in range(needed)]
        return [*start, *words]  # type: ignore[list-item]

    def _first(self) -> int | None:
        """The token that this tokenizer puts before every text, if any."""
        ids = list(self._tokenizer("a")["input_ids"])
        bos = self._tokenizer.bos_token_id
        return bos if bos is not None and ids[:1] == [bos] else None
