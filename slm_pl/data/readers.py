"""Files and Hub data sets with text, read with errors that name the place; for corpora and for instruction rows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slm_pl.documents import parse_json
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet", ".json")


def file_suffix(source: str, allowed: Sequence[str]) -> str:
    """Suffix of a file name, or "" for the id of a Hub data set (or a folder).

    Args:
        source: What the user gave.
        allowed: The suffixes that can be read.

    Raises:
        UsageError: It names a file that is missing or of another kind.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix not in allowed:
        if path.is_file():
            raise UsageError(f"{source} is a file of an unknown kind; allowed are {', '.join(allowed)}.")
        return ""
    if not path.is_file():
        raise UsageError(
            f"File not found: {source} (looked for as {path.absolute()}). Give an existing {suffix} file; a relative "
            "path starts at the working directory."
        )
    return suffix


def text_suffix(source: str) -> str:
    """Suffix of a source of text, or "" for the id of a Hub data set; see :func:`file_suffix`."""
    if not source:
        raise UsageError(
            f"The source of the text is empty; allowed are 'embedded', a file ({', '.join(TEXT_SUFFIXES)}) and the "
            "id of a Hub data set."
        )
    return file_suffix(source, TEXT_SUFFIXES)


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(_not_text(path, error)) from error


def _not_text(path: Path, error: Exception) -> str:
    return f"{path} cannot be read as UTF-8 text: {error}."


def read_json(path: Path) -> object:
    """Parse a JSON file.

    Raises:
        UsageError: It is not JSON, the message names the line; or nobody could use it.
    """
    try:
        return parse_json(read_text(path), unicode=False)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). Correct the file."
        ) from error
    except ValueError as error:
        raise UsageError(f"{path}: JSON that cannot be used: {error}. Correct the file.") from error


def read_json_list(path: Path) -> Iterator[object]:
    """Parse a JSON file that holds one list, element by element.

    Raises:
        UsageError: It is not JSON, the message names the line; or it holds something else.
    """
    import ijson

    given = 0
    try:
        with path.open("rb") as file:
            if not file.read(4096).lstrip().startswith(b"["):
                raise ijson.JSONError
            file.seek(0)
            for item in ijson.items(file, "item", use_float=True):
                yield item
                given += 1
    except (OSError, ValueError, ijson.JSONError):
        # In full: for a message with a line, and for what only Python's reader takes for JSON.
        content = read_json(path)
        if not isinstance(content, list):
            raise UsageError(
                f"{path}: a JSON {type(content).__name__}; allowed is a list of objects (Alpaca's format)."
            ) from None
        yield from content[given:]


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Parse a file with one JSON object a line, line by line; empty lines are skipped.

    Yields:
        Pairs of the place ("file, line 3", for messages) and the object.

    Raises:
        UsageError: A line is not a JSON object.
    """
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = parse_json(line, unicode=False)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise UsageError(f"{place}: not valid JSON ({reason}); each line must be one JSON object.") from error
        if not isinstance(row, dict):
            raise UsageError(f"{place}: a JSON {type(row).__name__}; each line must be one JSON object.")
        yield place, row


def _read_lines(path: Path) -> Iterator[str]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(_not_text(path, error)) from error


def read_parquet(path: Path) -> "Dataset":
    """Open a parquet file.

    Raises:
        UsageError: It is not a parquet file.
    """
    import pyarrow.parquet
    from datasets import Dataset

    try:
        return Dataset(pyarrow.parquet.read_table(path))
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(_not_parquet(path, error)) from error


def read_parquet_rows(path: Path) -> Iterator[dict[str, object]]:
    """The rows of a parquet file, a batch in memory at a time.

    Raises:
        UsageError: It is not a parquet file.
    """
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                yield from batch.to_pylist()
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UsageError(_not_parquet(path, error)) from error


def _not_parquet(path: Path, error: Exception) -> str:
    return f"{path} cannot be read as a parquet file: {error}"


def load_hub(
    source: str,
    name: str | None,
    split: str,
    revision: str | None = None,
    data_files: Mapping[str, str] | None = None,
) -> "Dataset":
    """Load one split of a Hub data set.

    Args:
        source: Its id.
        name: Its configuration.
        split: The split.
        revision: Its branch, if not the default one.
        data_files: Files by split, if not all of them.

    Raises:
        UsageError: It does not exist, cannot be reached, or has no such configuration or split.
    """
    import datasets

    # The hub client fails with many unrelated exception classes (its own, httpx's, OSError, ValueError, …): whatever
    # it says is news for the user, not a fault of this program.
    try:
        options = {"revision": revision, "data_files": dict(data_files) if data_files else None}
        given = {option: value for option, value in options.items() if value is not None}
        loaded = datasets.load_dataset(source, name, split=split, **given)
    except Exception as error:
        configuration = f", configuration {name!r}" if name else ""
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"Data set {source!r}{configuration}, split {split!r}, cannot be loaded from the Hub: "
            f"{type(error).__name__}: {reason}. Give the id of a data set that exists, a "
            "local file, or 'embedded'; the last two need no network."
        ) from error
    if not isinstance(loaded, datasets.Dataset):
        raise UsageError(f"Data set {source!r}, split {split!r}, is a {type(loaded).__name__}; give one single split.")
    return loaded


def read_column(source: str, name: str | None, split: str, column: str) -> Sequence[str]:
    """The texts of one column of a .jsonl, .parquet or Hub data set."""
    suffix = text_suffix(source)
    if suffix == ".jsonl":
        texts = []
        for place, row in read_jsonl(Path(source)):
            value = row.get(column)
            if not isinstance(value, str):
                raise UsageError(_no_column(place, column, list(row)))
            texts.append(value)
        return texts
    if suffix:
        return text_column(read_parquet(Path(source)), column, source)
    return text_column(load_hub(source, name, split), column, f"{source}, split {split!r}")


def text_column(table: "Dataset", column: str, place: str) -> Sequence[str]:
    """The texts of one column of a table; ``place`` names the table where there is no such column.

    Raises:
        UsageError: There is no such column, or it holds no text.
    """
    feature = table.features.get(column)
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise UsageError(_no_column(place, column, table.column_names))
    # A column of a table is read row by row: a corpus of millions of rows is not copied to draw ten of them.
    return _Texts(table, column, place)


class _Texts(Sequence[str]):
    """One column of a table as a sequence; an absent value is an empty text."""

    def __init__(self, table: "Dataset", column: str, place: str) -> None:
        self._table, self._column, self._place = table, column, place

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # slices are not needed
        try:
            return self._table[index][self._column] or ""
        except UnicodeDecodeError as error:
            raise UsageError(self._no_text(error)) from error

    def __iter__(self) -> Iterator[str]:
        try:
            for value in self._table[self._column]:
                yield value or ""
        except UnicodeDecodeError as error:
            raise UsageError(self._no_text(error)) from error

    def _no_text(self, error: UnicodeDecodeError) -> str:
        return f"{self._place}: column {self._column!r} holds text that is no UTF-8 ({error}). Correct the file."


def _no_column(place: str, column: str, found: Sequence[str]) -> str:
    columns = ", ".join(map(repr, found)) or "none"
    return (
        f"{place}: no column {column!r} with text; columns found: {columns}. Set `column` to the one that holds text."
    )
