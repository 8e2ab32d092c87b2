"""A row of a comparison: one quantity of several models, measured with one protocol."""

from dataclasses import dataclass, field
from typing import Literal

Quantity = Literal[
    "count",
    "parameters",
    "share",
    "perplexity",
    "accuracy",
    "agreement",
    "divergence",
    "seconds",
    "rate",
    "bytes",
    "joules",
    "macs",
    "size",
    "speedup",
    "promise",
    "number",
    "text",
]
Place = Literal["table", "page", "data"]
Mark = Literal["best", "tie"]
Protocol = dict[str, object]
"""Everything that two figures must share to stand in one row, by name; JSON values."""

LESS_IS_BETTER: frozenset[Quantity] = frozenset({"perplexity", "divergence", "seconds", "bytes", "joules"})
MORE_IS_BETTER: frozenset[Quantity] = frozenset({"accuracy", "agreement", "rate", "speedup"})
MACHINE: frozenset[Quantity] = frozenset({"seconds", "rate", "bytes", "joules", "speedup"})
"""What depends on the machine that it was measured on."""


@dataclass(frozen=True)
class Cell:
    """One figure of one model.

    Args:
        value: In the row's unit; None if it is absent.
        stderr: Its standard error, where there is one.
        ratio: ``value`` over the dense baseline's, in rows that have it.
        reason: Why ``value`` is absent.
        spread: Standard deviation over the repeats of a timing.
        n: Questions, tokens, words or repeats behind ``value``.
        mark: Whether it is the best of the compressed models, or inside the error of the best.
        low: Lower end of the confidence interval of a paired speed-up.
        high: Its upper end.
        confidence: Probability that the interval covers the true value.
        text: What stands in a row of texts, which has no values.
    """

    value: float | None
    stderr: float | None = None
    ratio: float | None = None
    reason: str | None = None
    spread: float | None = None
    n: int | None = None
    mark: Mark | None = None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    text: str | None = None

    @property
    def error(self) -> float:
        """The standard error or, of a timing, the spread; 0 if it is not known."""
        return self.stderr if self.stderr is not None else self.spread or 0.0


@dataclass(frozen=True)
class Row:
    """One quantity of all models, measured with one protocol.

    Args:
        name: Stable name, such as ``zero_shot.boolq.acc.3270``: it does not depend on the other models.
        title: For people; only what is not usual of the protocol is in it.
        quantity: What kind of number it is; accuracy is a fraction, memory is in bytes, time in seconds. ``bytes`` are
            measured, ``size`` is of bytes by arithmetic; a ``speedup`` is measured, a ``promise`` is one by arithmetic.
        cells: One per model, in the comparison's order.
        protocol: How all of them were measured.
        place: ``table`` stands everywhere, ``page`` only where there is room (HTML, CSV, JSON), ``data`` only in CSV
            and JSON.
        show_ratio: Whether people are told the ratio in the table, not only where they ask for it.
    """

    name: str
    title: str
    quantity: Quantity
    cells: list[Cell]
    protocol: Protocol = field(default_factory=dict)
    place: Place = "table"
    show_ratio: bool = False

    @property
    def drawn(self) -> bool:
        """Whether pictures may show it; the memory of a large grid, too, for which the table has no room."""
        return self.place == "table" or (self.place == "page" and self.quantity == "bytes")


def one_line(text: str) -> str:
    """A text from a file as one line that any output can hold: no control characters, no halves of surrogate pairs."""
    if not text.isprintable():
        text = "".join(char if char.isprintable() else " " for char in text.encode(errors="replace").decode())
    return " ".join(text.split())
