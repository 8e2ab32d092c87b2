"""What a test has measured so far, so that one that was killed does not measure it again."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from slm_pl import files, identity
from slm_pl.documents import parse_json
from slm_pl.errors import UsageError
from slm_pl.results import FormError, decode
from slm_pl.sealing import is_whole, sealed

NAME = ".results.partial.json"

_T = TypeVar("_T")


class Journal:
    """The finished figures of a test whose ``results.json`` is not written yet.

    They are kept in a hidden file of the run directory. What it holds of another model, environment or program, or a
    file that is damaged, counts as nothing.

    Args:
        directory: The run directory.
        about: All that decides the figures beside what a hook is asked; JSON values.
    """

    def __init__(self, directory: str | os.PathLike[str], about: object) -> None:
        self._path = Path(directory) / NAME
        self._about = identity.digest([identity.sources(), about])
        self._parts: dict[str, object] = {}
        self.found = 0
        """How many figures were there already."""

    def open(self) -> "Journal":
        """Reads what an earlier test left."""
        try:
            record = parse_json(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self
        if isinstance(record, dict) and is_whole(record) and record.get("about") == self._about:
            self._parts = record["parts"]
        return self

    def find(self, asked: object, form: type[_T]) -> _T | None:
        """A figure, if it is there.

        Args:
            asked: What was asked and how; JSON values, or what has a text of its own.
            form: The dataclass of the answer.
        """
        try:
            value = decode(form, self._parts[_key(asked, form)])
        except (KeyError, FormError):
            return None
        self.found += 1
        return value

    def keep(self, asked: object, value: object) -> None:
        """Adds a figure, a dataclass, and writes it down; where that cannot be, the figure itself is not lost."""
        assert dataclasses.is_dataclass(value)
        self._parts[_key(asked, type(value))] = dataclasses.asdict(value)  # type: ignore[arg-type]
        # Not finite numbers are kept as they are: this file is nobody else's.
        try:
            files.write_text(self._path, json.dumps(sealed({"about": self._about, "parts": self._parts})))
        except UsageError as error:
            rank_zero_warn(f"What is measured is not kept for the case that this test is stopped: {error}")

    def close(self) -> None:
        """Removes the file: everything stands in ``results.json``."""
        self._path.unlink(missing_ok=True)


def _key(asked: object, form: type) -> str:
    return f"{form.__name__} {json.dumps(asked, sort_keys=True, default=str)}"
