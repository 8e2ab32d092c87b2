"""What the demo shows beside completions, as HTML: the comparison, and what was done to each model's layers.

Every text may come from a stranger's file, and is escaped; pictures are ``img`` elements, in which nothing runs.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from slm_pl.compression.plan import (
    DropLayers,
    KeepChannels,
    KeepHidden,
    MergeLayers,
    Plan,
    RefitOutput,
    Step,
    load_plans,
)
from slm_pl.demo.markup import escape
from slm_pl.errors import UsageError
from slm_pl.layer_map import MAP, layer_map, load_sizes
from slm_pl.pictures import load_figures, trace_pictures
from slm_pl.report import tables
from slm_pl.report.comparison import Comparison
from slm_pl.report.pareto import pareto_plot
from slm_pl.report.webpage import picture_html

_MOST_ROWS = 400


def comparison_html(comparison: Comparison) -> str:
    """The table of a comparison, what its marks mean, and quality against cost."""
    shown = tables.table_of(comparison)
    lines = [
        [_cell(head.text), *(_cell(one.noted, one.mark == "best") for one in cells)] for head, *cells in shown.lines
    ]
    picture = pareto_plot(comparison)
    parts = [
        *(_paragraph(f"Warning: {warning}", "warning") for warning in comparison.warnings),
        _table(shown.heads, lines, "figures"),
        *(_paragraph(f"[{index}] {note}", "soft") for index, note in enumerate(shown.notes, 1)),
        *(_paragraph(sentence, "soft") for sentence in tables.legend(comparison)),
        "" if picture is None else picture_html("Quality against cost", picture),
        "<h3>Measured on</h3>",
        *(_paragraph(line, "soft") for line in tables.environment_lines(comparison)),
    ]
    return _whole(parts)


def layers_html(label: str, directory: Path | None, parameters: int | None = None) -> str:
    """What became of a model's layers.

    Args:
        label: The model's name.
        directory: Its export; None if it was not read from a directory.
        parameters: How many it has.
    """
    if directory is None:
        return _whole([_paragraph(f"{label} was not read from a directory, so no plan is known.")])
    try:
        plans = load_plans(directory, tensors=False)
        maps = layer_map(plans, *load_sizes(directory, plans), parameters)
    except UsageError as error:
        return warning_html(str(error))
    if not plans:
        return _whole([_paragraph(f"{label} has no plan: it is a dense model, none of its layers were changed.")])
    parts = [picture_html("What became of each layer", maps[f"{MAP}.svg"], "svg+xml")]
    figures = load_figures(directory, len(plans))
    for number, plan in enumerate(plans, start=1):
        parts.append(f"<h3>{_numbered('Plan', number, plans)}</h3>" + _paragraph(_summary(plan)))
        parts.append(_table(["Layers", "What became of them"], _steps(plan), "steps"))
        parts += [picture_html("What the search saw", picture) for picture in trace_pictures(plan, number).values()]
    parts += [
        picture_html("How alike the layers were before (CKA)", content)
        for name, content in figures.items()
        if name.endswith(".png")
    ]
    return _whole(parts)


def warning_html(text: str) -> str:
    """Why there is nothing to see."""
    return _whole([_paragraph(text, "warning")])


def _numbered(what: str, number: int, of: Sequence[object]) -> str:
    return what if len(of) == 1 else f"{what} {number} of {len(of)}"


def _summary(plan: Plan) -> str:
    """Who decided, on what, and with which arguments."""
    name = plan.method.class_path.rpartition(".")[2]
    arguments = ", ".join(f"{key}={value}" for key, value in plan.method.init_args.items() if value is not None)
    base = f"{plan.base.num_layers} decoder layers, {plan.base.num_parameters:,} parameters"
    data = plan.calibration
    seen = f"; {data.samples} × {data.sequence_length} calibration tokens" if data is not None else ""
    return f"{name} ({arguments}) on a model of {base}{seen}."


def _steps(plan: Plan) -> list[list[str]]:
    """A line for each step; of a layer that became narrower, one for all its groups."""
    told: dict[str, list[str]] = {}
    for step in plan.steps:
        layers, what = _step(step)
        told.setdefault(layers, []).append(what)
    rows = [[_cell(layers), _cell("; ".join(what))] for layers, what in told.items()]
    more = len(rows) - _MOST_ROWS
    return rows if more <= 0 else [*rows[:_MOST_ROWS], [_cell("…"), _cell(f"{more:,} more lines in plan.json")]]


def _step(step: Step) -> tuple[str, str]:
    if isinstance(step, MergeLayers):
        return (
            f"{step.low}–{step.high}",
            f"merged into one ({step.consolidation}; norms and biases: {step.other_parameters})",
        )
    if isinstance(step, DropLayers):
        return ", ".join(map(str, step.layers)), "removed"
    if isinstance(step, KeepHidden):
        return "all", f"{len(step.indices):,} channels of the hidden state stay"
    if isinstance(step, RefitOutput):
        return str(step.layer), f"{step.group} refitted by least squares"
    assert isinstance(step, KeepChannels)
    unit = "KV groups" if step.group == "attention" else "MLP channels"
    biased = ", a bias for the others" if step.bias else ""
    return str(step.layer), f"{len(step.indices):,} {unit} stay{biased}"


def _cell(text: str, best: bool = False) -> str:
    return f"<strong>{escape(text)}</strong>" if best else escape(text)


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]], name: str) -> str:
    """A table that scrolls by itself; its cells are escaped already, its heads are not."""
    columns = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    rows = "".join(
        f'<tr><th scope="row">{head}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for head, *cells in lines
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table class="{name}">'
        f"<thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def _whole(parts: Iterable[str]) -> str:
    return f'<div class="sight">{"".join(parts)}</div>'
