"""What the user sees in the terminal."""

import contextlib
from collections.abc import Callable, Iterator

LOAD_EXAMPLE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")"""
"""What to say of an exported checkpoint."""


@contextlib.contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Shows a progress bar on the first rank while something takes longer than two seconds.

    Args:
        description: What is being done.
        total: Number of steps; None for a search whose length is not known.

    Yields:
        A function to call after each step, with a short text about it.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_only
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, disable=getattr(rank_zero_only, "rank", 0) != 0) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda note: bar.update(task, advance=1, note=note)
