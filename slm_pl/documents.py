"""Files that may come from a stranger, parsed: what comes out can be walked, copied, printed and written."""

import json
from typing import Any

_DEEPEST = 100
"""Levels of lists and objects; what copies, hashes or writes a document goes down by a few calls for each."""
_MOST_VALUES = 100_000
"""Of what a few lines of YAML may stand for."""
_MOST_DIGITS = 100
"""Of a whole number; sums and ratios of such still fit a float."""


def parse_json(text: str | bytes, unicode: bool = True) -> Any:
    """Parses JSON, and refuses what would only fail later, where nobody knows the file any more.

    Args:
        text: Of the file.
        unicode: Refuse half surrogate pairs, which JSON can spell and no file can hold. Without it, the reader does so
            for those texts that it uses.

    Raises:
        ValueError: If it is no JSON (then a ``JSONDecodeError``), is nested too deeply, or holds a number that is too
            long, or half a surrogate pair.
    """
    try:
        value = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    _check_depth(value)
    if unicode:
        _check_unicode(value)
    return value


def check_yaml(value: object) -> None:
    """Refuses a YAML document that stands for more than it says.

    An alias of an alias, and so on, names exponentially many values, and one of a list inside that list endlessly many.

    Raises:
        ValueError: If it holds too many values, is nested too deeply, or holds a number that is too long.
    """
    _check_depth(value, _MOST_VALUES)
    _check_numbers(value)


def _check_numbers(value: object) -> None:
    if isinstance(value, int) and abs(value) >= 10**_MOST_DIGITS:
        raise ValueError(f"a whole number of more than {_MOST_DIGITS} digits")
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _check_numbers(part)


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits; allowed are {_MOST_DIGITS}")
    return int(digits)


def _check_depth(value: object, most: int | None = None) -> None:
    """Goes through a document level by level, since what goes down by calling itself would fail on it."""
    level, values = [value], 1
    for _ in range(_DEEPEST + 1):
        outer = [one for one in level if isinstance(one, dict | list)]
        if not outer:
            return
        level = []
        for one in outer:
            level += one.values() if isinstance(one, dict) else one
            if most is not None and values + len(level) > most:
                raise ValueError(f"it stands for more than {most:,} values; aliases of aliases may")
        values += len(level)
    raise ValueError(_too_deep())


def _too_deep() -> str:
    return f"it is nested more than {_DEEPEST} levels deep"


def _check_unicode(value: object) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the text {value[:40]!r} holds half a surrogate pair, which is no Unicode") from None
    elif isinstance(value, dict):
        for name, part in value.items():
            _check_unicode(name)
            _check_unicode(part)
    elif isinstance(value, list):
        for part in value:
            _check_unicode(part)
