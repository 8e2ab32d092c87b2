"""What the user sees in the terminal."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

OWN_CODE = "modeling_pruned"
"""Module of a checkpoint whose layers differ in width."""

By = Literal["stock", "own code", "package"]
"""What loads a checkpoint: transformers, with the code that it brings if its layers differ in width; or this package,
which needs no code of its."""


def load_example(path: str, by: By = "stock", quantised: bool = False) -> str:
    """What to say of an exported checkpoint.

    Args:
        path: Where it is.
        by: What loads it.
        quantised: Whether its weights are int8, so that transformers needs torchao.
    """
    lines = ["# needs torchao: pip install torchao"] if quantised else []
    if by == "package":
        lines += ["from slm_pl.export import load_compressed", f"model, tokenizer, plans = load_compressed({path!r})"]
        return "\n".join(lines)
    options = ", trust_remote_code=True" if by == "own code" else ""
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = AutoModelForCausalLM.from_pretrained({path!r}{options})",
        f"tokenizer = AutoTokenizer.from_pretrained({path!r})",
    ]
    return "\n".join(lines)


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
