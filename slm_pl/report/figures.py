"""How figures of a comparison are written."""

from slm_pl.report.rows import Cell, Quantity

UNITS: dict[Quantity, tuple[float, str]] = {
    "count": (1, ""),
    "parameters": (1e6, " (million)"),
    "perplexity": (1, ""),
    "accuracy": (0.01, " (%)"),
    "agreement": (0.01, " (%)"),
    "divergence": (1, ""),
    "seconds": (1, " (s)"),
    "rate": (1, ""),
    "bytes": (2**20, " (MiB)"),
    "share": (0.01, " (%)"),
    "joules": (1, " (J)"),
    "macs": (1e6, " (million)"),
    "size": (2**10, " (KiB)"),
    "speedup": (1, " (×)"),
    "promise": (1, " (×)"),
    "number": (1, ""),
    "text": (1, ""),
}
"""What axes are labelled in: the unit's size and name."""

_SIZES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_COUNTS = ((10**12, "T"), (10**9, "G"), (10**6, "M"))
_MOST_TIMES = 1000  # a ratio beyond says only that nothing is left


def number_text(value: float, quantity: Quantity) -> str:
    """A number with its unit, in as many digits as say something."""
    if quantity == "count":
        return f"{value:,.0f}"
    if quantity == "parameters":
        return f"{value / 1e9:,.2f} B" if value >= 1e9 else f"{value / 1e6:,.1f} M" if value >= 1e5 else f"{value:,.0f}"
    if quantity == "perplexity":
        # A ruined model's digits say nothing.
        return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else _rounded(value)
    if quantity in ("accuracy", "agreement", "share"):
        return f"{100 * value:.1f} %"
    if quantity == "divergence":
        return f"{value:.3f}"
    if quantity == "seconds":
        return f"{value:,.2f} s" if value >= 1 else f"{1000 * value:,.1f} ms"
    if quantity == "rate":
        return f"{value:,.1f}"
    if quantity == "bytes":
        return f"{value / 2**30:,.1f} GiB" if value >= 10 * 2**30 else f"{value / 2**20:,.0f} MiB"
    if quantity == "size":
        least, unit = next(((least, unit) for least, unit in _SIZES if value >= least), (1, ""))
        return f"{value / least:,.1f} {unit}" if unit else f"{value:,.0f} B"
    if quantity == "joules":
        return f"{value:,.2f} J" if value >= 1 else f"{1000 * value:,.1f} mJ"
    if quantity == "macs":
        least, unit = next(((least, unit) for least, unit in _COUNTS if value >= least), (1, ""))
        return f"{value / least:,.2f} {unit}" if unit else f"{value:,.0f}"
    if quantity in ("speedup", "promise"):
        return f"{value:,.2f}×"
    return f"{value:.4g}"


def _rounded(value: float) -> str:
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def ratio_text(ratio: float, quantity: Quantity) -> str:
    """A ratio to the dense model's figure: a share of what can only shrink, times for what can grow."""
    if quantity in ("parameters", "accuracy", "macs", "size"):
        return f"{100 * ratio:.1f} %"
    if ratio > _MOST_TIMES:
        return f">{_MOST_TIMES:,}×"
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×" if ratio < 100 else f"{ratio:.0f}×"


def figure_text(cell: Cell, quantity: Quantity) -> str:
    """A figure with its standard error or its interval."""
    if cell.value is None:
        return "–" if cell.text is None else cell.text
    text = number_text(cell.value, quantity)
    if cell.low is not None and cell.high is not None:
        return f"{text} [{cell.low:,.2f}, {cell.high:,.2f}]"
    if cell.stderr is None:
        return text
    if quantity in ("accuracy", "agreement"):
        return f"{100 * cell.value:.1f} ± {100 * cell.stderr:.1f} %"
    if quantity == "divergence":
        return f"{text} ± {cell.stderr:.3f}"
    if quantity == "perplexity" and cell.value >= 1e6:
        return f"{text} ± {_rounded(cell.stderr)}"
    if quantity == "number":
        return f"{text} ± {cell.stderr:.2g}"
    # As many digits as the value has, but never an error of zero.
    return f"{text} ± {cell.stderr:,.{2 if cell.value < 1000 or cell.stderr < 1 else 0}f}"


def cell_text(cell: Cell, quantity: Quantity, with_ratio: bool = True) -> str:
    """A figure with its standard error, and its ratio to the dense model's."""
    text = figure_text(cell, quantity)
    return f"{text} ({ratio_text(cell.ratio, quantity)})" if with_ratio and cell.ratio is not None else text
