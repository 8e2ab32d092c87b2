"""Rows of a comparison on speed, memory, energy and work: those of each grid point that was measured."""

import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from slm_pl.evaluation.efficiency.record import EfficiencyResult, Ratio, Spread
from slm_pl.report import protocols
from slm_pl.report.matching import NOT_MEASURED, Figure, figure, lined_up
from slm_pl.report.rows import Cell, Place, Protocol, Quantity, Row, one_line
from slm_pl.results import Results

FEW_POINTS = 3
"""Points of a protocol of which the table has room for every figure."""

_OF_GRIDS = ("latency_s", "output_tokens_per_s")  # all that the table has room for of more points
_ALWAYS = ("latency_s", "peak_memory_bytes")  # told also where no model has one: the reason is worth it


@dataclass(frozen=True)
class _Kind:
    """A figure of a grid point.

    Args:
        name: The end of its row's name.
        title: For people.
        quantity: Of its row.
        path: Where it stands in an :class:`EfficiencyResult`.
        place: Of its row.
        least: Fewest new tokens of a run that has it.
        forward: Its title of a forward pass, if that is another one.
        gpu: Key of the reason why it is absent at all points.
        unit: The row's unit in the record's.
    """

    name: str
    title: str
    quantity: Quantity
    path: str
    place: Place = "data"
    least: int = 0
    forward: str = ""
    gpu: str = ""
    unit: float = 1.0


_KINDS: tuple[_Kind, ...] = (
    _Kind("latency_s", "Latency, median", "seconds", "latency_s", "table", forward="Prefill, median"),
    _Kind("time_to_first_token_s", "Time to first token, median", "seconds", "time_to_first_token_s", "table", 1),
    _Kind("time_per_output_token_s", "Time per output token, median", "seconds", "time_per_output_token_s", "table", 2),
    _Kind("output_tokens_per_s", "Output tokens/s, median", "rate", "output_tokens_per_s", "table", 1),
    _Kind("peak_memory_bytes", "Peak memory", "bytes", "peak_memory_bytes.max", "table"),
    _Kind(
        "total_tokens_per_s",
        "Prompt and output tokens/s, median",
        "rate",
        "total_tokens_per_s",
        "page",
        forward="Prompt tokens/s, median",
    ),
    _Kind(
        "joules_per_token",
        "Energy per output token",
        "joules",
        "energy.joules_per_token",
        "page",
        forward="Energy per prompt token",
        gpu="gpu_energy",
    ),
    _Kind(
        "gpu_utilisation",
        "GPU utilisation, median",
        "share",
        "utilisation.gpu_percent",
        "page",
        gpu="gpu_utilisation",
        unit=0.01,
    ),
    _Kind("macs_per_prompt_token", "MACs per prompt token", "macs", "work.macs_per_prompt_token", "page"),
    _Kind("macs_per_output_token", "MACs per output token", "macs", "work.macs_per_output_token", "page", 1),
    _Kind("kv_bytes_per_token", "Key/value cache per token", "size", "work.kv_bytes_per_token", "page", 1),
    _Kind("limit_share", "Least time for the work over latency", "share", "limit.latency_share", "page"),
    _Kind("prefill_flops_share", "Prefill MFU, of the measured peak", "share", "limit.prefill_flops_share", "page"),
    _Kind(
        "decode_bandwidth_share",
        "Decode bandwidth, of the measured peak",
        "share",
        "limit.decode_bandwidth_share",
        "page",
        2,
    ),
    # From here on for programs only.
    _Kind("latency_p95_s", "Latency, 95th percentile", "seconds", "latency_s.p95"),
    _Kind("latency_p99_s", "Latency, 99th percentile", "seconds", "latency_s.p99"),
    _Kind("inter_token_s", "Time between tokens, median", "seconds", "inter_token_s", least=2),
    _Kind("inter_token_p99_s", "Time between tokens, 99th percentile", "seconds", "inter_token_s.p99", least=2),
    _Kind("memory.weights", "Memory of weights", "bytes", "memory.weights"),
    _Kind("memory.kv_cache", "Memory of the key/value cache", "bytes", "memory.kv_cache", least=1),
    _Kind("memory.kv_cache_computed", "Key/value cache by arithmetic", "size", "memory.kv_cache_computed", least=1),
    _Kind("memory.activations", "Memory of activations", "bytes", "memory.activations"),
    _Kind("memory.other", "Other memory", "bytes", "memory.other"),
    _Kind("memory.reserved", "Memory reserved by the allocator", "bytes", "peak_memory_bytes.reserved"),
    _Kind("memory.process", "GPU memory of the process", "bytes", "memory.process", gpu="gpu_memory"),
    _Kind("memory.device", "GPU memory of all processes", "bytes", "memory.device", gpu="gpu_memory"),
    _Kind(
        "gpu_memory_utilisation",
        "GPU memory utilisation, median",
        "share",
        "utilisation.memory_percent",
        gpu="gpu_utilisation",
        unit=0.01,
    ),
    _Kind("gpu_power_w", "GPU power, median", "number", "utilisation.power_w", gpu="gpu_utilisation"),
    _Kind("gpu_clock_mhz", "GPU clock, median", "number", "utilisation.sm_clock_mhz", gpu="gpu_utilisation"),
    _Kind("gpu_temperature_c", "GPU temperature, median", "number", "utilisation.temperature_c", gpu="gpu_utilisation"),
    _Kind("joules", "Energy of the counted runs", "joules", "energy.joules", gpu="gpu_energy"),
    _Kind("prefill_macs", "MACs of the prefill", "macs", "work.prefill_macs"),
    _Kind("decode_macs", "MACs of decoding", "macs", "work.decode_macs", least=1),
    _Kind("step_bytes", "Bytes read by a decode step", "size", "work.step_bytes", least=2),
    _Kind("least_latency_s", "Least time for the work", "seconds", "limit.latency_s"),
    _Kind(
        "least_time_to_first_token_s", "Least time to first token", "seconds", "limit.time_to_first_token_s", least=1
    ),
    _Kind(
        "least_time_per_output_token_s",
        "Least time per output token",
        "seconds",
        "limit.time_per_output_token_s",
        least=2,
    ),
    _Kind("machine_flops_per_s", "Measured peak, FLOP/s", "number", "machine_peak.flops_per_s"),
    _Kind("machine_bytes_per_s", "Measured peak, bytes/s", "number", "machine_peak.bytes_per_s"),
)
_PAIRED: tuple[_Kind, ...] = (
    _Kind("latency", "Speed-up", "speedup", "latency", "table", forward="Speed-up of the prefill"),
    _Kind("time_to_first_token", "Speed-up to the first token", "speedup", "time_to_first_token", "page", 1),
    _Kind("time_per_output_token", "Speed-up per output token", "speedup", "time_per_output_token", "page", 2),
    _Kind("promise.layers", "Promised by layers", "promise", "promise.layers", "page"),
    _Kind(
        "promise.prefill_layer_times",
        "Promised by layer times, prefill",
        "promise",
        "promise.prefill_layer_times",
        "page",
    ),
    _Kind(
        "promise.decode_layer_times",
        "Promised by layer times, decode",
        "promise",
        "promise.decode_layer_times",
        "page",
        2,
    ),
    _Kind("promise.prefill_macs", "Promised by MACs, prefill", "promise", "promise.prefill_macs", "page"),
    _Kind("promise.decode_bytes", "Promised by bytes read, decode", "promise", "promise.decode_bytes", "page", 2),
    _Kind("baseline_latency", "Latency of the baseline, in turn", "seconds", "baseline_latency_s"),
    _Kind("own_latency", "Latency, in turn with the baseline", "seconds", "latency_s"),
)


def generation_rows(records: list[Results]) -> list[Row]:
    """The rows, point by point."""
    rows = lined_up(records, _figures, _reason, _worth)
    points = {_point(row.protocol): None for row in rows}
    order = {point: index for index, point in enumerate(points)}
    return sorted(rows, key=lambda row: order[_point(row.protocol)])


def _name(one: EfficiencyResult) -> str:
    parts = [
        "efficiency",
        one.protocol,
        one.batch_size,
        one.prompt_tokens,
        one.new_tokens,
        *protocols.runtime_notes(one),
    ]
    return ".".join(str(part).replace(" ", "-") for part in parts)


def _point(protocol: Protocol) -> str:
    return protocols.frozen({name: value for name, value in protocol.items() if name != "baseline"})


def _worth(row: Row) -> bool:
    return row.name.endswith(tuple(f".{name}" for name in _ALWAYS)) or any(cell.value is not None for cell in row.cells)


def _figures(record: Results) -> Iterable[Figure]:
    points = Counter(one.protocol for one in record.efficiency)
    for index, one in enumerate(record.efficiency):
        few = points[one.protocol] <= FEW_POINTS
        place = f"efficiency[{index}]"
        protocol, name, setting = protocols.generation_protocol(one), _name(one), protocols.setting_text(one)
        for kind in _KINDS:
            if one.new_tokens >= kind.least:
                cell = _cell(record, one, kind, place, _at(one, kind.path))
                title = f"{_title(kind, one)} ({setting})"
                shown = kind.place if kind.place != "table" or few or kind.name in _OF_GRIDS else "page"
                yield figure(kind.name, f"{name}.{kind.name}", title, kind.quantity, protocol, cell, shown)
        if one.paired is None:
            continue
        against = {**protocol, "baseline": one.paired.baseline}
        name += f".paired.{protocols.short(one.paired.baseline)}"
        for kind in _PAIRED:
            if one.new_tokens >= kind.least:
                cell = _cell(record, one, kind, f"{place}.paired", _at(one.paired, kind.path))
                title = f"{_title(kind, one)} ({setting})"
                shown = kind.place if kind.place != "table" or few else "page"
                subject = f"paired {kind.name}"
                yield figure(subject, f"{name}.{kind.name}", title, kind.quantity, against, cell, shown)


def _title(kind: _Kind, one: EfficiencyResult) -> str:
    return kind.title if one.new_tokens or not kind.forward else kind.forward


def _at(whole: object, path: str) -> object:
    """A field of fields; None where a part of the way is absent."""
    return functools.reduce(lambda part, name: getattr(part, name, None), path.split("."), whole)


def _cell(record: Results, one: EfficiencyResult, kind: _Kind, place: str, value: object) -> Cell:
    found = Cell(None)
    if isinstance(value, Spread):
        stdev = kind.unit * value.stdev if math.isfinite(value.stdev) else None
        n = one.repeats if value.n is None else value.n
        found = Cell(kind.unit * value.median, spread=stdev, n=n)
    elif isinstance(value, Ratio):
        found = Cell(value.value, low=value.low, high=value.high, confidence=value.confidence, n=value.pairs)
    elif isinstance(value, int | float):
        found = Cell(value if kind.unit == 1 else kind.unit * value)  # bytes stay whole
    if found.value is not None and math.isfinite(found.value):
        return found
    unknown = NOT_MEASURED if value is None else "not a finite number"
    return Cell(None, reason=one_line(_reason_at(record, place, kind) or unknown))


def _reason_at(record: Results, place: str, kind: _Kind) -> str | None:
    """Why a figure is absent: by itself, with all that it is part of, with its point, or of all points."""
    parts = kind.path.split(".")
    keys = [f"{place}.{kind.path}.median"]
    keys += [".".join([place, *parts[:length]]) for length in range(len(parts), 0, -1)]
    keys += [f"{place}.latency_s", kind.gpu]
    return next((record.missing[key] for key in keys if key in record.missing), None)


def _reason(record: Results, row: Row) -> str | None:
    """Why a model has no figure in a row at all; only of speed-ups it says more than its protocol does."""
    if "efficiency" in record.missing:
        return record.missing["efficiency"]
    baseline = row.protocol.get("baseline")
    if baseline is None:
        return None
    for index, one in enumerate(record.efficiency):
        if one.paired is None and protocols.frozen(protocols.generation_protocol(one)) == _point(row.protocol):
            for key in (f"efficiency[{index}].paired", f"efficiency[{index}].latency_s"):
                if key in record.missing:
                    return record.missing[key]
    dense = record.model.plan_sha256 is None
    return (
        "it is the baseline of the speed-ups"
        if dense and baseline in (record.model.source, record.model.base)
        else None
    )
