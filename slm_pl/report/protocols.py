"""What figures of two models must share to compare, and how it is told if they do not."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence

from slm_pl.evaluation.drift import DriftResult
from slm_pl.evaluation.efficiency.record import EfficiencyResult
from slm_pl.evaluation.perplexity import PerplexityResult
from slm_pl.evaluation.zero_shot import SHARES, TaskResult, ZeroShotResult
from slm_pl.report.rows import Protocol, Quantity
from slm_pl.results import Results

HARNESS = "lm_eval 0.4"
"""The usual series of harness versions: only another one is in a title."""
CACHE = "dynamic"
"""The usual key/value cache."""

# Fields of a protocol, as people call them. An absent hash or version is unknown, anything else absent is "none".
_NAMES = {"sha256": "tokens hash", "requests_sha256": "requests hash", "version": "task version"}
_HASHES = ("sha256", "requests_sha256")


def _window_protocol(one: PerplexityResult | DriftResult) -> Protocol:
    """What text, and how it was cut into windows."""
    return {
        "corpus": one.corpus,
        "sequence_length": one.sequence_length,
        "bos": one.bos,
        "stride": one.stride,
        "tail": one.tail,
    }


def perplexity_protocol(one: PerplexityResult) -> Protocol:
    """Of the perplexity of a token."""
    return {**_window_protocol(one), "tokens": one.tokens, "sha256": one.sha256}


def word_protocol(one: PerplexityResult) -> Protocol:
    """Of the perplexity of a word.

    Its tokens may be another tokenizer's, if the windows cover the same words all the same. Windows end at tokens, so
    that takes the whole text, to its end: ``tail: keep`` and no ``max_tokens``.
    """
    return {**_window_protocol(one), "words": one.words}


def drift_protocol(one: DriftResult) -> Protocol:
    """Of the distance from the dense model."""
    return {"reference": one.reference, **_window_protocol(one), "tokens": one.tokens, "sha256": one.sha256}


def task_protocol(result: ZeroShotResult, one: TaskResult, metric: str) -> Protocol:
    """Of a metric of a task."""
    # Records from before a task had the number have it for all tasks together.
    shots = [number for number in (one.num_fewshot, result.num_fewshot) if number is not None]
    return {
        "metric": metric,
        "n": one.n,
        "num_fewshot": max(shots, default=None),
        "harness": harness_series(result.harness),
        "version": one.version,
        "requests_sha256": one.requests_sha256,
        "chat_template": result.chat_template,
    }


def mean_protocol(result: ZeroShotResult) -> Protocol:
    """Of the mean over tasks: that of every task in it, by its name."""
    return {task: task_protocol(result, one, one.metric) for task, one in sorted(mean_tasks(result).items())}


def is_share(metric: str) -> bool:
    """Whether a metric is a share of the questions; of another one nobody here knows the unit, or the better side."""
    return metric.partition(",")[0] in SHARES


def mean_tasks(result: ZeroShotResult) -> dict[str, TaskResult]:
    """The tasks in the mean; all of them where the record does not say."""
    return {task: one for task, one in result.tasks.items() if task in result.mean_of} or result.tasks


def generation_protocol(one: EfficiencyResult) -> Protocol:
    """Of speed and memory.

    A record from before the runtime was written was measured with what were the only values then. Attention and the
    quantisation of weights belong to the model: they are told, but keep nothing out of a row.
    """
    runtime = one.runtime
    return {
        "protocol": one.protocol,
        "batch_size": one.batch_size,
        "prompt_tokens": one.prompt_tokens,
        "new_tokens": one.new_tokens,
        "prompt": one.prompt or usual_prompt(one),
        "sampling": (runtime and runtime.sampling) or usual_sampling(one),
        "cache": runtime.cache if runtime else CACHE,
        "compile": runtime.compile if runtime else False,
        "sdpa_backend": runtime.sdpa_backend if runtime else None,
    }


def usual_prompt(one: EfficiencyResult) -> str:
    """What a protocol continues, unless a record says otherwise."""
    return "protocol" if one.protocol == "shortened_llama" else "prose"


def usual_sampling(one: EfficiencyResult) -> str:
    """How a protocol chooses the next token, unless a record says otherwise; a forward pass chooses none."""
    return "sampled" if one.protocol == "shortened_llama" else "greedy"


def setting_text(one: EfficiencyResult) -> str:
    """A grid point, as people read it: ``batch 1, 12 + 128 tokens``."""
    return f"batch {one.batch_size}, {tokens_text(one)}"


def tokens_text(one: EfficiencyResult) -> str:
    """What a grid point reads and makes, and what is unusual of how: ``12 + 128 tokens, static cache``."""
    made = f" + {one.new_tokens:,}" if one.new_tokens else ""
    return ", ".join([f"{one.prompt_tokens:,}{made} tokens", *runtime_notes(one)])


def runtime_notes(one: EfficiencyResult) -> list[str]:
    """What is unusual of how a model was run, for titles and names."""
    protocol = generation_protocol(one)
    notes = [str(protocol["prompt"])] if protocol["prompt"] != usual_prompt(one) else []
    notes += [str(protocol["sampling"])] if protocol["sampling"] != usual_sampling(one) else []
    notes += [f"{protocol['cache']} cache"] if protocol["cache"] != CACHE else []
    notes += ["compiled"] if protocol["compile"] else []
    return notes + ([f"SDPA {protocol['sdpa_backend']}"] if protocol["sdpa_backend"] is not None else [])


def quantization_of(record: Results) -> str | None:
    """How a model's weights are quantised, as far as its record says."""
    told = next((one.runtime.quantization for one in record.efficiency if one.runtime), None)
    return record.model.quantization or told


def weights_text(record: Results) -> str:
    """What a model's weights are stored as."""
    quantization = quantization_of(record)
    if quantization is None:
        return record.environment.dtype
    dtypes = [one.runtime.dtype for one in record.efficiency if one.runtime]
    return f"{next(iter(dtypes), record.environment.dtype)}, {quantization}"


def harness_series(harness: str) -> str:
    """A harness's name without what changes no figure: ``lm_eval 0.4`` of 0.4.13; a commit is a series of its own."""
    return re.sub(r"^(\S+ \d+\.\d+)(\..*)?$", r"\1", harness)


def frozen(protocol: Protocol) -> str:
    """A text that is equal for equal protocols."""
    return json.dumps(protocol, sort_keys=True)


def fingerprint(protocol: Protocol) -> str:
    """A short name of a protocol that does not depend on what it is compared with."""
    return short(frozen(protocol))


def short(text: str) -> str:
    """Eight letters in place of a text of any length."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]


def differing_fields(theirs: Protocol, here: Protocol) -> list[str]:
    """Names of the fields that differ; a hash only where nothing else explains it."""
    fields = [name for name in here if theirs.get(name) != here[name]]
    return [name for name in fields if name not in _HASHES] or fields


def differences(theirs: Protocol, here: Protocol, exact: dict[str, str] | None = None) -> str:
    """Tells in what a protocol differs: ``limit 25, here 100; num_fewshot 5, here 0``.

    Args:
        theirs: The protocol that a figure was measured with.
        here: The row's.
        exact: Better words for fields of ``theirs``, such as ``limit 25`` for 25 questions.
    """
    return "; ".join(
        f"{(exact or {}).get(name, field_text(name, theirs.get(name)))}, here {value_text(name, here[name])}"
        for name in differing_fields(theirs, here)
    )


def mean_differences(theirs: Protocol, here: Protocol, exact: dict[str, dict[str, str]] | None = None) -> str:
    """As :func:`differences`, of two means over tasks; ``exact`` holds better words for each task."""
    lacking, besides = [task for task in here if task not in theirs], [task for task in theirs if task not in here]
    if lacking or besides:
        return "other tasks: " + " and ".join(
            [f"without {', '.join(lacking)}"] * bool(lacking) + [f"{', '.join(besides)} besides"] * bool(besides)
        )
    tasks_of: dict[str, list[str]] = {}
    for task, protocol in here.items():
        own = theirs[task]
        assert isinstance(own, dict)
        assert isinstance(protocol, dict)
        if own != protocol:
            tasks_of.setdefault(differences(own, protocol, (exact or {}).get(task)), []).append(task)
    if len(tasks_of) == 1 and len(next(iter(tasks_of.values()))) == len(here):
        return next(iter(tasks_of))
    return "; ".join(f"{', '.join(tasks)}: {text}" for text, tasks in tasks_of.items())


def field_text(name: str, value: object) -> str:
    """A field with its value, as people read it."""
    return f"{_NAMES.get(name, name)} {value_text(name, value)}"


def value_text(name: str, value: object) -> str:
    """A field's value."""
    if value is None:
        return "unknown" if name in _NAMES else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        str(value)[:8] if name in _HASHES else str(value).removeprefix("lm_eval ") if name == "harness" else str(value)
    )


def warnings_of(labels: list[str], records: list[Results]) -> list[str]:
    """What keeps figures of these records from being comparable."""
    warnings = []

    def differing(what: str, of: Callable[[Results], object], consequence: str) -> None:
        values = {label: of(record) for label, record in zip(labels, records, strict=True)}
        # A room that a record lacks is a footnote in the table, not a difference.
        values = {label: value for label, value in values.items() if value not in (None, (), [])}
        if len({repr(value) for value in values.values()}) > 1:
            each = "; ".join(f"{label}: {_plain(value)}" for label, value in values.items())
            warnings.append(f"The records differ in {what} ({each}): {consequence}.")

    for what, of in _MACHINE:
        last_digits = what == "dtype"
        differing(what, of, "speed, memory and the last digits do not compare" if last_digits else _SPEED)
    differing(
        "embedded text",
        lambda record: (record.environment.embedded_sha256 or "")[:8] or None,
        "it comes from the running Python: what was measured on it does not compare",
    )
    differing("torch version", lambda record: record.environment.packages.get("torch"), _SPEED)
    differing(
        "perplexity protocol",
        lambda record: sorted(
            f"{one.corpus} @ {one.sequence_length}, BOS {one.bos}, {one.tokens} tokens, "
            + (f"stride {one.stride}, " if one.stride is not None else "")
            + (f"tail {one.tail}, " if one.tail != "drop" else "")
            + f"ids {(one.sha256 or 'unknown')[:8]}"
            for one in record.perplexity
        ),
        "only figures in one row compare",
    )
    differing("zero-shot protocol", _zero_shot_text, "only figures in one row compare")
    # The same dtypes as the environments' were warned of.
    if [_zero_shot_dtype(record) for record in records] != [_dtype(record) for record in records]:
        differing("zero-shot dtype", _zero_shot_dtype, "the last digits of accuracies do not compare")
    differing(
        "zero-shot batch size",
        lambda record: record.zero_shot.batch_size if record.zero_shot else None,
        "the last digits of accuracies do not compare",
    )
    differing(
        "drift reference",
        lambda record: sorted({one.reference for one in record.drift}),
        "only figures in one row compare",
    )
    warnings += _generation_warning(labels, records)
    differing("attention", _attention, _SPEED)
    differing("memory counted", _memory_source, "peak memory does not compare")
    return warnings


def same_machine(records: Sequence[Results], quantity: Quantity) -> bool:
    """Whether speed or memory of these records was measured in the same surroundings, as far as they say."""
    aspects = [lambda record: record.environment.packages.get("torch"), _attention, *(of for _, of in _MACHINE)]
    aspects += [_memory_source] if quantity == "bytes" else []
    measured = [record for record in records if record.efficiency]
    return all(len({repr(of(record)) for record in measured if of(record)}) < 2 for of in aspects)


_SPEED = "speed and memory do not compare"
_MACHINE: tuple[tuple[str, Callable[[Results], object]], ...] = (
    ("device", lambda record: record.environment.device),
    ("device name", lambda record: record.environment.device_name),
    ("threads", lambda record: record.environment.threads),
    ("dtype", lambda record: _dtype(record)),
)


def _dtype(record: Results) -> str | None:
    """A model's dtype; None of a quantised one: to be stored in other bits than the others is what it is for."""
    return record.environment.dtype if quantization_of(record) is None else None


def _attention(record: Results) -> list[str]:
    return sorted({one.runtime.attention for one in record.efficiency if one.runtime and one.runtime.attention})


# Fields of a grid, as people call them.
_GRID: dict[str, str] = {
    "protocol": "protocol",
    "batch_size": "batch",
    "prompt_tokens": "prompt tokens",
    "new_tokens": "new tokens",
    "sampling": "sampling",
    "cache": "cache",
    "compile": "compile",
    "sdpa_backend": "SDPA kernels",
    "warmup": "warm-up",
    "repeats": "repeats",
}
_MOST_POINTS = 3


def _generation_warning(labels: list[str], records: list[Results]) -> list[str]:
    """In what the grids differ: field by field, for a list of all points would be long."""
    grids = {
        label: [{**generation_protocol(one), "warmup": one.warmup, "repeats": one.repeats} for one in record.efficiency]
        for label, record in zip(labels, records, strict=True)
        if record.efficiency
    }
    values = {
        label: {name: dict.fromkeys(one[name] for one in grid) for name in _GRID} for label, grid in grids.items()
    }
    first = next(iter(values.values()), {})
    differing = [name for name in _GRID if any(one[name] != first[name] for one in values.values())]
    texts = {
        label: " and ".join(f"{_GRID[name]} {_plain([value_text(name, v) for v in one[name]])}" for name in differing)
        for label, one in values.items()
    }
    if not differing:
        points = {label: {frozen(one): _point_text(one) for one in grid} for label, grid in grids.items()}
        shared = set.intersection(*(set(of) for of in points.values())) if points else set()
        own = {label: [text for key, text in of.items() if key not in shared] for label, of in points.items()}
        if not any(own.values()):
            return []
        texts = {
            label: ", ".join(of[:_MOST_POINTS]) + f" and {len(of) - _MOST_POINTS} more" * (len(of) > _MOST_POINTS)
            for label, of in own.items()
        }
    each = "; ".join(f"{label}: {text or 'nothing else'}" for label, text in texts.items())
    return [f"The records differ in generation protocol ({each}): only figures in one row compare."]


def _point_text(point: Protocol) -> str:
    return f"batch {point['batch_size']} with {point['prompt_tokens']} + {point['new_tokens']} tokens"


def _zero_shot_text(record: Results) -> object:
    if record.zero_shot is None:
        return None
    one = record.zero_shot
    examples = "differing numbers of examples" if one.num_fewshot is None else f"{one.num_fewshot} examples"
    return (one.harness, examples, f"limit {one.limit}", *["chat template"] * one.chat_template)


def _zero_shot_dtype(record: Results) -> str | None:
    return record.zero_shot.dtype if record.zero_shot and quantization_of(record) is None else None


def _memory_source(record: Results) -> list[str]:
    return sorted({one.peak_memory_bytes.source for one in record.efficiency if one.peak_memory_bytes})


def _plain(value: object) -> str:
    return ", ".join(str(part) for part in value) if isinstance(value, list | tuple) else str(value)
