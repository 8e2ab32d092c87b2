"""How figures of a comparison are written."""

from slm_pl.comparison import Cell, Quantity


def number_text(value: float, quantity: Quantity) -> str:
    """A number with its unit, in as many digits as say something."""
    if quantity == "count":
        return f"{value:,.0f}"
    if quantity == "parameters":
        return f"{value / 1e9:,.2f} B" if value >= 1e9 else f"{value / 1e6:,.1f} M" if value >= 1e5 else f"{value:,.0f}"
    if quantity == "perplexity":
        # A ruined model's digits say nothing.
        return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else _rounded(value)
    if quantity in ("accuracy", "share"):
        return f"{100 * value:.1f} %"
    if quantity == "seconds":
        return f"{value:,.2f} s" if value >= 1 else f"{1000 * value:,.1f} ms"
    if quantity == "rate":
        return f"{value:,.1f}"
    return f"{value / 2**30:,.1f} GiB" if value >= 10 * 2**30 else f"{value / 2**20:,.0f} MiB"


def _rounded(value: float) -> str:
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def cell_text(cell: Cell, quantity: Quantity) -> str:
    """A figure with its standard error, and its ratio to the dense model's."""
    if cell.value is None:
        return "–"
    text = number_text(cell.value, quantity)
    if cell.stderr is not None:
        if quantity == "accuracy":
            text = f"{100 * cell.value:.1f} ± {100 * cell.stderr:.1f} %"
        elif quantity == "perplexity" and cell.value >= 1e6:
            text += f" ± {_rounded(cell.stderr)}"
        else:
            # As many digits as the value has, but never an error of zero.
            text += f" ± {cell.stderr:,.{2 if cell.value < 1000 or cell.stderr < 1 else 0}f}"
    if cell.ratio is not None:
        text += f" ({cell.ratio:.2f}×)" if quantity == "rate" else f" ({100 * cell.ratio:.1f} %)"
    return text
