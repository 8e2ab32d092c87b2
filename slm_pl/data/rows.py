"""Instruction rows, streamed from their source into an Arrow file: however many there are, memory holds a few."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from slm_pl import files
from slm_pl.data.embedded import docstring_rows
from slm_pl.data.readers import file_suffix, load_hub, read_json_list, read_jsonl, read_parquet_rows
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

_SUFFIXES = (".json", ".jsonl", ".parquet")
_TOGETHER = 1000
"""Rows of a record batch."""


class Row(TypedDict):
    """One row of Alpaca."""

    instruction: str
    input: str
    output: str


@contextlib.contextmanager
def rows_on_disk(path: str) -> Iterator["Dataset"]:
    """The rows of a source as a table that is mapped into memory, for as long as the block lasts.

    Args:
        path: As in :func:`read_rows`.

    Yields:
        Columns ``instruction``, ``input`` and ``output``, in the order of the source.

    Raises:
        UsageError: The source cannot be used, or the cache directory cannot be written.
    """
    import pyarrow
    from datasets import Dataset

    columns = list(Row.__annotations__)
    schema = pyarrow.schema([(column, pyarrow.large_string()) for column in columns])
    with files.scratch(files.cache_directory() / "rows.arrow") as place:
        rows = read_rows(path)
        with pyarrow.OSFile(str(place), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            while some := list(itertools.islice(rows, _TOGETHER)):
                writer.write_batch(pyarrow.RecordBatch.from_pylist(some, schema))
        yield Dataset.from_file(str(place))


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a source, one after the other.

    Args:
        path: Hub id, a ``.json`` (list of objects), ``.jsonl`` or ``.parquet`` file, or ``embedded``.

    Raises:
        UsageError: It cannot be read, or a row is not one of Alpaca's; the message names the row.
    """
    if path == "embedded":
        for row in docstring_rows("train"):
            yield {"instruction": row["instruction"], "input": row["input"], "output": row["output"]}
        return
    suffix = file_suffix(path, _SUFFIXES)
    placed: Iterable[tuple[str, object]]
    if suffix == ".jsonl":
        placed = read_jsonl(Path(path))
    elif suffix == ".json":
        placed = ((f"{path}, item {number}", item) for number, item in enumerate(read_json_list(Path(path)), 1))
    else:
        table = read_parquet_rows(Path(path)) if suffix == ".parquet" else load_hub(path, None, "train")
        placed = ((f"{path}, row {number}", row) for number, row in enumerate(table, 1))
    for place, found in placed:
        yield {
            "instruction": text_field(place, found, "instruction"),
            "input": text_field(place, found, "input", optional=True),
            "output": text_field(place, found, "output"),
        }


def text_field(place: str, row: object, column: str, *, optional: bool = False) -> str:
    """One text column of a row; an absent or null optional one is "", a null output too (such rows are left out).

    Raises:
        UsageError: It is no text, or holds half a surrogate pair.
    """
    if not isinstance(row, dict):
        raise UsageError(f"{place}: a JSON {type(row).__name__}; each row must be an object with named columns.")
    value = row.get(column)
    if value is None and (optional or (column == "output" and column in row)):
        return ""
    if not isinstance(value, str):
        found = ", ".join(map(repr, row)) or "none"
        raise UsageError(
            f"{place}: no text in column {column!r}; columns found: {found}. Needed are 'instruction' and 'output', "
            "and optionally 'input', each a string: rename the columns."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{place}: the text in column {column!r} is no Unicode: {error}. Correct it.") from error
    return value
