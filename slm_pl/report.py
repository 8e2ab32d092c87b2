"""A comparison as a table on the terminal, ``comparison.md``, ``comparison.json`` and ``comparison.png``.

Where perplexity and speed of several models compare, ``pareto.png`` shows what each pays for its speed.
"""

import dataclasses
import json
import textwrap
from collections.abc import Sequence

from slm_pl.charts import comparison_bars, pareto_plot
from slm_pl.comparison import Comparison, line_up
from slm_pl.console import brings_code, load_example
from slm_pl.figures import cell_text
from slm_pl.files import write_bytes, write_text
from slm_pl.results import SCHEMA_VERSION, Results


def compare(paths: Sequence[str], output_dir: str | None = None) -> Comparison:
    """Prints results.json files side by side and writes comparison.md, .json and .png, and pareto.png.

    Args:
        paths: The results.json files; a dense baseline (without a plan) is put first, the others stay in this order.
        output_dir: Where to write; the directory that holds the run directories by default.

    Returns:
        The table.

    Raises:
        UsageError: If a file cannot be read, or the output not be written.
    """
    comparison = line_up(paths, output_dir)
    directory = comparison.output_dir
    pareto = pareto_plot(comparison)
    write_text(directory / "comparison.md", _markdown(comparison, pareto is not None))
    write_text(directory / "comparison.json", _as_json(comparison))
    write_bytes(directory / "comparison.png", comparison_bars(comparison))
    if pareto is None:
        (directory / PARETO).unlink(missing_ok=True)  # of other models, by an earlier run
    else:
        write_bytes(directory / PARETO, pareto)
    _print(comparison, pareto is not None)
    return comparison


PARETO = "pareto.png"
_WIDEST = 5  # models beside each other; more stand below each other


def _table(comparison: Comparison) -> tuple[list[str], list[list[str]], list[str]]:
    """Heads of the columns, the lines, and the footnotes that dashes refer to; many models are a line each."""
    lines, notes = _texts(comparison)
    if len(comparison.labels) <= _WIDEST:
        return ["", *comparison.labels], lines, notes
    titles = [line[0] for line in lines]
    models = [[label, *cells] for label, *cells in zip(comparison.labels, *(line[1:] for line in lines), strict=True)]
    return ["", *titles], models, notes


def _texts(comparison: Comparison) -> tuple[list[list[str]], list[str]]:
    """The quantities' lines, title first, and the footnotes that their dashes refer to."""
    notes: list[str] = []
    lines = []
    for row in comparison.rows:
        line = [row.title]
        for cell in row.cells:
            text = cell_text(cell, row.quantity)
            if cell.reason is not None:
                if cell.reason not in notes:
                    notes.append(cell.reason)
                text += f" [{notes.index(cell.reason) + 1}]"
            line.append(text)
        lines.append(line)
    return lines, notes


def _environment_line(label: str, record: Results) -> str:
    environment = record.environment
    threads = "" if environment.device.startswith("cuda") else f", {environment.threads} threads"
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    return (
        f"{label}: {environment.device} ({environment.device_name}{threads}), {environment.dtype}, {environment.date}; "
        f"{packages}"
    )


def _markdown(comparison: Comparison, pareto: bool) -> str:
    heads, lines, notes = _table(comparison)

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    parts = [
        "# Comparison",
        "\n".join([line(heads), "|---" + "|---:" * (len(heads) - 1) + "|", *map(line, lines)]),
        "\n".join(f"[{index}] {note}  " for index, note in enumerate(notes, 1)),
        "\n\n".join(f"**Warning:** {warning}" for warning in comparison.warnings),
        "± is one standard error. Ratios are against the dense baseline."
        if comparison.baseline
        else "± is one standard error.",
        "![The same figures as bars](comparison.png)",
        f"![Perplexity against speed]({PARETO})" if pareto else "",
        "\n".join(
            f"- {_environment_line(label, record)}"
            for label, record in zip(comparison.labels, comparison.records, strict=True)
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _as_json(comparison: Comparison) -> str:
    models = [
        {
            **dataclasses.asdict(record.model),
            "label": label,
            "results": str(path),
            "environment": dataclasses.asdict(record.environment),
        }
        for label, path, record in zip(comparison.labels, comparison.paths, comparison.records, strict=True)
    ]
    record = {
        "schema_version": SCHEMA_VERSION,
        "baseline": comparison.labels[0] if comparison.baseline else None,
        "models": models,
        "rows": [dataclasses.asdict(row) for row in comparison.rows],
        "warnings": comparison.warnings,
    }
    return json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _print(comparison: Comparison, pareto: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heads, lines, notes = _table(comparison)
    quantities = len(comparison.labels) <= _WIDEST
    rooms = [row.name.partition(".")[0].removeprefix("num_") for row in comparison.rows]
    console = Console()

    def table_of(columns: list[int]) -> Table:
        table = Table(title="Comparison")
        table.add_column("", overflow="fold")
        for column in columns:
            head = heads[column] if quantities else "\n".join(textwrap.wrap(heads[column], 16))
            table.add_column(Text(head), justify="right", overflow="fold", no_wrap=not quantities)
        for index, line in enumerate(lines):
            if quantities and index and rooms[index] != rooms[index - 1] and rooms[index - 1] != "layers":
                table.add_section()
            table.add_row(*(Text(line[column]) for column in (0, *columns)))
        return table

    def width(columns: list[int]) -> int:
        return console.measure(table_of(columns), options=console.options.update(width=10_000)).maximum

    columns = list(range(1, len(heads)))
    if not console.is_terminal:
        # In a file or a pipe nothing limits the width, and folded cells are hard to read.
        console = Console(width=max(80, width(columns)))
    groups = [columns]
    while not quantities and len(groups[-1]) > 1 and width(groups[-1]) > console.width:
        # Numbers are not folded: what does not fit beside the others goes into a table of its own below.
        fitting = next((n for n in range(len(groups[-1]) - 1, 1, -1) if width(groups[-1][:n]) <= console.width), 1)
        groups[-1:] = [groups[-1][:fitting], groups[-1][fitting:]]
    for group in groups:
        console.print(table_of(group))
    for index, note in enumerate(notes, 1):
        console.print(Text(f"[{index}] {note}", style="dim"))
    for warning in comparison.warnings:
        console.print(Text(f"Warning: {warning}", style="yellow"))
    console.print(
        Text(
            f"Written: {comparison.output_dir}/comparison.md, comparison.json, comparison.png" + f", {PARETO}" * pareto
        ),
        soft_wrap=True,
    )
    if comparison.export is not None:
        console.print(Text(f"\nThe compressed model: {comparison.export}\nLoad it with"), soft_wrap=True)
        console.print(
            Text(load_example(comparison.export, brings_code(comparison.export)), style="bold"), soft_wrap=True
        )
