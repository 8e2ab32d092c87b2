"""Files that tell whether they are as they were written: a record carries the sha256 of the rest of itself."""

import hashlib
import json
import os
from collections.abc import Mapping

SEAL = "sha256"


def sealed(record: Mapping[str, object]) -> dict[str, object]:
    """The record with its seal behind the other entries; one that it had goes."""
    apart = {name: part for name, part in record.items() if name != SEAL}
    return {**apart, SEAL: _sha256(apart)}


def is_whole(record: Mapping[str, object]) -> bool:
    """Whether a record is as it was sealed; one without a seal counts as whole."""
    return SEAL not in record or record[SEAL] == _sha256({name: part for name, part in record.items() if name != SEAL})


def _sha256(record: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def broken_seal(path: str | os.PathLike[str]) -> str:
    """What to tell the user about a file whose seal does not fit."""
    return (
        f"{path} is not as it was written: its content does not fit its sha256. It was damaged, or edited by hand. Get "
        f'it again; if you changed it on purpose, delete its "{SEAL}" entry.'
    )
