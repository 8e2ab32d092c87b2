"""The texts that the literature measures perplexity on, by the names it calls them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_pl.data.readers import load_hub, read_column, read_text, text_column
from slm_pl.errors import UsageError

LOCAL_SUFFIXES = (".jsonl", ".parquet", ".txt")
"""Kinds of files that a named corpus is read from, in the order they are looked for."""


@dataclass(frozen=True)
class Corpus:
    """Where the rows of a corpus are, and how they make a text.

    Attributes:
        hub: Id of the Hub data set.
        name: Its configuration.
        revision: Its branch; None for the default one.
        data_files: Files in it by split, where the whole is more than is wanted.
        split: The split that is measured.
        column: The column that holds the text, on the Hub and in local files.
        separator: Between the rows of the text.
        keeps_line_ends: Whether a row that is made of a line of a ``.txt`` file ends with its newline.
    """

    hub: str
    name: str | None = None
    revision: str | None = None
    data_files: Mapping[str, str] | None = None
    split: str = "test"
    column: str = "text"
    separator: str = "\n\n"
    keeps_line_ends: bool = False


CORPORA: dict[str, Corpus] = {
    "wikitext2": Corpus("Salesforce/wikitext", "wikitext-2-raw-v1", keeps_line_ends=True),
    # Its own branch holds a program, which the library datasets no longer runs. In that of the converted files, the
    # only configuration has lost its name.
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only", revision="refs/convert/parquet", split="validation", column="sentence"
    ),
    "c4": Corpus(
        "allenai/c4",
        data_files={"validation": "en/c4-validation.00000-of-00008.json.gz"},
        split="validation",
        separator=" ",
    ),
}
"""The named corpora; ``split`` of PTB is the one that Shortened LLaMA and LLM-Pruner measure."""


def hub_rows(corpus: Corpus) -> Sequence[str]:
    """The rows of a corpus from the Hub.

    Raises:
        UsageError: It cannot be reached, or has no such split or column.
    """
    table = load_hub(corpus.hub, corpus.name, corpus.split, corpus.revision, corpus.data_files)
    return text_column(table, corpus.column, f"{corpus.hub}, split {corpus.split!r}")


def corpus_rows(name: str, corpus: Corpus, local_data: str | None = None) -> Sequence[str]:
    """The rows of a corpus from a local directory, if one is given, or else from the Hub.

    Args:
        name: The corpus' name.
        corpus: Its entry in :data:`CORPORA`, perhaps with another split or column.
        local_data: Directory with ``<name>/<split>.jsonl`` (or ``.parquet``, or ``.txt`` with a row in each line).

    Raises:
        UsageError: No such file, or it cannot be read; without a directory, as :func:`hub_rows`.
    """
    if local_data is None:
        try:
            return hub_rows(corpus)
        except UsageError as error:
            raise UsageError(
                f"{error} For {name!r}, local_data may name a directory with {name}/{corpus.split}.jsonl in it."
            ) from error
    paths = [Path(local_data) / name / f"{corpus.split}{suffix}" for suffix in LOCAL_SUFFIXES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UsageError(
            f"local_data {local_data!r} lacks the text {name!r}; looked for {', '.join(map(str, paths))}. Put one of "
            "these there, or leave local_data out to download it."
        )
    if path.suffix == ".txt":
        return _rows_of_lines(read_text(path), corpus.keeps_line_ends)
    return read_column(str(path), None, corpus.split, corpus.column)


def _rows_of_lines(text: str, keep_ends: bool) -> list[str]:
    """The rows that the Hub's data set has for the lines of the original file; a line of white space is empty."""
    # not splitlines(): it also cuts at characters that stand inside a line
    lines = text.split("\n")
    last = lines.pop()
    rows = [line + "\n" if keep_ends else line.strip() for line in lines]
    rows += [last if keep_ends else last.strip()] if last else []
    return [row if row.strip() else "" for row in rows]
