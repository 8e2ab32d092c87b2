"""Text for perplexity and drift, and the protocols of the literature by which it becomes windows of token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from slm_pl.data.corpora import at_least, read_ids, token_ids
from slm_pl.data.embedded import topic_texts
from slm_pl.data.named_corpora import CORPORA, Corpus, corpus_rows
from slm_pl.data.readers import read_column, read_text, text_suffix
from slm_pl.errors import UsageError
from slm_pl.evaluation.windows import Windows, cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS = Literal["none", "stream", "window", "tokenizer"]
Tail = Literal["drop", "keep"]
Preset = Literal["shortened_llama", "sleb"]

T = TypeVar("T")


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


@dataclass(frozen=True)
class EvaluationProtocol:
    """An :class:`EvaluationText` with nothing left open; see there."""

    source: str
    name: str | None
    corpus: Corpus
    separator: str
    documents: int | None
    sequence_length: int
    bos: BOS
    stride: int | None
    tail: Tail
    max_tokens: int | None

    @property
    def label(self) -> str:
        """The name of the text in results."""
        return "/".join(filter(None, (self.source, self.name)))

    def check(self) -> None:
        """Refuses values that are not allowed."""
        length = self.sequence_length
        at_least("sequence_length of the evaluation text", length, 2)
        for name, value, allowed in (
            ("bos", self.bos, ("none", "stream", "window", "tokenizer")),
            ("tail", self.tail, ("drop", "keep")),
        ):
            if value not in allowed:
                raise UsageError(f"{name} of the evaluation text is {value!r}; allowed are {', '.join(allowed)}.")
        if self.documents is not None:
            at_least("documents of the evaluation text", self.documents, 1)
        if self.stride is not None and not 1 <= self.stride < length:
            raise UsageError(
                f"stride is {self.stride}; allowed are whole numbers from 1 to {length - 1}, less than "
                f"sequence_length = {length}, so that windows overlap. Set it to null for windows that do not."
            )
        if self.max_tokens is not None and self.max_tokens < length:
            raise UsageError(
                f"max_tokens is {self.max_tokens}, but one window alone has sequence_length = {length} "
                "tokens. Raise max_tokens, lower sequence_length, or set max_tokens to null for the whole text."
            )


@dataclass(frozen=True)
class EvaluationText:
    """What perplexity and drift are measured on: a text, and how it is cut into windows.

    All attributes have a plain default. ``preset`` replaces those that its program does otherwise, and what is given
    here explicitly (not null) comes before both. Results name what it all comes to, not the preset.

    ``shortened_llama`` is the protocol of Shortened LLaMA and of Sliding-Window Merging: WikiText-2 unless another
    source is given, rows joined by an empty line, no special tokens, one BOS in front of the whole text, windows of 128
    tokens. ``sleb`` is that of SLEB: windows of 2048 tokens of the text with whatever special tokens the tokenizer puts
    there; of ``c4``, the first 1100 documents and of them the first 256 windows. FLAP's is the same with
    ``sequence_length: 128``. All drop the incomplete last window.

    Attributes:
        source: ``embedded`` (other chapters than for calibration), ``wikitext2``, ``ptb``, ``c4``, a ``.txt`` file, a
            ``.jsonl`` or ``.parquet`` file, the id of a Hub data set, or a ``.json`` file with token ids: a flat list
            is the text, in which a BOS may stand already; a list of lists is windows of ``sequence_length`` ids, used
            as they are. Default: ``embedded``.
        sequence_length: Tokens of text per window. Default: 128.
        max_tokens: Length to which the text is cut (a BOS of the stream counts). Default: all of it.
        bos: ``stream`` puts one BOS in front of the whole text, ``window`` one in front of every window, whose
            ``sequence_length`` tokens are then all predicted; ``tokenizer`` leaves it to the tokenizer, and results
            name what it does. Default: ``none``.
        name: Configuration of a Hub data set.
        split: Split of a Hub data set. Default: ``test``; of ``ptb`` and ``c4``, ``validation``.
        column: Column that holds the text, for ``.jsonl``, ``.parquet`` and Hub data sets. Default: ``text``; of
            ``ptb``, ``sentence``.
        preset: ``shortened_llama`` or ``sleb``.
        stride: A window begins every so many tokens and scores only those that none before it has, so that each is
            predicted from at least ``sequence_length - stride`` others. Default: windows do not overlap.
        tail: ``drop`` leaves out what does not fill a window, ``keep`` makes a shorter last window of it. Default:
            ``drop``; with a stride, ``keep``.
        documents: Rows of the source that are read. Default: all.
        separator: Between the rows. Default: an empty line; of ``c4``, a space.

    Raises:
        UsageError: A value is not allowed.
    """

    source: str | None = None
    sequence_length: int | None = None
    max_tokens: int | None = None
    bos: BOS | None = None
    name: str | None = None
    split: str | None = None
    column: str | None = None
    preset: Preset | None = None
    stride: int | None = None
    tail: Tail | None = None
    documents: int | None = None
    separator: str | None = None

    def __post_init__(self) -> None:
        """Refuses what no text can be cut by."""
        self.protocol()

    def protocol(self) -> "EvaluationProtocol":
        """What it comes to: the attributes given, the preset's others, and the plain defaults."""
        if self.preset is not None and self.preset not in PRESETS:
            raise UsageError(f"preset is {self.preset!r}; allowed are {', '.join(map(repr, PRESETS))}, or null.")
        chosen = self if self.preset is None else PRESETS[self.preset]._with(self)
        source, length = _or(chosen.source, "embedded"), _or(chosen.sequence_length, 128)
        if self.preset == "sleb" and source == "c4":
            chosen = EvaluationText(documents=1100, max_tokens=256 * length, sequence_length=length)._with(chosen)
        corpus = CORPORA.get(source, Corpus(source))
        protocol = EvaluationProtocol(
            source=source,
            name=chosen.name,
            corpus=replace(
                corpus,
                name=_or(chosen.name, corpus.name),
                split=_or(chosen.split, corpus.split),
                column=_or(chosen.column, corpus.column),
            ),
            separator=_or(chosen.separator, corpus.separator),
            documents=chosen.documents,
            sequence_length=length,
            bos=_or(chosen.bos, "none"),
            stride=chosen.stride,
            tail=_or(chosen.tail, "drop" if chosen.stride is None else "keep"),
            max_tokens=chosen.max_tokens,
        )
        protocol.check()
        return protocol

    def _with(self, other: "EvaluationText") -> "EvaluationText":
        """This text with all that the other one gives."""
        given = {field.name: getattr(other, field.name) for field in fields(other) if field.name != "preset"}
        return replace(self, **{name: value for name, value in given.items() if value is not None})


PRESETS: dict[str, EvaluationText] = {
    "shortened_llama": EvaluationText("wikitext2", 128, bos="stream", tail="drop", separator="\n\n"),
    "sleb": EvaluationText("wikitext2", 2048, bos="tokenizer", tail="drop"),
}
"""What the programs of the literature do."""


def load_evaluation(
    text: EvaluationText, tokenizer: "PreTrainedTokenizerBase", local_data: str | None = None
) -> Windows:
    """Read, tokenise and cut text for perplexity and drift.

    The rows are joined and tokenised as one stream, which is cut to ``max_tokens`` and then into windows.

    Args:
        text: Source and windows.
        tokenizer: Tokenizer of the model that is measured.
        local_data: A directory that named corpora are read from, ``<name>/<split>.jsonl`` (or ``.parquet``, ``.txt``),
            instead of the Hub.

    Returns:
        The windows, with what the protocol came to.

    Raises:
        UsageError: The source cannot be read, or does not fill one window.
    """
    protocol = text.protocol()
    bos, length = protocol.bos, protocol.sequence_length
    if bos in ("stream", "window") and tokenizer.bos_token_id is None:
        raise UsageError(f"bos is {bos!r}, but this tokenizer has no BOS token. Set bos to 'none'.")
    ready = False
    if protocol.source not in CORPORA and text_suffix(protocol.source) == ".json":
        stream, ready = _recorded_ids(protocol, tokenizer)
    else:
        joined = protocol.separator.join(islice(_rows(protocol, local_data), protocol.documents))
        stream = token_ids(joined, tokenizer, special_tokens=bos == "tokenizer")
    if bos == "stream" and stream[:1] != [tokenizer.bos_token_id]:
        stream.insert(0, tokenizer.bos_token_id)
    stream = stream[: protocol.max_tokens]
    ids, context, covered = cut(
        stream, length, protocol.stride, protocol.tail, tokenizer.bos_token_id if bos == "window" else None
    )
    if not ids:
        raise UsageError(
            f"Evaluation text {protocol.source!r} has {len(stream)} tokens, fewer than one window of sequence_length = "
            f"{length}. Lower sequence_length or give longer text."
        )
    front = _special_tokens(stream, tokenizer)
    done: str = bos
    if bos == "tokenizer":
        done = "none" if front == 0 else "stream" if stream[:front] == [tokenizer.bos_token_id] else "tokenizer"
    words = tokens = None
    if not ready:  # which may be pieces of different texts, in the middle of words
        tokens = covered - front
        covers = tokenizer.decode(stream[front:covered], clean_up_tokenization_spaces=False)
        words = len(str(covers).split())
    return Windows(ids, context, length, done, protocol.stride, protocol.tail, tokens, words)


def _rows(protocol: EvaluationProtocol, local_data: str | None) -> Sequence[str]:
    source, corpus = protocol.source, protocol.corpus
    if source == "embedded":
        return topic_texts("heldout")
    if source in CORPORA:
        return corpus_rows(source, corpus, local_data)
    if text_suffix(source) == ".txt":
        return [read_text(Path(source))]
    return read_column(source, corpus.name, corpus.split, corpus.column)


def _recorded_ids(protocol: EvaluationProtocol, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], bool]:
    """The token ids of a .json file as one stream, and whether they are ready windows."""
    length, bos = protocol.sequence_length, protocol.bos
    lists, flat = read_ids(Path(protocol.source), tokenizer)
    unfit = [number for number, ids in enumerate(lists, 1) if len(ids) != length]
    if not flat and (unfit or bos in ("stream", "window") or protocol.stride is not None):
        other = f"number {unfit[0]} of {len(lists[unfit[0] - 1])} token ids" if unfit else "not one stream"
        raise UsageError(
            f"{protocol.source} holds ready windows, {other}, but sequence_length is {length}, bos is {bos!r} and "
            f"stride is {protocol.stride}. Windows are used exactly as given: they need sequence_length ids each, bos "
            "'none' and no stride. Set these, or give a flat list of ids."
        )
    return [token for ids in lists for token in ids], not flat


def _special_tokens(stream: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many tokens in front of a text are no part of it: a BOS, or what the tokenizer puts there."""
    special = token_ids("", tokenizer, special_tokens=True)
    for front in (special, [tokenizer.bos_token_id]):
        if front and list(stream[: len(front)]) == front:
            return len(front)
    return 0
