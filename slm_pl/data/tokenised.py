"""Tokenised examples on disk: made once for each content, tokenizer and setting, then mapped into memory."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from slm_pl import files

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""Version of what the cached columns mean."""


def fingerprint(tokenizer: "PreTrainedTokenizerBase", settings: Mapping[str, object], texts: Iterable[object]) -> str:
    """Sha256 of everything that decides the token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    digest = hashlib.sha256(known.encode())
    special = {"format": FORMAT, "eos": tokenizer.eos_token_id, "chat_template": tokenizer.chat_template, **settings}
    special |= {"class": type(tokenizer).__name__, "empty": tokenizer("")["input_ids"]}
    digest.update(json.dumps(special, sort_keys=True).encode())
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()


def tokenised(
    rows: "Dataset",
    function: Callable[[dict[str, list[object]], list[int]], Mapping[str, Sequence[object]]],
    key: str,
    batch_size: int = 1000,
) -> "Dataset":
    """Runs ``function`` over rows in batches and keeps what it returns in Arrow's format in the cache directory.

    Args:
        rows: The texts; not kept.
        function: Takes columns and the numbers of their rows, returns columns, of any length.
        key: Their :func:`fingerprint`; an entry of that name is used again.
        batch_size: Rows that ``function`` gets at once.
    """
    from datasets import Dataset
    from pyarrow import ArrowException

    path = files.cache_directory() / "tokenised" / f"{key}.arrow"
    if path.is_file():
        try:
            return Dataset.from_file(str(path))
        except (OSError, ArrowException):  # a disk that was full
            path.unlink()
    files.make_directory(path.parent)
    return rows.map(
        function,
        with_indices=True,
        batched=True,
        batch_size=batch_size,
        remove_columns=rows.column_names,
        cache_file_name=str(path),  # written under a temporary name and moved, so it is whole or absent
        new_fingerprint=key[:16],
        desc="Tokenising",
    )
