"""Several results side by side: which figures compare, and what keeps others from it.

Figures stand in one row only if they were measured with the same protocol.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slm_pl.errors import UsageError
from slm_pl.evaluation.perplexity import PerplexityResult
from slm_pl.evaluation.zero_shot import TaskResult, ZeroShotResult
from slm_pl.report import bases, protocols
from slm_pl.report.generation_rows import generation_rows
from slm_pl.report.matching import Figure, cell_of, figure, lined_up
from slm_pl.report.ranking import with_marks, with_ratios
from slm_pl.report.rows import MACHINE, Cell, Protocol, Quantity, Row, one_line
from slm_pl.results import Results

_SHOWN: frozenset[Quantity] = frozenset({"parameters", "rate", "macs", "size"})
"""Quantities whose ratio to the dense model's says more than the figure."""


@dataclass(frozen=True)
class Comparison:
    """Records side by side.

    Args:
        labels: Column names, the dense baseline first.
        paths: The results.json of each column.
        records: The records.
        baseline: Whether the first column is a dense baseline.
        baselines: Place of the column that each one's ratios are against: the dense model of its base, or None.
        rows: The table.
        warnings: What keeps figures from being comparable.
        output_dir: Where the report goes.
    """

    labels: list[str]
    paths: list[Path]
    records: list[Results]
    baseline: bool
    baselines: list[int | None]
    rows: list[Row]
    warnings: list[str]
    output_dir: Path


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
    baselines = bases.baselines_of(records)
    labels = _distinct_labels(files, records)
    warnings = [*bases.warnings_of(labels, records, baselines), *protocols.warnings_of(labels, records)]
    rows = _rows(records, baselines)
    assert len({row.name for row in rows}) == len(rows)  # CSV and the summary of a sweep go by the name
    if output_dir is None:
        output_dir = os.path.commonpath([str(file.resolve().parent.parent) for file in files])
    return Comparison(
        labels=labels,
        paths=files,
        records=records,
        baseline=records[0].model.plan_sha256 is None,
        baselines=baselines,
        rows=rows,
        warnings=[one_line(warning) for warning in warnings],
        output_dir=Path(output_dir),
    )


def _distinct_labels(files: list[Path], records: list[Results]) -> list[str]:
    labels = [one_line(record.model.label) or "unnamed" for record in records]
    doubled = {label for label in labels if labels.count(label) > 1}
    labels = [
        f"{label} ({one_line(file.resolve().parent.name)})" if label in doubled else label
        for label, file in zip(labels, files, strict=True)
    ]
    return [
        f"{label} #{labels[: index + 1].count(label)}" if labels.count(label) > 1 else label
        for index, label in enumerate(labels)
    ]


def _rows(records: list[Results], baselines: list[int | None]) -> list[Row]:
    rows = [
        Row("num_layers", "Decoder layers", "count", [Cell(record.model.num_layers) for record in records]),
        Row("num_parameters", "Parameters", "parameters", [Cell(record.model.num_parameters) for record in records]),
        *_requested_rows(records),
        *_weight_rows(records),
        *lined_up(records, _perplexities, _reason_in("perplexity")),
        *lined_up(records, _word_perplexities, _reason_in("perplexity")),
        *lined_up(records, _tasks, _reason_in("zero_shot")),
        *lined_up(records, _means, _reason_in("zero_shot")),
        *lined_up(records, _drifts, _reason_in("drift")),
        *generation_rows(records),
    ]
    rows = [with_ratios(row, baselines) for row in rows]
    competing = [record.model.plan_sha256 is not None for record in records]
    competitors = [record for record in records if record.model.plan_sha256 is not None]
    rows = [
        with_marks(row, competing)
        if row.quantity not in MACHINE or protocols.same_machine(competitors, row.quantity)
        else row
        for row in rows
    ]
    # One ratio of each kind of quality says what was kept; one in every cell would hide the figures.
    shown = {
        next((row.name for row in rows if row.name.startswith(start)), "")
        for start in ("perplexity.", "zero_shot.mean.")
    }
    return [dataclasses.replace(row, show_ratio=row.quantity in _SHOWN or row.name in shown) for row in rows]


def _requested_rows(records: list[Results]) -> list[Row]:
    """What was asked for, beside the parameters that were achieved."""
    asked = [record.model.requested_ratio for record in records]
    if not any(asked):
        return []
    absent = Cell(None, reason="another target was given, or none")
    cells = [absent if ratio is None else Cell(ratio) for ratio in asked]
    return [Row("requested_ratio", "Removal asked for", "share", cells)]


def _weight_rows(records: list[Results]) -> list[Row]:
    """What the weights are stored as, where the models differ in it."""
    texts = [one_line(protocols.weights_text(record)) for record in records]
    if len(set(texts)) < 2:
        return []
    return [Row("weights", "Weights", "text", [Cell(None, text=text) for text in texts])]


def _reason_in(room: str) -> Callable[[Results, Row], str | None]:
    """The reason that a hook left for a part of the record."""

    def reason_of(record: Results, row: Row) -> str | None:
        # Of one text and length, or of all of it.
        for key in (f"{room} {row.protocol.get('corpus')} @ {row.protocol.get('sequence_length')}", room):
            if key in record.missing:
                return record.missing[key]
        if room == "drift" and record.model.plan_sha256 is None and not record.drift:
            return "it is the distance from the dense model"
        return None

    return reason_of


def _window_notes(protocol: Protocol) -> tuple[str, str]:
    """What is unusual of how windows were cut: for the title, and for the name."""
    title = name = ""
    if protocol["bos"] != "none":
        title += f", BOS {protocol['bos']}"
    if protocol["stride"] is not None:
        title += f", stride {protocol['stride']}"
        name += f".stride{protocol['stride']}"
    if protocol["tail"] != "drop":
        title += f", tail {protocol['tail']}"
        name += f".{protocol['tail']}"
    if protocol.get("sha256"):
        name += f".{str(protocol['sha256'])[:8]}"
    return title, name


def _perplexities(record: Results) -> Iterable[Figure]:
    for index, one in enumerate(record.perplexity):
        protocol = protocols.perplexity_protocol(one)
        title, name = _window_notes(protocol)
        yield figure(
            one.corpus,
            f"perplexity.{one.corpus}.{one.sequence_length}.{one.bos}.{one.tokens}{name}",
            f"Perplexity {one.corpus} @ {one.sequence_length} ({one.tokens:,} tokens{title})",
            "perplexity",
            protocol,
            cell_of(record, f"perplexity[{index}].value", one.value, one.stderr, one.tokens),
        )


def _word_perplexities(record: Results) -> Iterable[Figure]:
    for index, one in enumerate(record.perplexity):
        place = f"perplexity[{index}].word_value"
        if one.words is None or (one.word_value is None and place not in record.missing):
            continue
        protocol = protocols.word_protocol(one)
        title, name = _window_notes(protocol)
        yield figure(
            one.corpus,
            f"word_perplexity.{one.corpus}.{one.sequence_length}.{one.bos}.{one.words}{name}",
            f"Word perplexity {one.corpus} @ {one.sequence_length} ({one.words:,} words{title})",
            "perplexity",
            protocol,
            cell_of(record, place, one.word_value, word_stderr(one), one.words),
            place="page",
            exact={} if one.tail == "keep" else {"words": f"words {one.words} (tail: keep would cover the whole text)"},
        )


def word_stderr(one: PerplexityResult) -> float | None:
    """Standard error of a word's perplexity by the delta method, from that of a token's.

    Both are exp(loss x k), k being the tokens of a word or 1: the relative errors differ by the factor k.
    """
    if one.word_value is None or not (one.word_value > 1 and 1 < one.value < math.inf):
        return None
    return one.word_value * math.log(one.word_value) / math.log(one.value) * one.stderr / one.value


def _tasks(record: Results) -> Iterable[Figure]:
    result = record.zero_shot
    if result is None:
        return
    for task, one in result.tasks.items():
        for metric in dict.fromkeys((one.metric, *one.all)):
            reported = metric == one.metric
            protocol = protocols.task_protocol(result, one, metric)
            value, stderr = (one.value, one.stderr) if reported else (one.all[metric], one.stderrs.get(metric))
            yield figure(
                f"{task} {metric}",
                f"zero_shot.{task}.{metric}.{one.n}{_task_name(protocol)}",
                f"{task}, {metric} (n = {one.n:,}{_task_notes(protocol)})",
                "accuracy" if protocols.is_share(metric) else "number",
                protocol,
                cell_of(record, f"zero_shot.tasks.{task}.value" if reported else "", value, stderr, one.n),
                place="table" if reported else "data",
                exact=_exact(result, one),
            )


def _exact(result: ZeroShotResult, one: TaskResult) -> dict[str, str]:
    """How people say what a protocol's fields say."""
    limited = {"n": f"limit {one.n}"} if result.limit == one.n else {}
    return {"harness": f"harness {result.harness}", **limited}


def _task_notes(protocol: Protocol) -> str:
    """What is unusual of how a task was asked, for the title."""
    notes = [f"{protocol['num_fewshot']}-shot"] if protocol["num_fewshot"] else []
    notes += ["chat template"] if protocol["chat_template"] else []
    notes += [str(protocol["harness"])] if protocol["harness"] != protocols.HARNESS else []
    return "".join(f", {note}" for note in notes)


def _task_name(protocol: Protocol) -> str:
    """What else identifies how a task was asked, for the name."""
    shots = protocol["num_fewshot"]
    parts = ["mixedshot"] if shots is None else [f"{shots}shot"] if shots else []
    parts += ["chat"] if protocol["chat_template"] else []
    parts += [str(protocol["harness"]).replace(" ", "-")] if protocol["harness"] != protocols.HARNESS else []
    parts += [f"v{protocol['version']}"] if protocol["version"] is not None else []
    parts += [str(protocol["requests_sha256"])[:8]] if protocol["requests_sha256"] else []
    return "".join(f".{part}" for part in parts)


def _means(record: Results) -> Iterable[Figure]:
    result = record.zero_shot
    if result is None or not result.tasks or not (result.mean_of or math.isfinite(result.mean)):
        return  # a record from before it named the tasks has at least their mean
    protocol, tasks = protocols.mean_protocol(result), protocols.mean_tasks(result)
    exact = {task: _exact(result, one) for task, one in tasks.items()}
    k, questions = len(tasks), sum(one.n for one in tasks.values())
    notes = {_task_notes(protocols.task_protocol(result, one, one.metric)) for one in tasks.values()}
    note = notes.pop() if len(notes) == 1 else ""
    row = Row(
        # The tasks' names would make a name of several lines; they are in the protocol.
        f"zero_shot.mean.{k}.{questions}.{protocols.fingerprint(protocol)}",
        f"Zero-shot mean ({k} task{'s' if k > 1 else ''}, {questions:,} questions{note})",
        "accuracy" if all(protocols.is_share(one.metric) for one in tasks.values()) else "number",
        [],
        protocol,
    )
    cell = cell_of(record, "zero_shot.mean", result.mean, result.mean_stderr, questions)
    yield Figure("mean", row, cell, lambda here: protocols.mean_differences(protocol, here, exact))


def _drifts(record: Results) -> Iterable[Figure]:
    for index, one in enumerate(record.drift):
        protocol = protocols.drift_protocol(one)
        title, name = _window_notes(protocol)
        name = f"{one.corpus}.{one.sequence_length}.{one.bos}.{one.tokens}{name}.{protocols.short(one.reference)}"
        title = f"({one.corpus} @ {one.sequence_length}{title})"
        yield figure(
            f"kl {one.corpus}",
            f"drift.kl.{name}",
            f"KL from dense, nats {title}",
            "divergence",
            protocol,
            cell_of(record, f"drift[{index}].kl", one.kl, one.kl_stderr, one.tokens),
        )
        yield figure(
            f"top1 {one.corpus}",
            f"drift.top1_agreement.{name}",
            f"Top-1 agreement with dense {title}",
            "agreement",
            protocol,
            cell_of(record, f"drift[{index}].top1_agreement", one.top1_agreement, one.top1_stderr, one.tokens),
            place="page",
        )
