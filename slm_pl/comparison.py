"""Several results side by side: which figures compare, and what keeps others from it.

Figures stand in one row only if they were measured with the same protocol.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from slm_pl.errors import UsageError
from slm_pl.evaluation.efficiency import EfficiencyResult, Spread
from slm_pl.results import Results

Quantity = Literal["count", "parameters", "perplexity", "accuracy", "seconds", "rate", "bytes", "share"]


@dataclass(frozen=True)
class Cell:
    """One figure of one model.

    Args:
        value: In the row's unit; None if it is absent.
        stderr: Its standard error, where there is one.
        ratio: ``value`` over the dense baseline's, in rows that show it.
        reason: Why ``value`` is absent.
        spread: Standard deviation over the repeats of a timing.
    """

    value: float | None
    stderr: float | None = None
    ratio: float | None = None
    reason: str | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Row:
    """One quantity of all models, measured with one protocol.

    Args:
        name: Stable name, such as ``zero_shot.boolq.acc``.
        title: For people.
        quantity: What kind of number it is; accuracy is a fraction, memory is in bytes, time in seconds.
        cells: One per model, in the comparison's order.
    """

    name: str
    title: str
    quantity: Quantity
    cells: list[Cell]


@dataclass(frozen=True)
class Comparison:
    """Records side by side.

    Args:
        labels: Column names, the dense baseline first.
        paths: The results.json of each column.
        records: The records.
        baseline: Whether the first column is a dense baseline.
        rows: The table.
        warnings: What keeps figures from being comparable.
        output_dir: Where comparison.md, .json and .png are.
        export: Directory of the last compressed model among the records, if it is there.
    """

    labels: list[str]
    paths: list[Path]
    records: list[Results]
    baseline: bool
    rows: list[Row]
    warnings: list[str]
    output_dir: Path
    export: str | None


def line_up(paths: Sequence[str], output_dir: str | None = None) -> Comparison:
    """Reads results.json files and puts what compares in rows.

    Args:
        paths: The results.json files; a dense baseline (without a plan) is put first, the others stay in this order.
        output_dir: Where the report goes; the directory that holds the run directories by default.

    Raises:
        UsageError: If a file cannot be read.
    """
    files = list({Path(path).resolve(): Path(path) for path in paths}.values())
    if not files:
        raise UsageError(
            "compare got no files. Give one or more results.json, for example runs/quickstart/*/results.json."
        )
    loaded = sorted(
        ((file, Results.load(file)) for file in files), key=lambda pair: pair[1].model.plan_sha256 is not None
    )
    files, records = [file for file, _ in loaded], [record for _, record in loaded]
    baseline = records[0].model.plan_sha256 is None
    labels = _distinct_labels(files, records)
    if output_dir is None:
        output_dir = os.path.commonpath([str(file.resolve().parent.parent) for file in files])
    return Comparison(
        labels=labels,
        paths=files,
        records=records,
        baseline=baseline,
        rows=_rows(records, baseline),
        warnings=_warnings(labels, records, baseline),
        output_dir=Path(output_dir),
        export=_last_export(records),
    )


def _distinct_labels(files: list[Path], records: list[Results]) -> list[str]:
    labels = [record.model.label for record in records]
    doubled = {label for label in labels if labels.count(label) > 1}
    labels = [
        f"{label} ({file.resolve().parent.name})" if label in doubled else label
        for label, file in zip(labels, files, strict=True)
    ]
    return [
        f"{label} #{labels[: index + 1].count(label)}" if labels.count(label) > 1 else label
        for index, label in enumerate(labels)
    ]


def _last_export(records: list[Results]) -> str | None:
    for record in reversed(records):
        if record.model.plan_sha256 is not None and (Path(record.model.source) / "config.json").is_file():
            return record.model.source
    return None


# A protocol is a tuple of everything that two figures must share to stand in one row.
_Protocol = tuple[object, ...]


def _rows(records: list[Results], baseline: bool) -> list[Row]:
    rows = [
        Row("num_layers", "Decoder layers", "count", [Cell(record.model.num_layers) for record in records]),
        Row("num_parameters", "Parameters", "parameters", [Cell(record.model.num_parameters) for record in records]),
        *_requested_rows(records),
        *_perplexity_rows(records),
        *_zero_shot_rows(records),
        *_efficiency_rows(records),
    ]
    return [_with_ratios(row) if baseline else row for row in rows]


def _requested_rows(records: list[Results]) -> list[Row]:
    """What was asked for, beside the parameters that were achieved."""
    asked = [record.model.requested_ratio for record in records]
    if not any(asked):
        return []
    absent = Cell(None, reason="another target was given, or none")
    cells = [absent if ratio is None else Cell(ratio) for ratio in asked]
    return [Row("requested_ratio", "Removal asked for", "share", cells)]


def _with_ratios(row: Row) -> Row:
    dense = row.cells[0].value
    if row.quantity not in ("parameters", "rate") or not dense:
        return row
    cells = [
        dataclasses.replace(cell, ratio=cell.value / dense) if cell.value is not None and index else cell
        for index, cell in enumerate(row.cells)
    ]
    return dataclasses.replace(row, cells=cells)


def _in_order(keys: Iterable[_Protocol]) -> list[_Protocol]:
    return list(dict.fromkeys(keys))


def _cell(record: Results, place: str, value: float, stderr: float | None = None) -> Cell:
    if not math.isfinite(value):
        return Cell(None, reason=record.missing.get(place, "not a finite number"))
    return Cell(value, stderr if stderr is not None and math.isfinite(stderr) else None)


def _absent(record: Results, room: str, has_others: bool) -> Cell:
    """The cell of a model that was not measured with a row's protocol."""
    reason = record.missing.get(room)
    return Cell(None, reason=reason or ("measured with another protocol only" if has_others else "not measured"))


def _perplexity_rows(records: list[Results]) -> list[Row]:
    found = [
        {
            (one.corpus, one.sequence_length, one.bos, one.tokens, one.sha256): index
            for index, one in enumerate(record.perplexity)
        }
        for record in records
    ]
    rows = []
    for key in _in_order(key for one in found for key in one):
        corpus, length, bos, tokens, sha256 = key
        cells = []
        for record, places in zip(records, found, strict=True):
            if key not in places:
                cells.append(_absent(record, "perplexity", bool(places)))
                continue
            one = record.perplexity[places[key]]
            cells.append(_cell(record, f"perplexity[{places[key]}].value", one.value, one.stderr))
        bos_text = "" if bos == "none" else f", BOS {bos}"
        title = f"Perplexity {corpus} @ {length} ({tokens:,} tokens{bos_text})"
        rows.append(
            Row(
                f"perplexity.{corpus}.{length}.{bos}.{tokens}" + (f".{str(sha256)[:8]}" if sha256 else ""),
                title,
                "perplexity",
                cells,
            )
        )
    return rows


def _zero_shot_rows(records: list[Results]) -> list[Row]:
    found: list[dict[_Protocol, Cell]] = []
    for record in records:
        cells: dict[_Protocol, Cell] = {}
        result = record.zero_shot
        if result is not None:
            for task, one in result.tasks.items():
                cells[("task", task, one.metric, one.n)] = _cell(
                    record, f"zero_shot.tasks.{task}.value", one.value, one.stderr
                )
            asked = tuple((task, one.metric, one.n) for task, one in sorted(result.tasks.items()))
            cells[("mean", asked)] = _cell(record, "zero_shot.mean", result.mean, result.mean_stderr)
        found.append(cells)

    # All tasks first, then the means.
    keys = sorted(_in_order(key for cells in found for key in cells), key=lambda key: key[0] == "mean")
    rows = []
    for key in keys:
        if key[0] == "task":
            _, task_name, metric, n = key
            name, title = f"zero_shot.{task_name}.{metric}.{n}", f"{task_name}, {metric} (n = {n:,})"
        else:
            asked = cast(tuple[tuple[str, str, int], ...], key[1])
            name = f"zero_shot.mean.{'+'.join(f'{task}.{n}' for task, _, n in asked)}"
            questions = sum(n for _, _, n in asked)
            title = f"Zero-shot mean ({len(asked)} task{'s' if len(asked) > 1 else ''}, {questions:,} questions)"
        row = [
            cells[key] if key in cells else _absent(record, "zero_shot", bool(cells))
            for record, cells in zip(records, found, strict=True)
        ]
        rows.append(Row(name, title, "accuracy", row))
    return rows


_SPREADS: tuple[tuple[str, str, Quantity, Callable[[EfficiencyResult], Spread]], ...] = (
    ("latency_s", "Latency, median", "seconds", lambda one: one.latency_s),
    ("time_to_first_token_s", "Time to first token, median", "seconds", lambda one: one.time_to_first_token_s),
    ("output_tokens_per_s", "Output tokens/s, median", "rate", lambda one: one.output_tokens_per_s),
)


def _timing_cell(record: Results, place: str, spread: Spread) -> Cell:
    cell = _cell(record, f"{place}.median", spread.median)
    return dataclasses.replace(cell, spread=spread.stdev) if math.isfinite(spread.stdev) else cell


def _efficiency_rows(records: list[Results]) -> list[Row]:
    found = [
        {
            (one.protocol, one.batch_size, one.prompt_tokens, one.new_tokens): index
            for index, one in enumerate(record.efficiency)
        }
        for record in records
    ]
    rows = []
    for key in _in_order(key for one in found for key in one):
        protocol, batch_size, prompt_tokens, new_tokens = key
        setting = f"batch {batch_size}, {prompt_tokens} + {new_tokens} tokens"
        name = f"efficiency.{protocol}.{batch_size}.{prompt_tokens}.{new_tokens}"
        absent = [_absent(record, "efficiency", bool(places)) for record, places in zip(records, found, strict=True)]
        for figure, title, quantity, spread in _SPREADS:
            cells = [
                _timing_cell(record, f"efficiency[{places[key]}].{figure}", spread(record.efficiency[places[key]]))
                if key in places
                else cell
                for record, places, cell in zip(records, found, absent, strict=True)
            ]
            rows.append(Row(f"{name}.{figure}", f"{title} ({setting})", quantity, cells))
        cells = [
            _memory_cell(record, places[key]) if key in places else cell
            for record, places, cell in zip(records, found, absent, strict=True)
        ]
        rows.append(Row(f"{name}.peak_memory_bytes", f"Peak memory ({setting})", "bytes", cells))
    return rows


def _memory_cell(record: Results, index: int) -> Cell:
    peak = record.efficiency[index].peak_memory_bytes
    if peak is None:
        return Cell(None, reason=record.missing.get(f"efficiency[{index}].peak_memory_bytes", "not measured"))
    return Cell(peak.max)


def _warnings(labels: list[str], records: list[Results], baseline: bool) -> list[str]:
    warnings = []
    if not baseline:
        warnings.append(
            "There is no dense baseline among the records, so nothing here says what compression cost. Run `main.py "
            "test` on the dense model too and add its results.json."
        )

    def differing(what: str, of: Callable[[Results], object], consequence: str) -> None:
        values = {label: of(record) for label, record in zip(labels, records, strict=True)}
        # A room that a record lacks is a footnote in the table, not a difference.
        values = {label: value for label, value in values.items() if value not in (None, (), [])}
        if len({repr(value) for value in values.values()}) > 1:
            each = "; ".join(f"{label}: {_plain(value)}" for label, value in values.items())
            warnings.append(f"The records differ in {what} ({each}): {consequence}.")

    speed = "speed and memory do not compare"
    differing("device", lambda record: record.environment.device, speed)
    differing("device name", lambda record: record.environment.device_name, speed)
    differing("threads", lambda record: record.environment.threads, speed)
    differing("dtype", lambda record: record.environment.dtype, "speed, memory and the last digits do not compare")
    differing(
        "embedded text",
        lambda record: (record.environment.embedded_sha256 or "")[:8] or None,
        "it comes from the running Python: what was measured on it does not compare",
    )
    differing("torch version", lambda record: record.environment.packages.get("torch"), speed)
    differing(
        "perplexity protocol",
        lambda record: sorted(
            f"{one.corpus} @ {one.sequence_length}, BOS {one.bos}, {one.tokens} tokens, "
            f"ids {(one.sha256 or 'unknown')[:8]}"
            for one in record.perplexity
        ),
        "only figures in one row compare",
    )
    differing(
        "zero-shot protocol",
        lambda record: (
            (record.zero_shot.harness, f"{record.zero_shot.num_fewshot} examples", f"limit {record.zero_shot.limit}")
            if record.zero_shot
            else None
        ),
        "their accuracies do not compare",
    )
    differing(
        "generation protocol",
        lambda record: sorted(
            f"{one.protocol}, batch {one.batch_size}, {one.prompt_tokens} + {one.new_tokens} tokens, "
            f"{one.warmup} warm-up, {one.repeats} repeats"
            for one in record.efficiency
        ),
        "only figures in one row compare",
    )
    differing(
        "memory counted",
        lambda record: sorted({one.peak_memory_bytes.source for one in record.efficiency if one.peak_memory_bytes}),
        "peak memory does not compare",
    )
    return warnings


def _plain(value: object) -> str:
    return ", ".join(str(part) for part in value) if isinstance(value, list | tuple) else str(value)
