"""A comparison on the terminal, and as files: Markdown, LaTeX, CSV, JSON, a web page, and pictures.

``comparison.png`` shows every quantity as bars, ``pareto.png`` what each model pays for its quality, and
``comparison_efficiency.png`` speed over the batch, the parts of latency and of memory.
"""

import textwrap
from collections.abc import Sequence

from slm_pl.console import brings_code, load_example
from slm_pl.files import write_bytes, write_text
from slm_pl.quantization import INT8
from slm_pl.report import exports, protocols, tables, webpage
from slm_pl.report.charts import comparison_bars
from slm_pl.report.comparison import Comparison, line_up
from slm_pl.report.efficiency_charts import efficiency_plot
from slm_pl.report.pareto import MOST_NAMED, pareto_plot
from slm_pl.report.rows import one_line
from slm_pl.report.tables import Entry

BARS, PARETO, EFFICIENCY = "comparison.png", "pareto.png", "comparison_efficiency.png"


def compare(paths: Sequence[str], output_dir: str | None = None, cards: bool = False) -> Comparison:
    """Prints results.json files side by side; writes comparison.md, .json, .csv, .tex and .html, and three pictures.

    Args:
        paths: The results.json files; a dense baseline (without a plan) is put first, the others stay in this order.
        output_dir: Where to write; the directory that holds the run directories by default.
        cards: Also put the figures into the model cards of the exports that were measured.

    Returns:
        The table.

    Raises:
        UsageError: If a file cannot be read, or the output not be written.
    """
    comparison = line_up(paths, output_dir)
    directory = comparison.output_dir
    measured = zip(comparison.labels, comparison.records, strict=True)
    few = len(comparison.labels) <= MOST_NAMED
    grids = [(label, record.efficiency) for label, record in measured]
    drawn = {
        PARETO: ("Quality against cost", pareto_plot(comparison)),
        BARS: ("The same figures as bars", comparison_bars(comparison) if few else None),
        EFFICIENCY: ("Speed and memory", efficiency_plot(grids) if few else None),
    }
    pictures = {name: (shown, png) for name, (shown, png) in drawn.items() if png is not None}
    for name in drawn.keys() - pictures.keys():
        (directory / name).unlink(missing_ok=True)  # of other models, by an earlier run
    found, notes = exports.exports_of(comparison) if few or cards else ([], [])
    maps, undrawn = exports.layer_maps(comparison, found) if few else ([], [])
    texts = {
        "comparison.md": tables.markdown(comparison, {name: shown for name, (shown, _) in pictures.items()}),
        "comparison.json": tables.json_text(comparison),
        "comparison.csv": tables.csv_text(comparison),
        "comparison.tex": tables.latex(comparison),
        "comparison.html": webpage.page(comparison, pictures, maps),
    }
    for name, text in texts.items():
        write_text(directory / name, text)
    for name, (_, png) in pictures.items():
        write_bytes(directory / name, png)
    _print(comparison, [*texts, *pictures])
    written, unwritten = exports.write_cards(comparison, found) if cards else ([], [])
    for line in [*notes, *undrawn, *unwritten, *(f"Results are in {card}" for card in written)]:
        print(line)
    return comparison


def _print(comparison: Comparison, written: list[str]) -> None:
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = tables.table_of(comparison)
    heads, quantities = shown.heads, shown.quantities
    # What stands above the first measurement says which model it is, and has no dot in its name.
    rooms = [row.name.partition(".")[0] if "." in row.name else "" for row in comparison.rows if row.place == "table"]
    console = Console()

    def styled(entry: Entry) -> Text:
        return Text(entry.noted, style="bold" if entry.mark == "best" else "")

    def table_of(columns: list[int], lines: list[list[Entry]]) -> Table:
        table = Table(title="Comparison")
        table.add_column("", overflow="fold")
        for column in columns:
            head = heads[column] if quantities else "\n".join(textwrap.wrap(heads[column], 16))
            table.add_column(Text(head), justify="right", overflow="fold", no_wrap=not quantities)
        for index, line in enumerate(lines):
            if quantities and index and rooms[index] != rooms[index - 1]:
                table.add_section()
            table.add_row(*(styled(line[column]) for column in (0, *columns)))
        return table

    # As wide as the table, and measured in no time however many models it holds.
    longest = [max(column, key=lambda entry: cell_len(entry.noted)) for column in zip(*shown.lines, strict=True)]

    def width(columns: list[int]) -> int:
        return console.measure(table_of(columns, [longest]), options=console.options.update(width=10_000)).maximum

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
        console.print(table_of(group, shown.lines))
    for index, note in enumerate(shown.notes, 1):
        console.print(Text(f"[{index}] {note}", style="dim"))
    for warning in comparison.warnings:
        console.print(Text(f"Warning: {warning}", style="yellow"))
    for sentence in tables.legend(comparison):
        console.print(Text(sentence, style="dim"))
    if len(comparison.labels) > MOST_NAMED:
        console.print(Text(f"No bars are drawn of more than {MOST_NAMED} models.", style="dim"))
    console.print(Text(f"Written: {comparison.output_dir}/{', '.join(written)}"), soft_wrap=True)
    last = exports.last_model(comparison)
    if last is not None:
        directory, record = str(last[0]), last[1]
        quantised = protocols.quantization_of(record) == INT8
        # Who compares has this package, so that nobody has to run the code that a directory brings.
        example = load_example(directory, "package" if brings_code(directory) else "stock", quantised)
        console.print(Text(f"\nThe compressed model: {one_line(directory)}\nLoad it with"), soft_wrap=True)
        console.print(Text(example, style="bold"), soft_wrap=True)
