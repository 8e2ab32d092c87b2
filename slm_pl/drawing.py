"""What all pictures share: colours, a figure that touches nothing global, its title, and its PNG or SVG."""

import contextlib
import io
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; black and yellow left out.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
GREY = "#555555"


def is_number(value: object) -> bool:
    """Whether a value, which may come from a stranger's file, can be drawn."""
    return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < 1e300


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """Takes a ``$`` in a name for what it is, not for the beginning of a formula."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this size in inches."""
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot's: nothing global is touched, and it is drawn by Agg.
    return Figure(figsize=(width, height), layout="constrained")


def set_title(figure: "Figure", text: str) -> None:
    """Writes a line at the top, shortened to fit."""
    shown = shortened(text, int(figure.get_figwidth() * 11))  # characters in a line
    figure.suptitle(shown, fontsize=10, fontweight="bold", x=0.01, ha="left")


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters; halves of surrogate pairs, which cannot be drawn, become ``?``."""
    text = text[: most + 1].encode(errors="replace").decode()
    return text if len(text) <= most else text[: most - 1] + "…"


def wrapped(text: str, width: int) -> str:
    """A text as up to three lines of this many characters."""
    lines = textwrap.wrap(text, width)
    return "\n".join(lines[:3]) + ("…" if len(lines) > 3 else "")


def plain(axes: "Axes") -> None:
    """Takes away the frame's upper and right lines, and makes the ticks' labels small."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=GREY)


def to_png(figure: "Figure") -> bytes:
    """Draws a figure; the same one gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: "Figure") -> bytes:
    """Draws a figure as lines and letters, in the reader's fonts; the same one gives the same bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # Names of the parts come of the salt and not of chance, and the file does not say when it was drawn.
    with rc_context({"svg.hashsalt": "slm_pl", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
