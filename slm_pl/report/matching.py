"""Figures that models were measured with on their way into rows: one protocol, one row."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from slm_pl.report import protocols
from slm_pl.report.rows import Cell, Place, Protocol, Quantity, Row, one_line
from slm_pl.results import Results

NOT_MEASURED = "not measured"
_PLACES: tuple[Place, ...] = ("table", "page", "data")  # from where all look to where few do


@dataclass(frozen=True)
class Figure:
    """A figure of one model on its way into a row.

    Args:
        subject: What was measured, however it was measured.
        row: The row that it belongs to, still without cells.
        cell: The figure.
        differences: Tells in what its protocol differs from another one.
    """

    subject: str
    row: Row
    cell: Cell
    differences: Callable[[Protocol], str]


def figure(
    subject: str,
    name: str,
    title: str,
    quantity: Quantity,
    protocol: Protocol,
    cell: Cell,
    place: Place = "table",
    exact: dict[str, str] | None = None,
) -> Figure:
    """A figure of a row whose protocol is told field by field.

    Args:
        subject: As of :class:`Figure`.
        name: Of the row.
        title: Of the row.
        quantity: Of the row.
        protocol: Of the row.
        cell: The figure.
        place: Of the row.
        exact: Better words for fields of the protocol.
    """
    row = Row(name, one_line(title), quantity, [], protocol, place)
    return Figure(subject, row, cell, lambda here: protocols.differences(protocol, here, exact))


def lined_up(
    records: list[Results],
    figures_of: Callable[[Results], Iterable[Figure]],
    reason_of: Callable[[Results, Row], str | None],
    worth: Callable[[Row], bool] = lambda row: True,
) -> list[Row]:
    """Puts figures of the same protocol into rows, and the reason into the cells of models that lack one.

    Args:
        records: The models.
        figures_of: A model's figures.
        reason_of: Why a model has no figure in a row; None if nobody left word.
        worth: Whether a row is worth showing.
    """
    found = [_keyed(list(figures_of(record))) for record in records]
    rows = []
    for key in dict.fromkeys(key for one in found for key in one):
        same = [one[key] for one in found if key in one]
        row = min((figure.row for figure in same), key=lambda row: _PLACES.index(row.place))
        cells = [
            one[key].cell if key in one else _absent(reason_of(record, row), same[0], list(one.values()))
            for record, one in zip(records, found, strict=True)
        ]
        rows.append(dataclasses.replace(row, cells=cells))
    return _told_apart([row for row in rows if worth(row)])


def _keyed(figures: list[Figure]) -> dict[tuple[str, str], Figure]:
    """A model's figures by their rows; the figures of a point share one protocol, which is written down once."""
    shared = {id(figure.row.protocol): figure.row.protocol for figure in figures}
    frozen = {number: protocols.frozen(protocol) for number, protocol in shared.items()}
    return {(figure.row.name, frozen[id(figure.row.protocol)]): figure for figure in figures}


def _absent(reason: str | None, wanted: Figure, own: list[Figure]) -> Cell:
    """The cell of a model that was not measured with a row's protocol."""
    protocol = wanted.row.protocol
    same = [figure for figure in own if figure.subject == wanted.subject]
    if reason is None and same:
        nearest = min(same, key=lambda figure: len(protocols.differing_fields(figure.row.protocol, protocol)))
        reason = f"measured with {nearest.differences(protocol)}"
    return Cell(None, reason=one_line(reason or NOT_MEASURED))


def _told_apart(rows: list[Row]) -> list[Row]:
    """Adds to equal titles what the rows' protocols differ in."""
    titles = [row.title for row in rows]
    apart = []
    for row in rows:
        others = [other.protocol for other in rows if other.title == row.title and other is not row]
        if titles.count(row.title) > 1:
            fields = dict.fromkeys(name for other in others for name in protocols.differing_fields(other, row.protocol))
            if all(isinstance(row.protocol[name], dict) for name in fields):  # a mean's tasks
                told = f"protocol {protocols.fingerprint(row.protocol)}"
            else:
                told = ", ".join(protocols.field_text(name, row.protocol[name]) for name in fields)
            row = dataclasses.replace(row, title=one_line(f"{row.title.removesuffix(')')}, {told})"))
        apart.append(row)
    return apart


def cell_of(
    record: Results, place: str, value: float | None, stderr: float | None = None, n: int | None = None
) -> Cell:
    """A figure, or why there is none.

    Args:
        record: The model's.
        place: Where the figure stands in the record.
        value: The figure.
        stderr: Its standard error.
        n: How many are behind it.
    """
    if value is None or not math.isfinite(value):
        return Cell(None, reason=one_line(record.missing.get(place, "not a finite number")))
    return Cell(value, stderr if stderr is not None and math.isfinite(stderr) else None, n=n)
