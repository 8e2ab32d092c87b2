"""How the models of a row stand to their dense baselines and to each other."""

import dataclasses
import math
from collections.abc import Sequence

from slm_pl.report.figures import number_text
from slm_pl.report.rows import LESS_IS_BETTER, MORE_IS_BETTER, Cell, Quantity, Row

RATIOS: frozenset[Quantity] = frozenset({"parameters", "perplexity", "accuracy", "rate", "macs", "size"})
"""What is also told as a ratio to the dense baseline's."""


def with_ratios(row: Row, baselines: Sequence[int | None]) -> Row:
    """Puts what was retained of its dense baseline into each model's cell.

    Args:
        row: A row.
        baselines: The place of each model's baseline among the models; None for a model without one.
    """
    if row.quantity not in RATIOS:
        return row
    cells = []
    for cell, place in zip(row.cells, baselines, strict=True):
        dense = None if place is None else row.cells[place].value
        ratio = cell.value / dense if cell.value is not None and dense else math.inf
        cells.append(dataclasses.replace(cell, ratio=ratio) if math.isfinite(ratio) else cell)
    return dataclasses.replace(row, cells=cells)


def with_marks(row: Row, competing: Sequence[bool]) -> Row:
    """Marks the best figure and those that its error does not tell apart from it.

    Args:
        row: A row; sizes and what has no better direction come back unmarked.
        competing: Which models compete: the compressed ones.
    """
    indices = [index for index, cell in enumerate(row.cells) if competing[index] and cell.value is not None]
    if row.place == "data" or row.quantity not in LESS_IS_BETTER | MORE_IS_BETTER or len(indices) < 2:
        return row
    sign = 1 if row.quantity in LESS_IS_BETTER else -1
    best = row.cells[min(indices, key=lambda index: sign * _value(row.cells[index]))]
    cells = list(row.cells)
    for index in indices:
        cell = cells[index]
        if cell.value == best.value:
            cells[index] = dataclasses.replace(cell, mark="best")
        elif _tied(best, cell, row.quantity):
            cells[index] = dataclasses.replace(cell, mark="tie")
    return dataclasses.replace(row, cells=cells)


def _value(cell: Cell) -> float:
    assert cell.value is not None
    return cell.value


def _tied(best: Cell, cell: Cell, quantity: Quantity) -> bool:
    """Whether two figures differ by less than the error of their difference, their errors taken as independent."""
    a, b = _value(best), _value(cell)
    if number_text(a, quantity) == number_text(b, quantity):
        return True  # nobody could tell why one is marked and the other not
    if quantity == "perplexity" and a > 0:
        # The error is one of the mean loss, the logarithm: a ruined model's perplexity with its large error is no tie.
        return math.log(b / a) < math.hypot(best.error / a, cell.error / b)
    if best.low is not None and cell.high is not None:
        return cell.high >= best.low  # more is better of all that has an interval
    return abs(a - b) < math.hypot(best.error, cell.error)
