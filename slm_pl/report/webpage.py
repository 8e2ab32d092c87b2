"""A comparison as one HTML page that needs nothing else: no network, no other file."""

import base64
from collections.abc import Sequence
from html import escape

from slm_pl.report.comparison import Comparison
from slm_pl.report.figures import figure_text, ratio_text
from slm_pl.report.rows import LESS_IS_BETTER, MORE_IS_BETTER, Cell, Row
from slm_pl.report.tables import TIE, entries, environment_lines, legend

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #5b6470; --line: #dde1e6; --head: #f3f5f7;
  --dense: #f8f4e8; --hover: #eef4fb; --best: #00694d; --link: #0a5ea8; --warn: #fff6dd; --warn-line: #e0a800; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e6e8eb; --soft: #9aa4b0; --line: #30363e; --head: #1f242a; --dense: #26241c;
    --hover: #1d2732; --best: #4fd1a5; --link: #7ab8f0; --warn: #2c2613; --warn-line: #b58900; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(0.75rem, 3vw, 2.5rem) 3rem; max-width: 110rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
p { margin: 0.4rem 0; }
.soft, .notes, .legend { color: var(--soft); font-size: 0.87rem; }
.legend { max-width: 60rem; }
.scroll { overflow: auto; max-height: 85vh; margin: 1rem 0 0.75rem; border: 1px solid var(--line); border-radius: 8px; }
.scroll:focus-visible, button:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: -2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.42rem 0.8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
td { position: relative; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; z-index: 2; padding: 0; background: var(--head); vertical-align: bottom; }
tbody th, thead th:first-child { position: sticky; left: 0; text-align: left; border-right: 1px solid var(--line); }
tbody th { z-index: 1; background: var(--paper); font-weight: 600; }
tbody th span.label { display: block; width: max-content; max-width: 15rem; white-space: normal;
  overflow-wrap: anywhere; }
thead th:first-child { z-index: 3; }
thead button { display: block; width: 100%; min-width: 7.5rem; padding: 0.5rem 0.8rem; border: 0; background: none;
  color: inherit; font: inherit; font-weight: 600; font-size: 0.87rem; line-height: 1.3; text-align: inherit;
  white-space: normal; cursor: pointer; }
thead button:hover { background: var(--hover); }
thead small { display: block; color: var(--soft); font-weight: 400; }
thead button span::after { content: " \\2195"; color: var(--soft); opacity: 0.6; }
th[aria-sort="ascending"] span::after { content: " \\2191"; color: var(--link); opacity: 1; }
th[aria-sort="descending"] span::after { content: " \\2193"; color: var(--link); opacity: 1; }
tbody tr:hover > * { background: var(--hover); }
tr.dense > * { background: var(--dense); }
.tag { margin-left: 0.4rem; color: var(--soft); font-weight: 400; font-size: 0.8rem; }
td small { display: block; color: var(--soft); font-size: 0.8rem; line-height: 1.2; }
td a { color: var(--link); text-decoration: none; font-size: 0.8rem; }
strong.best { color: var(--best); }
.tie { color: var(--best); position: absolute; margin-left: 0.15em; }
.warning { margin: 0.5rem 0; padding: 0.5rem 0.9rem; background: var(--warn); border-left: 4px solid var(--warn-line);
  border-radius: 4px; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; padding: 0.5rem; background: #fff; border-radius: 8px;
  border: 1px solid var(--line); }
.maps { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: flex-start; }
.maps figure { max-width: 34rem; overflow-wrap: anywhere; }
figcaption { color: var(--soft); font-size: 0.87rem; margin-top: 0.3rem; }
.environment { padding-left: 1.2rem; font-size: 0.87rem; color: var(--soft); overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  th, td { padding: 0.4rem 0.55rem; }
  tbody th { font-size: 0.87rem; }
  tbody th span.label { max-width: 6.5rem; }
  thead button { padding: 0.45rem 0.55rem; min-width: 6rem; }
  thead th:first-child button { min-width: 0; }
}
@media print { .scroll { overflow: visible; max-height: none; } thead button span::after { content: ""; } }
"""

_WORDS = (
    "Perplexity of a word compares models of different tokenizers only where their windows cover the same words. "
    "Windows end at tokens, so that takes the whole text: tail: keep, and no max_tokens."
)

# Numbers are compared as written by repr, so that what is printed alike still has an order. Without a value last.
_SCRIPT = """
"use strict";
(() => {
  const table = document.getElementById("figures");
  const body = table.tBodies[0];
  const heads = Array.from(table.tHead.rows[0].cells);
  const first = Array.from(body.rows);
  const key = (row, column) => {
    const cell = row.cells[column];
    if (column === 0) return cell.dataset.label;
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  };
  const sort = (column, sign) => {
    const rows = first.slice();
    rows.sort((one, other) => {
      const a = key(one, column), b = key(other, column);
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (column === 0 ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
    });
    body.append(...rows);
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    sort(column, ascending ? 1 : -1);
  }));
})();
"""


def page(comparison: Comparison, pictures: dict[str, tuple[str, bytes]], maps: Sequence[tuple[str, bytes]] = ()) -> str:
    """The whole page.

    Args:
        comparison: The comparison.
        pictures: PNGs and what they show, by file name.
        maps: Names of models and the SVG of what became of their layers.

    Returns:
        HTML; all texts that come from files are escaped.
    """
    rows = [row for row in comparison.rows if row.place != "data"]
    cells, notes = entries(rows)
    heads = "".join(_head(row) for row in rows)
    lines = []
    for index, label in enumerate(comparison.labels):
        dense = comparison.records[index].model.plan_sha256 is None
        tag = '<span class="tag">dense</span>' if dense and label != "dense" else ""
        figures = "".join(_cell(row.cells[index], row, line[index].note) for row, line in zip(rows, cells, strict=True))
        name = escape(label)
        lines.append(
            f'<tr{" class=dense" if dense else ""}><th scope="row" data-label="{name}">'
            f'<span class="label">{name.replace("_", "_<wbr>").replace("-", "-<wbr>")}{tag}</span></th>{figures}</tr>'
        )
    models = len(comparison.labels)
    baselines = [
        label
        for label, record in zip(comparison.labels, comparison.records, strict=True)
        if record.model.plan_sha256 is None
    ]
    baseline = f"; dense baseline{'s' * (len(baselines) > 1)}: {', '.join(baselines)}" if baselines else ""
    sentences = legend(comparison, "Bold and green", ("table", "page"))
    if any(row.name.startswith("word_perplexity.") for row in rows):
        sentences.append(_WORDS)
    newest = max(record.environment.date for record in comparison.records)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Should an escape ever be forgotten: nothing is fetched, and nothing is sent.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">",
        "<title>Comparison</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        "<h1>Comparison</h1>",
        f'<p class="soft">{models} model{"s" if models > 1 else ""}{escape(baseline)}; '
        f"last measured {escape(newest[:10])}. A click on a column's head sorts; the next one reverses.</p>",
        *(f'<p class="warning"><strong>Warning:</strong> {escape(warning)}</p>' for warning in comparison.warnings),
        '<div class="scroll" tabindex="0" role="region" aria-label="Figures of all models">',
        '<table id="figures">',
        f'<thead><tr><th scope="col" aria-sort="none">{_button("Model")}</th>{heads}</tr></thead>',
        f"<tbody>{''.join(lines)}</tbody>",
        "</table>",
        "</div>",
        *(f'<p class="legend">{escape(text)}</p>' for text in sentences),
        '<div class="notes">' * bool(notes),
        *(f'<p id="note-{index}">[{index}] {escape(note)}</p>' for index, note in enumerate(notes, 1)),
        "</div>" * bool(notes),
        *(picture_html(shown, png) for shown, png in pictures.values()),
        '<h2>What became of every layer</h2><div class="maps">' * bool(maps),
        # As images, in which nothing runs.
        *(picture_html(f"Layers of {names}", svg, "svg+xml") for names, svg in maps),
        "</div>" * bool(maps),
        "<h2>Measured on</h2>",
        '<ul class="environment">',
        *(f"<li>{escape(line)}</li>" for line in environment_lines(comparison)),
        "</ul>",
        f"<script>{_SCRIPT}</script>",
        "</body>",
        "</html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _head(row: Row) -> str:
    name, _, setting = row.title.partition(" (")
    small = f"<small>{escape(setting.removesuffix(')'))}</small>" if setting else ""
    better = {True: "less is better", False: "more is better"}.get(row.quantity in LESS_IS_BETTER, "")
    better = better if row.quantity in LESS_IS_BETTER | MORE_IS_BETTER else ""
    protocol = "; ".join(f"{name}: {value}" for name, value in row.protocol.items() if not isinstance(value, dict))
    title = escape("\n".join(text for text in (row.name, better, protocol) if text))
    button = _button(escape(name), small, title)
    return f'<th scope="col" aria-sort="none" data-name="{escape(row.name)}">{button}</th>'


def _button(name: str, small: str = "", title: str = "") -> str:
    return f'<button type="button" title="{title}"><span>{name}</span> {small}</button>'


def _cell(cell: Cell, row: Row, note: int | None) -> str:
    if cell.text is not None:
        return f"<td>{escape(cell.text)}</td>"
    if cell.value is None:
        link = f' <a href="#note-{note}" title="{escape(cell.reason or "")}">[{note}]</a>' if note else ""
        return f"<td>–{link}</td>"
    text = escape(figure_text(cell, row.quantity))
    if cell.mark == "best":
        text = f'<strong class="best">{text}</strong>'
    elif cell.mark == "tie":
        text += f'<span class="tie" title="not told apart from the best">{TIE}</span>'
    told = [f"{cell.value!r}"]
    told += [f"standard error {cell.stderr:.4g}"] if cell.stderr is not None else []
    told += [f"standard deviation {cell.spread:.4g}"] if cell.spread is not None else []
    if cell.confidence is not None:
        told.append(f"{100 * cell.confidence:.3g} % interval {cell.low:.4g} to {cell.high:.4g}")
    told += [f"n = {cell.n:,}"] if cell.n is not None else []
    if cell.ratio is not None:
        ratio = ratio_text(cell.ratio, row.quantity)
        told.append(f"{ratio} of the dense baseline's")
        text += f"<small>{ratio}</small>" if row.show_ratio else ""
    return f'<td data-value="{cell.value!r}" title="{escape("; ".join(told))}">{text}</td>'


def picture_html(shown: str, content: bytes, kind: str = "png") -> str:
    """An ``img`` element, in which nothing runs, with what it shows under it."""
    data = base64.b64encode(content).decode()
    return (
        f'<figure><img alt="{escape(shown)}" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{escape(shown)}</figcaption></figure>"
    )
