"""What the user sees in the terminal."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

OWN_CODE = "modeling_pruned"
"""Module of a checkpoint whose layers differ in width."""

_LOAD_EXAMPLE = """\
{needs}from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{path}"{options})
tokenizer = AutoTokenizer.from_pretrained("{path}")"""


def load_example(path: str, own_code: bool, quantised: bool = False) -> str:
    """What to say of an exported checkpoint.

    Args:
        path: Where it is.
        own_code: Whether its layers differ in width, so that it brings the code that loads it.
        quantised: Whether its weights are int8, so that transformers needs torchao.
    """
    needs = "# needs torchao: pip install torchao\n" if quantised else ""
    return _LOAD_EXAMPLE.format(path=path, options=", trust_remote_code=True" if own_code else "", needs=needs)


def brings_code(path: str) -> bool:
    """Whether a checkpoint directory brings the code that loads it."""
    return (Path(path) / f"{OWN_CODE}.py").is_file()


def bar_columns() -> "tuple[ProgressColumn, ...]":
    """What a bar shows: its description, how far it is, the time, and the field ``note``."""
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

    return (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )


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
    from rich.progress import Progress

    with Progress(*bar_columns(), disable=getattr(rank_zero_only, "rank", 0) != 0) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda note: bar.update(task, advance=1, note=note)
