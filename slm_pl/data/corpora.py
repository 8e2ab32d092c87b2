"""Text for calibration: where it comes from, how it is sampled and cut into token ids."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from slm_pl.compression.calibration import batched
from slm_pl.data.embedded import topic_texts
from slm_pl.data.readers import read_column, read_json, read_text, text_suffix
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CalibrationText:
    """What a compression method looks at.

    Attributes:
        source: ``embedded`` (chapters of the language reference that comes with Python), a ``.txt`` file, a ``.jsonl``
            file (one JSON object a line), a ``.parquet`` file, a ``.json`` file with a list of token-id lists (used
            exactly as given), or the id of a Hub data set.
        samples: Number of samples; with ``sampling: stream``, of documents.
        sequence_length: Tokens per sample.
        seed: Seed of the sampler.
        batch_size: Samples per forward pass.
        name: Configuration of a Hub data set.
        split: Split of a Hub data set.
        column: Column that holds the text, for ``.jsonl``, ``.parquet`` and Hub data sets.
        sampling: ``crops`` cuts each sample out of a document of its own, as Sliding-Window Merging and Shortened LLaMA
            do; ``stream`` joins documents and cuts the whole into samples without a gap, as SLEB does.
        separator: Between the documents of a stream.

    Raises:
        UsageError: A number is out of range.
    """

    source: str = "embedded"
    samples: int = 10
    sequence_length: int = 128
    seed: int = 1234
    batch_size: int = 1
    name: str | None = None
    split: str = "train"
    column: str = "text"
    sampling: Literal["crops", "stream"] = "crops"
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        at_least("calibration.samples", self.samples, 1)
        at_least("calibration.sequence_length", self.sequence_length, 2)
        at_least("calibration.batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class CalibrationSet:
    """Tokenised calibration samples.

    Attributes:
        batches: Token ids, int64, each ``[batch, sequence]``.
        text: Where the samples come from.
        sha256: Hash of the whole set: of the ids as one compact JSON list of lists, ``[[1,2],[3,4]]``. It depends
            neither on the batch size nor on the shard.
        shortest: Tokens of the shortest sample of the whole set.
    """

    batches: tuple[torch.Tensor, ...]
    text: CalibrationText
    sha256: str
    shortest: int

    @classmethod
    def from_ids(cls, ids: Sequence[Sequence[int]], text: CalibrationText) -> "CalibrationSet":
        """Batch samples (``text.batch_size`` consecutive ones of equal length) and hash them."""
        digest = hashlib.sha256(json.dumps([list(sample) for sample in ids], separators=(",", ":")).encode())
        samples = [torch.tensor(sample, dtype=torch.int64) for sample in ids]
        return cls(batched(samples, text.batch_size), text, digest.hexdigest(), min(map(len, samples), default=0))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def samples(self) -> int:
        """Number of samples in all batches."""
        return sum(batch.shape[0] for batch in self.batches)

    def shard(self, rank: int, world_size: int) -> "CalibrationSet":
        """Samples ``rank``, ``rank + world_size``, … with the text and the hash of the whole set.

        The shard is empty where there are more ranks than samples.
        """
        samples = [sample for batch in self.batches for sample in batch]
        return replace(self, batches=batched(samples[rank::world_size], self.text.batch_size))


def joined(sets: Sequence[CalibrationSet]) -> CalibrationSet:
    """Puts the samples of several texts into one set, in order.

    Raises:
        UsageError: If there is no text.
    """
    if not sets:
        raise UsageError("data.fitting is an empty list. Name a text, or leave it out to fit on data.calibration.")
    first = sets[0].text
    ids = [sample.tolist() for part in sets for batch in part for sample in batch]
    source = " + ".join(dict.fromkeys(part.text.source for part in sets))
    longest = max(part.text.sequence_length for part in sets)
    return CalibrationSet.from_ids(ids, replace(first, source=source, samples=len(ids), sequence_length=longest))


def load_calibration(text: CalibrationText, tokenizer: "PreTrainedTokenizerBase") -> CalibrationSet:
    """Read, sample and tokenise calibration text.

    The sampler is the one of Sliding-Window Merging and Shortened LLaMA: draw a document, tokenise the whole of it
    (with the tokenizer's special tokens), draw again if it is too short or was used before, then cut
    ``sequence_length`` tokens at a random offset. With ``sampling: stream`` it is the one of SLEB: shuffle the
    documents (as the library datasets does), join the first ``samples`` of them, tokenise this as one text, and cut it
    into samples; the tail is dropped.

    A ``.txt`` file is first cut into documents: consecutive lines with at least ``2 * sequence_length`` words.

    Args:
        text: Source and sampling.
        tokenizer: Tokenizer of the model that is compressed.

    Returns:
        The samples. For a ``.json`` file they are its lists, whatever ``samples`` and ``sequence_length`` ask for; the
        ``text`` of the set then says what they are (the longest, where lengths differ). Of a stream, too, it says how
        many samples there are.

    Raises:
        UsageError: The source cannot be read, or has too few documents that are long enough.
    """
    if text_suffix(text.source) == ".json":
        samples, flat = read_ids(Path(text.source), tokenizer)
        if flat or not samples or min(map(len, samples)) < 2:
            found = "a flat list" if flat else "a sample of fewer than two ids" if samples else "no sample"
            raise UsageError(
                f"{text.source} holds {found}; calibration needs a list of one or more samples, each a list of two or "
                "more token ids: [[1, 2, 3], [4, 5, 6]]."
            )
        actual = replace(text, samples=len(samples), sequence_length=max(len(sample) for sample in samples))
        return CalibrationSet.from_ids(samples, actual)
    documents = read_documents(text.source, text.name, text.split, text.column)
    if text_suffix(text.source) == ".txt":
        documents = _pieces(documents[0], 2 * text.sequence_length)
    if text.sampling == "stream":
        samples = _stream(documents, text, tokenizer)
        return CalibrationSet.from_ids(samples, replace(text, samples=len(samples)))
    return CalibrationSet.from_ids(_sample(documents, text, tokenizer), text)


def read_documents(source: str, name: str | None, split: str, column: str) -> Sequence[str]:
    """The documents of a source of text; those of ``embedded`` are the chapters to learn from, a file's is one.

    Raises:
        UsageError: It cannot be read, or has no such column.
    """
    if source == "embedded":
        return topic_texts("calibration")
    if text_suffix(source) == ".txt":
        return [read_text(Path(source))]
    return read_column(source, name, split, column)


def _stream(documents: Sequence[str], text: CalibrationText, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """SLEB's sampler: as many samples as the joined documents fill."""
    import numpy

    if len(documents) < text.samples:
        raise UsageError(
            f"Calibration text {text.source!r} has {len(documents)} documents, but {text.samples} are to be joined. "
            "Lower calibration.samples, or give longer text."
        )
    drawn = numpy.random.default_rng(text.seed).permutation(len(documents))[: text.samples]
    ids = token_ids(text.separator.join(documents[int(i)] for i in drawn), tokenizer, special_tokens=True)
    length = text.sequence_length
    if len(ids) < length:
        raise UsageError(
            f"The {text.samples} documents drawn from {text.source!r} have {len(ids)} tokens together, fewer than one "
            f"sample of {length}. Raise calibration.samples, or lower calibration.sequence_length."
        )
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def _sample(documents: Sequence[str], text: CalibrationText, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The authors' sampler; with a memory of rejected documents, it neither tokenises twice nor loops forever."""
    generator = random.Random(text.seed)
    samples: list[list[int]] = []
    rejected: set[int] = set()  # used or too short
    for _ in range(text.samples):
        while True:
            if len(rejected) == len(documents):
                raise UsageError(
                    f"Calibration text {text.source!r} has {len(documents)} documents, {len(samples)} of them with at "
                    f"least {text.sequence_length} tokens, but {text.samples} samples are needed, each from a document "
                    "of its own. Lower calibration.samples or calibration.sequence_length, or give longer text."
                )
            drawn = generator.randint(0, len(documents) - 1)
            if drawn in rejected:
                continue
            rejected.add(drawn)
            ids = token_ids(documents[drawn], tokenizer, special_tokens=True)
            if len(ids) >= text.sequence_length:
                break
        offset = generator.randint(0, len(ids) - text.sequence_length)
        samples.append(ids[offset : offset + text.sequence_length])
    return samples


def token_ids(text: str, tokenizer: "PreTrainedTokenizerBase", *, special_tokens: bool) -> list[int]:
    """Tokenise a text, with the tokenizer's own special tokens or none."""
    # verbose=False: a document longer than the model's context is cut afterwards, there is nothing to warn of
    return tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]


def _pieces(text: str, words: int) -> list[str]:
    """Consecutive lines with at least so many words each; a shorter rest goes to the last piece."""
    pieces: list[str] = []
    lines: list[str] = []
    count = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        count += len(line.split())
        if count >= words:
            pieces.append("".join(lines))
            lines, count = [], 0
    if lines:
        pieces.append((pieces.pop() if pieces else "") + "".join(lines))
    return pieces


def read_ids(path: Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[list[int]], bool]:
    """Token ids of a .json file: a list of lists or a flat list, bare or under the key ``input_ids``.

    Returns:
        The lists, and whether the file holds a flat list (then there is one).
    """
    content = read_json(path)
    if isinstance(content, dict):
        if "input_ids" not in content:
            raise UsageError(f"{path}: keys found: {', '.join(map(repr, content))}; a JSON object needs 'input_ids'.")
        content = content["input_ids"]
    if not isinstance(content, list):
        raise UsageError(f"{path}: a JSON {type(content).__name__}; allowed is a list of lists of token ids.")
    flat = bool(content) and not any(isinstance(item, list) for item in content)
    lists = [content] if flat else content
    limit = 1 + max(tokenizer.get_vocab().values())  # not len(tokenizer): ids may have gaps
    for number, ids in enumerate(lists, 1):
        if not isinstance(ids, list):
            raise UsageError(f"{path}, item {number}: {ids!r} among lists; all items must be lists of token ids.")
        for position, token in enumerate(ids, 1):
            if type(token) is not int or not 0 <= token < limit:  # not isinstance(): True is an int
                raise UsageError(
                    f"{path}, list {number}, position {position}: {token!r} is not a token id of this tokenizer; "
                    f"allowed are whole numbers from 0 to {limit - 1}. Were the ids made with another tokenizer?"
                )
    return lists, flat


def at_least(what: str, value: int, minimum: int) -> None:
    """Refuse a setting that is too small."""
    if value < minimum:
        raise UsageError(f"{what} is {value}; allowed are whole numbers from {minimum}.")
