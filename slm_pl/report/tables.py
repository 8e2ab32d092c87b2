"""A comparison as text: Markdown, CSV, LaTeX and JSON."""

import csv
import dataclasses
import io
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_pl.report.comparison import Comparison
from slm_pl.report.figures import cell_text
from slm_pl.report.ranking import RATIOS
from slm_pl.report.rows import Cell, Mark, Place, Quantity, Row, one_line
from slm_pl.results import SCHEMA_VERSION, Results

WIDEST = 5  # models beside each other; more stand below each other
TIE = "≈"
_COUNTED: frozenset[Quantity] = frozenset(
    {"seconds", "rate", "perplexity", "accuracy", "agreement", "divergence", "number", "speedup"}
)
"""Quantities behind which there is a number of questions, tokens or runs."""


@dataclass(frozen=True)
class Entry:
    """A cell as people read it.

    Args:
        text: The figure, or a dash.
        mark: Whether it is the best, or a tie with it.
        note: Number of the footnote that says why there is none.
        foreign: Whether the text comes from a file, and may hold anything.
    """

    text: str
    mark: Mark | None = None
    note: int | None = None
    foreign: bool = False

    @property
    def noted(self) -> str:
        """The text with its mark of a tie or of a footnote."""
        return self.text + f" {TIE}" * (self.mark == "tie") + (f" [{self.note}]" if self.note else "")


@dataclass(frozen=True)
class Table:
    """The figures as people read them.

    Args:
        heads: Heads of the columns; the first is empty.
        lines: Each with its head first.
        notes: The footnotes that dashes refer to.
        quantities: Whether a line is a quantity; else it is a model.
    """

    heads: list[str]
    lines: list[list[Entry]]
    notes: list[str]
    quantities: bool


def entries(rows: list[Row]) -> tuple[list[list[Entry]], list[str]]:
    """The rows' cells, and the footnotes that their dashes refer to."""
    notes: list[str] = []

    def entry(cell: Cell, row: Row) -> Entry:
        if cell.reason is not None and cell.reason not in notes:
            notes.append(cell.reason)
        note = None if cell.reason is None else notes.index(cell.reason) + 1
        return Entry(cell_text(cell, row.quantity, row.show_ratio), cell.mark, note, cell.text is not None)

    return [[entry(cell, row) for cell in row.cells] for row in rows], notes


def table_of(comparison: Comparison) -> Table:
    """What stands in every table; many models are a line each."""
    rows = [row for row in comparison.rows if row.place == "table"]
    cells, notes = entries(rows)
    if len(comparison.labels) <= WIDEST:
        lines = [[Entry(row.title), *line] for row, line in zip(rows, cells, strict=True)]
        return Table(["", *comparison.labels], lines, notes, quantities=True)
    lines = [[Entry(label), *line] for label, *line in zip(comparison.labels, *cells, strict=True)]
    return Table(["", *(row.title for row in rows)], lines, notes, quantities=False)


def legend(
    comparison: Comparison,
    bold: str = "Bold",
    places: Sequence[Place] = ("table",),
    foreign: Callable[[str], str] = str,
) -> list[str]:
    """Sentences that say what the marks of a table mean.

    Args:
        comparison: The comparison.
        bold: How the best figures look.
        places: Which rows are shown.
        foreign: Escapes what comes from a file.
    """
    dense = {place for place in comparison.baselines if place is not None}
    against = "the dense baseline" if len(dense) < 2 else "the dense model of the same base"
    sentences = ["± is one standard error." + f" Ratios are against {against}." * bool(dense)]
    marked = [cell for row in comparison.rows for cell in row.cells if cell.mark is not None]
    if marked:
        sentences.append(
            f"{bold}: the best of the compressed models. {TIE}: not told apart from it: the difference is less than "
            "the standard error of the difference, √(a² + b²) (of perplexities by their logarithms; of timings by the "
            "spread of the repeats; of speed-ups: their intervals overlap), or less than is printed. Errors are "
            "taken as independent; on the same questions and text they are not, so this is conservative. Layers, "
            "parameters, work and dense models are not ranked."
        )
    return sentences + _speedups([row for row in comparison.rows if row.place in places], foreign)


def _speedups(rows: list[Row], foreign: Callable[[str], str]) -> list[str]:
    """What speed-ups are over, and what their intervals are."""
    rows = [row for row in rows if row.quantity == "speedup"]
    confidences = [cell.confidence for row in rows for cell in row.cells if cell.confidence is not None]
    if not confidences:
        return []
    baselines = foreign(", ".join(dict.fromkeys(one_line(str(row.protocol["baseline"])) for row in rows)))
    return [
        f"Speed-ups are over {baselines}, which ran in turn with each model in one process: the median of the pairs "
        f"[its confidence interval of {100 * min(confidences):.3g} % or more]."
    ]


def environment_lines(comparison: Comparison) -> list[str]:
    """What each model was measured on."""
    return [
        f"{label}: {_environment(record)}" for label, record in zip(comparison.labels, comparison.records, strict=True)
    ]


def _environment(record: Results) -> str:
    environment = record.environment
    threads = "" if environment.device.startswith("cuda") else f", {environment.threads} threads"
    packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    device = f"{environment.device} ({environment.device_name}{threads})"
    return one_line(f"{device}, {environment.dtype}, {environment.date}; {packages}")


# ------------------------------------------------------------------------------------------------------- Markdown


def markdown(comparison: Comparison, pictures: dict[str, str]) -> str:
    """The table with its notes, warnings, pictures and environments.

    Args:
        comparison: The comparison.
        pictures: File names and what they show.
    """
    table = table_of(comparison)

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def cell(entry: Entry) -> str:
        if entry.foreign:
            return _plain_markdown(entry.text)
        return f"**{entry.text}**" if entry.mark == "best" else entry.noted

    parts = [
        "# Comparison",
        "\n".join(
            [
                line([_plain_markdown(head) for head in table.heads]),
                "|---" + "|---:" * (len(table.heads) - 1) + "|",
                *(line([_plain_markdown(head.text), *map(cell, cells)]) for head, *cells in table.lines),
            ]
        ),
        "\n".join(f"[{index}] {_plain_markdown(note)}  " for index, note in enumerate(table.notes, 1)),
        "\n\n".join(f"**Warning:** {_plain_markdown(warning)}" for warning in comparison.warnings),
        "\n\n".join(legend(comparison, "**Bold**", foreign=_plain_markdown)),
        *(f"![{shown}]({name})" for name, shown in pictures.items()),
        "\n".join(f"- {_plain_markdown(line)}" for line in environment_lines(comparison)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def results_section(comparison: Comparison, index: int) -> str:
    """What was measured of one model, beside its dense model if that is among the records; for its card."""
    baseline = comparison.baselines[index]
    columns = [index] if baseline is None else [baseline, index]
    rows = [row for row in comparison.rows if row.place == "table"]
    measured = [
        dataclasses.replace(row, cells=[row.cells[column] for column in columns])
        for row in rows
        if row.cells[index].value is not None or row.cells[index].text is not None
    ]
    cells, notes = entries(measured)
    lines = [
        "| | " + " | ".join(_plain_markdown(comparison.labels[column]) for column in columns) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for row, line in zip(measured, cells, strict=True):
        texts = [_plain_markdown(entry.text) + f" [{entry.note}]" * bool(entry.note) for entry in line]
        lines.append(f"| {_plain_markdown(row.title)} | {' | '.join(texts)} |")
    told = "± is one standard error." + " Ratios are against the dense model." * (baseline is not None)
    environments = list(dict.fromkeys(_environment(comparison.records[column]) for column in columns))
    parts = [
        "\n".join(lines),
        "\n".join(f"[{number}] {_plain_markdown(note)}  " for number, note in enumerate(notes, 1)),
        told + " Not measured beside its dense model." * (baseline is None),
        "Measured on " + "; ".join(_plain_markdown(environment) for environment in environments) + ".",
    ]
    return "\n\n".join(part for part in parts if part)


def _plain_markdown(text: str) -> str:
    """Takes a text from a file for what it is, not for markup; an underscore inside a word is none."""
    text = re.sub(r"[\\`*|\[\]]", r"\\\g<0>", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text).replace("<", "&lt;")


# ------------------------------------------------------------------------------------------------------------ CSV


def csv_text(comparison: Comparison) -> str:
    """One line per model: what it is, then each row's raw number with its error, the count behind it and its ratio.

    Seconds, bytes, and fractions of 1; an absent figure is empty. Which columns a row has depends on its quantity only.
    A text that a spreadsheet would compute has an apostrophe in front.
    """
    models = zip(comparison.labels, comparison.paths, comparison.records, strict=True)
    columns: dict[str, list[object]] = {
        name: []
        for name in ("label", "results", "source", "base", "plan_sha256", "device", "device_name", "threads", "dtype")
    }
    for label, path, record in models:
        model, environment = record.model, record.environment
        values = (label, path, model.source, model.base, model.plan_sha256)
        machine = (environment.device, environment.device_name, environment.threads, environment.dtype)
        for column, value in zip(columns.values(), (*values, *machine), strict=True):
            column.append(_plain_csv(str(value)) if isinstance(value, str | Path) else value)
    for row in comparison.rows:
        name = one_line(row.name)
        columns[name] = [cell.value if cell.text is None else _plain_csv(cell.text) for cell in row.cells]
        if row.quantity in ("seconds", "rate"):
            columns[f"{name}.stdev"] = [cell.spread for cell in row.cells]
        elif row.quantity in ("perplexity", "accuracy", "agreement", "divergence", "number"):
            columns[f"{name}.stderr"] = [cell.stderr for cell in row.cells]
        elif row.quantity == "speedup":
            columns[f"{name}.low"] = [cell.low for cell in row.cells]
            columns[f"{name}.high"] = [cell.high for cell in row.cells]
        if row.quantity in _COUNTED:
            columns[f"{name}.n"] = [cell.n for cell in row.cells]
        if row.quantity in RATIOS:
            columns[f"{name}.ratio"] = [cell.ratio for cell in row.cells]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return buffer.getvalue()


def _plain_csv(text: str) -> str:
    """Takes a text from a file for what it is, not for a formula."""
    text = one_line(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


# ---------------------------------------------------------------------------------------------------------- LaTeX

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "[": "{[}", "]": "{]}", "*": "{*}",  # the last three mean something after \\
    "±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "−": "$-$", "≈": r"$\approx$", "≤": r"$\leq$", "≥": r"$\geq$",
    "≠": r"$\neq$", "√": r"$\surd$", "∂": r"$\partial$", "∞": r"$\infty$", "‖": r"$\|$", "²": r"$^2$", "³": r"$^3$",
    "₁": r"$_1$", "₂": r"$_2$", "°": r"$^\circ$", "→": r"$\to$", "←": r"$\leftarrow$", "↑": r"$\uparrow$",
    "↓": r"$\downarrow$", "–": "--", "—": "---", "…": r"\dots{}", "“": "``", "”": "''", "‘": "`", "’": "'",
    "\u00a0": "~", "µ": r"$\mu$", "Γ": r"$\Gamma$", "Δ": r"$\Delta$", "Θ": r"$\Theta$", "Λ": r"$\Lambda$",
    "Π": r"$\Pi$", "Σ": r"$\Sigma$", "Φ": r"$\Phi$", "Ψ": r"$\Psi$", "Ω": r"$\Omega$", "α": r"$\alpha$",
    "β": r"$\beta$", "γ": r"$\gamma$", "δ": r"$\delta$", "ε": r"$\varepsilon$", "η": r"$\eta$", "θ": r"$\theta$",
    "κ": r"$\kappa$", "λ": r"$\lambda$", "μ": r"$\mu$", "ν": r"$\nu$", "ξ": r"$\xi$", "π": r"$\pi$", "ρ": r"$\rho$",
    "σ": r"$\sigma$", "τ": r"$\tau$", "φ": r"$\varphi$", "χ": r"$\chi$", "ψ": r"$\psi$", "ω": r"$\omega$",
}  # fmt: skip
# Letters that LaTeX sets in its own fonts, without a further package.
_LATIN = frozenset("ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿ")


def latex_text(text: str) -> str:
    """A text as LaTeX without further packages sets it; letters that it has no font for become ``?``."""
    return "".join(_LATEX.get(char, char if char.isascii() or char in _LATIN else "?") for char in text)


def latex(comparison: Comparison) -> str:
    r"""A ``tabular`` of booktabs with its notes, to be ``\input`` in a document."""
    table = table_of(comparison)

    def head(text: str) -> str:
        if table.quantities:
            return latex_text(text)
        broken = r"\\".join(latex_text(part) for part in textwrap.wrap(text, 16))
        return rf"\shortstack[r]{{{broken}}}"

    def cell(entry: Entry) -> str:
        return rf"\textbf{{{latex_text(entry.text)}}}" if entry.mark == "best" else latex_text(entry.noted)

    lines = []
    dense = sum(record.model.plan_sha256 is None for record in comparison.records)
    for index, line in enumerate(table.lines):
        if not table.quantities and 0 < index == dense:
            lines.append(r"\midrule")  # the dense models stand apart
        lines.append(" & ".join(map(cell, line)) + r" \\")
    notes = [f"[{index}] {note}." for index, note in enumerate(table.notes, 1)]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            *(f"% Warning: {warning}" for warning in comparison.warnings),
            r"\begingroup\footnotesize",
            rf"\begin{{tabular}}{{@{{}}l{'r' * (len(table.heads) - 1)}@{{}}}}",
            r"\toprule",
            " & ".join(head(text) for text in table.heads) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
            r"\smallskip",
            r"\noindent " + " ".join(latex_text(text) for text in (*notes, *legend(comparison))),
            "",
            r"\endgroup",
            "",
        ]
    )


# ----------------------------------------------------------------------------------------------------------- JSON


def json_text(comparison: Comparison) -> str:
    """Every figure with its protocol, for programs."""
    models = [
        {
            **dataclasses.asdict(record.model),
            "label": label,
            "results": str(path),
            "baseline": None if baseline is None else comparison.labels[baseline],
            "environment": dataclasses.asdict(record.environment),
        }
        for label, path, record, baseline in zip(
            comparison.labels, comparison.paths, comparison.records, comparison.baselines, strict=True
        )
    ]
    record = {
        "schema_version": SCHEMA_VERSION,
        "baseline": comparison.labels[0] if comparison.baseline else None,
        "models": models,
        "rows": [dataclasses.asdict(row) for row in comparison.rows],
        "warnings": comparison.warnings,
    }
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False)
    return text.encode(errors="replace").decode() + "\n"  # a file may hold halves of surrogate pairs
