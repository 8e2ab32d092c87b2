import csv
import dataclasses
import hashlib
import json

import pytest

from slm_pl.compression.plan import Base, DropLayers, Method, Plan
from slm_pl.evaluation.efficiency.record import Paired
from slm_pl.report import compare
from slm_pl.report.comparison import line_up
from slm_pl.report.protocols import same_machine
from slm_pl.report.tables import csv_text, json_text, latex, markdown, table_of
from slm_pl.report.webpage import page
from tests.helpers.records import lost_point, marks_of, reasons_of, record_of, rich_point, save, values_of

POINT = "efficiency.shortened_llama.1.12.128"
BASIC = ["latency_s", "time_to_first_token_s", "output_tokens_per_s", "peak_memory_bytes"]


def _record(label, *points, plan=None, **record):
    made = record_of(label, plan, **record)
    made.efficiency = list(points)
    return made


def _pair(folder, dense, pruned, **environment):
    """A dense and a pruned model with these points."""
    models = {"dense": _record("dense", *dense), "pruned": _record("pruned", *pruned, plan="ab", **environment)}
    return line_up(save(folder, **models))


def _with(point, **runtime):
    return dataclasses.replace(point, runtime=dataclasses.replace(point.runtime, **runtime))


def _of(comparison, name):
    (row,) = [row for row in comparison.rows if row.name == name]
    return row


def _names(comparison, place=None):
    return [
        row.name.removeprefix(f"{POINT}.")
        for row in comparison.rows
        if row.name.startswith("efficiency.") and place in (None, row.place)
    ]


# --------------------------------------------------------------------------------------------- names and places


def test_an_old_record_has_the_rows_that_it_always_had(tmp_path):
    comparison = line_up(save(tmp_path, dense=record_of("dense")))
    assert [row.name for row in comparison.rows if row.name.startswith("efficiency.")] == [
        f"{POINT}.{figure}" for figure in BASIC
    ]
    assert {row.place for row in comparison.rows if row.name.startswith("efficiency.")} == {"table"}


def test_everything_measured_has_a_row_in_its_place(tmp_path):
    comparison = line_up(save(tmp_path, pruned=_record("pruned", rich_point(gpu=True, baseline="hub/x"), plan="a")))
    paired = f"paired.{hashlib.sha256(b'hub/x').hexdigest()[:8]}"
    assert _names(comparison, "table") == [
        "latency_s", "time_to_first_token_s", "time_per_output_token_s", "output_tokens_per_s", "peak_memory_bytes",
        f"{paired}.latency",
    ]  # fmt: skip
    beside = ["time_to_first_token", "time_per_output_token", "promise.layers", "promise.prefill_layer_times"]
    beside += ["promise.decode_layer_times", "promise.prefill_macs", "promise.decode_bytes"]
    assert _names(comparison, "page") == [
        "total_tokens_per_s", "joules_per_token", "gpu_utilisation", "macs_per_prompt_token", "macs_per_output_token",
        "kv_bytes_per_token", "limit_share", "prefill_flops_share", "decode_bandwidth_share",
        *(f"{paired}.{name}" for name in beside),
    ]  # fmt: skip
    assert {"inter_token_p99_s", "memory.kv_cache", "gpu_power_w", "latency_p95_s"} <= set(_names(comparison, "data"))
    assert len(table_of(comparison).lines) == 6 + 5
    assert len({row.name for row in comparison.rows}) == len(comparison.rows)


def test_values_are_in_the_rows_units(tmp_path):
    comparison = _pair(tmp_path, [rich_point(4.0, gpu=True)], [rich_point(3.2, gpu=True)])
    for figure, value in {
        "time_per_output_token_s": 2.88 / 127,  # 3.2 s without a tenth, over all steps but the first
        "total_tokens_per_s": 140 / 3.2,
        "gpu_utilisation": 0.97,
        "joules_per_token": 0.39,
        "macs_per_prompt_token": 113e6,
        "kv_bytes_per_token": 23040,
        "limit_share": 0.5,
        "prefill_flops_share": 0.25,
        "decode_bandwidth_share": 0.6,
        "latency_p95_s": 3.84,
        "memory.activations": 64 * 2**20,
        "memory.reserved": 2**30,
        "least_latency_s": 1.6,
        "machine_flops_per_s": 1e11,
    }.items():
        assert values_of(comparison, f"{POINT}.{figure}")[1] == pytest.approx(value), figure
    counts = {name: _of(comparison, f"{POINT}.{name}").cells[1].n for name in ("latency_s", "inter_token_s")}
    assert counts == {"latency_s": 20, "inter_token_s": 2540}
    assert _of(comparison, f"{POINT}.gpu_utilisation").cells[1].spread == pytest.approx(0.001)
    # Of work there is a share of the dense model's; of a share there is none.
    assert _of(comparison, f"{POINT}.macs_per_output_token").cells[1].ratio == 1.0
    assert _of(comparison, f"{POINT}.limit_share").cells[1].ratio is None


@pytest.mark.parametrize(("batches", "table"), [([1, 2, 4], 5), ([1, 2, 4, 8], 2)])
def test_the_table_has_room_for_few_points(tmp_path, batches, table):
    grid = [rich_point(4.0, batch, baseline="hub/x") for batch in batches]
    comparison = line_up(save(tmp_path, pruned=_record("pruned", *grid, plan="a")))
    of_the_first = [name for name in _names(comparison, "table") if not name.startswith("efficiency.")]
    plain = [name for name in of_the_first if not name.startswith("paired.")]
    assert plain == (
        ["latency_s", "output_tokens_per_s"] if table == 2 else BASIC[:2] + ["time_per_output_token_s"] + BASIC[2:]
    )
    assert len(of_the_first) - len(plain) == (table == 5)
    # What has no place there is on the page.
    assert {"time_to_first_token_s", "peak_memory_bytes"} <= set(_names(comparison))
    # Other points of another protocol do not count.
    other = dataclasses.replace(rich_point(4.0), protocol="serving")
    comparison = line_up(save(tmp_path, pruned=_record("pruned", *grid, other, plan="a")))
    names = [row.name for row in comparison.rows if row.place == "table"]
    assert "efficiency.serving.1.12.128.sampled.peak_memory_bytes" in names


def test_a_point_that_only_one_model_has_of_a_large_grid_stays_in_the_table(tmp_path):
    grid = [rich_point(4.0, batch) for batch in (1, 2, 4, 8)]
    comparison = _pair(tmp_path, grid, [rich_point(3.2)])
    assert _of(comparison, f"{POINT}.peak_memory_bytes").place == "table"
    assert _of(comparison, "efficiency.shortened_llama.8.12.128.peak_memory_bytes").place == "page"


def test_a_forward_pass_is_a_prefill(tmp_path):
    point = rich_point(0.5, 1, 2048, 0, baseline="hub/x")
    comparison = line_up(save(tmp_path, pruned=_record("pruned", point, plan="a")))
    rows = {row.name: row for row in comparison.rows if row.name.startswith("efficiency.")}
    start = "efficiency.shortened_llama.1.2048.0"
    assert rows[f"{start}.latency_s"].title == "Prefill, median (batch 1, 2,048 tokens)"
    assert rows[f"{start}.total_tokens_per_s"].title == "Prompt tokens/s, median (batch 1, 2,048 tokens)"
    assert rows[f"{start}.total_tokens_per_s"].cells[0].value == 4096
    # What tokens alone have is no gap: it is not asked for.
    assert not [name for name in rows if "output_token" in name or "first_token" in name or "decode" in name]
    grid = [rich_point(0.5, batch, 2048, 0) for batch in (1, 2, 4, 8)]
    comparison = line_up(save(tmp_path, pruned=_record("pruned", *grid, plan="a")))
    shown = [row.name for row in comparison.rows if row.place == "table" and row.name.startswith("efficiency")]
    assert shown == [f"efficiency.shortened_llama.{batch}.2048.0.latency_s" for batch in (1, 2, 4, 8)]


def test_rows_are_point_by_point_and_the_speed_up_beside_its_point(tmp_path):
    points = [rich_point(4.0), rich_point(6.0, 8)]
    paired = [dataclasses.replace(one, paired=rich_point(baseline="models/dense").paired) for one in points]
    comparison = _pair(tmp_path, points, paired)
    batches = [row.protocol["batch_size"] for row in comparison.rows if row.name.startswith("efficiency")]
    assert batches == sorted(batches)
    assert len(set(batches)) == 2


# -------------------------------------------------------------------------------------------------- the runtime


def test_an_old_record_shares_rows_with_the_usual_runtime(tmp_path):
    old = record_of("old", "o", latency=3.0)
    path = tmp_path / "runs" / "old" / "results.json"
    old.save(path)
    data = json.loads(path.read_text())
    known = {
        "protocol", "batch_size", "prompt_tokens", "new_tokens", "warmup", "repeats", *BASIC,
    }  # fmt: skip
    del data["sha256"]  # as in a file that was edited on purpose, or written before there were any
    data["efficiency"] = [{name: value for name, value in data["efficiency"][0].items() if name in known}]
    for figure in BASIC:
        for name in ("p90", "p95", "p99", "n", "reserved"):
            data["efficiency"][0][figure].pop(name, None)
    path.write_text(json.dumps(data))
    paths = save(tmp_path / "runs", dense=_record("dense", rich_point(4.0), rich_point(0.5, 1, 2048, 0)))
    comparison = line_up([*paths, str(path)])
    assert values_of(comparison, f"{POINT}.latency_s") == [4.0, 3.0]
    assert reasons_of(comparison, f"{POINT}.time_per_output_token_s") == [None, "not measured"]
    # Nothing splits in two.
    assert len([row for row in comparison.rows if row.name.endswith(".latency_s")]) == 2
    assert not [warning for warning in comparison.warnings if "attention" in warning or "sampling" in warning]


@pytest.mark.parametrize(
    ("runtime", "name", "note", "reason"),
    [
        ({"cache": "static"}, ".static-cache", ", static cache", "cache static, here dynamic"),
        ({"compile": True}, ".compiled", ", compiled", "compile yes, here no"),
        ({"sdpa_backend": "math"}, ".SDPA-math", ", SDPA math", "sdpa_backend math, here none"),
        ({"sampling": "greedy"}, ".greedy", ", greedy", "sampling greedy, here sampled"),
    ],
)
def test_another_runtime_has_rows_of_its_own(tmp_path, runtime, name, note, reason):
    comparison = _pair(tmp_path, [rich_point(4.0)], [_with(rich_point(3.2), **runtime)])
    here, there = (_of(comparison, f"{POINT}{part}.latency_s") for part in ("", name))
    assert [cell.value for cell in here.cells] == [4.0, None]
    assert [cell.value for cell in there.cells] == [None, 3.2]
    assert here.cells[1].reason == f"measured with {reason}"
    assert there.title == f"Latency, median (batch 1, 12 + 128 tokens{note})"
    (warning,) = comparison.warnings
    assert warning.startswith("The records differ in generation protocol (dense: ")


def test_other_attention_shares_rows_is_warned_of_and_not_ranked(tmp_path):
    points = {name: _with(rich_point(3.0 + index), attention=name) for index, name in enumerate(("sdpa", "eager"))}
    models = {name: _record(name, point, plan=name) for name, point in points.items()}
    comparison = line_up(save(tmp_path, dense=_record("dense", rich_point(4.0)), **models))
    assert values_of(comparison, f"{POINT}.latency_s") == [4.0, 3.0, 4.0]
    assert marks_of(comparison, f"{POINT}.output_tokens_per_s") == [None] * 3
    assert comparison.warnings == [
        "The records differ in attention (dense: sdpa; sdpa: sdpa; eager: eager): speed and memory do not compare."
    ]
    # An unknown one is not another one.
    models["eager"].efficiency = [_with(rich_point(4.0), attention=None)]
    comparison = line_up(save(tmp_path / "unknown", dense=_record("dense", rich_point(4.0)), **models))
    assert comparison.warnings == []
    assert marks_of(comparison, f"{POINT}.output_tokens_per_s") == [None, "best", None]


def test_a_quantised_model_compares_and_its_weights_are_told(tmp_path):
    quantised = _with(rich_point(3.0), dtype="bfloat16", quantization="int8 *weight-only* (torchao)")
    models = {
        "dense": _record("dense", rich_point(4.0)),
        "pruned": _record("pruned", rich_point(3.5), plan="a"),
        "small": _record("small", quantised, plan="b", dtype="int8"),
    }
    models["small"].zero_shot = dataclasses.replace(models["small"].zero_shot, dtype="int8")
    models["dense"].zero_shot = dataclasses.replace(models["dense"].zero_shot, dtype="float32")
    comparison = line_up(save(tmp_path, **models))
    assert comparison.warnings == []
    assert values_of(comparison, f"{POINT}.latency_s") == [4.0, 3.5, 3.0]
    assert marks_of(comparison, f"{POINT}.output_tokens_per_s")[1:] == [None, "best"]
    assert [cell.text for cell in _of(comparison, "weights").cells] == [
        "float32", "float32", "bfloat16, int8 *weight-only* (torchao)",
    ]  # fmt: skip
    assert r"| Weights | float32 | float32 | bfloat16, int8 \*weight-only\* (torchao) |" in markdown(comparison, {})
    assert r"Weights & float32 & float32 & bfloat16, int8 {*}weight-only{*} (torchao) \\" in latex(comparison)
    assert "<td>bfloat16, int8 *weight-only* (torchao)</td>" in page(comparison, {})
    *_, line = csv.DictReader(csv_text(comparison).splitlines())
    assert line["weights"] == "bfloat16, int8 *weight-only* (torchao)"
    # Between models that are not quantised, a dtype still counts; and alike models need no such row.
    models["small"].efficiency = [rich_point(3.0)]
    comparison = line_up(save(tmp_path / "dtype", **models))
    assert comparison.warnings[0].startswith(
        "The records differ in dtype (dense: float32; pruned: float32; small: int8)"
    )
    assert marks_of(comparison, f"{POINT}.output_tokens_per_s") == [None] * 3
    assert not [row for row in _pair(tmp_path / "alike", [rich_point()], [rich_point()]).rows if row.name == "weights"]


def test_energy_and_speed_ups_count_on_one_machine_only():
    records = [_record(name, rich_point(gpu=True), plan=name) for name in "ab"]
    assert all(same_machine(records, quantity) for quantity in ("joules", "speedup", "bytes"))
    records[1].efficiency = [rich_point()]
    assert same_machine(records, "joules")
    assert not same_machine(records, "bytes")  # other memory was counted
    records[1].environment = dataclasses.replace(records[1].environment, device="cuda:0")
    assert not same_machine(records, "joules")


@pytest.mark.parametrize(
    ("dense", "pruned", "told"),
    [
        ([(1, 12, 128), (8, 12, 128)], [(1, 12, 128)], "dense: batch 1, 8; pruned: batch 1"),
        (
            [(batch, 12, new) for batch in (1, 8, 16) for new in (128, 512)],
            [(1, 12, 128)],
            "dense: batch 1, 8, 16 and new tokens 128, 512; pruned: batch 1 and new tokens 128",
        ),
        (
            [(1, 12, 128), (8, 12, 128), (8, 12, 512)],
            [(1, 12, 128), (8, 12, 512)],
            "dense: batch 8 with 12 + 128 tokens; pruned: nothing else",
        ),
        (
            [(batch, 12, new) for batch in (1, 8, 16, 32) for new in (128, 512)],
            [(1, 12, 128), (8, 12, 512), (16, 12, 128), (32, 12, 128)],
            "dense: batch 1 with 12 + 512 tokens, batch 8 with 12 + 128 tokens, batch 16 with 12 + 512 tokens and 1 "
            "more; pruned: nothing else",
        ),
        ([(1, 12, 128)], [(1, 12, 128)], None),
    ],
)
def test_the_warning_of_grids_tells_only_what_differs(tmp_path, dense, pruned, told):
    grids = [[rich_point(4.0, *setting) for setting in settings] for settings in (dense, pruned)]
    warnings = _pair(tmp_path, *grids).warnings
    expected = f"The records differ in generation protocol ({told}): only figures in one row compare."
    assert warnings == ([expected] if told else [])


def test_other_repeats_are_warned_of_but_share_a_row(tmp_path):
    comparison = _pair(tmp_path, [rich_point(4.0)], [rich_point(3.2, warmup=1)])
    assert "(dense: warm-up 10; pruned: warm-up 1)" in comparison.warnings[0]
    assert values_of(comparison, f"{POINT}.output_tokens_per_s") == [32.0, 40.0]


# ---------------------------------------------------------------------------------------------- what is absent


def test_what_did_not_fit_says_so(tmp_path):
    lost = lost_point(batch_size=8)
    comparison = _pair(tmp_path, [rich_point(4.0), lost], [rich_point(3.2), rich_point(5.0, 8)])
    reason = "out of memory: the key/value cache alone takes 9.9 GB"
    start = "efficiency.shortened_llama.8.12.128"
    # Also of what the measurement itself left no word about.
    for figure in (
        "latency_s",
        "time_per_output_token_s",
        "peak_memory_bytes",
        "macs_per_prompt_token",
        "memory.weights",
    ):
        cell = _of(comparison, f"{start}.{figure}").cells[0]
        assert (cell.value, cell.reason) == (None, reason), figure
    text = markdown(comparison, {})
    assert "| Latency, median (batch 8, 12 + 128 tokens) | – [1] | 5.00 s |" in text
    assert f"[1] {reason}" in text
    # Where nobody got through, one row of the time and one of the memory say that.
    comparison = _pair(tmp_path / "all", [rich_point(4.0), lost], [rich_point(3.2), lost])
    names = [row.name for row in comparison.rows if row.name.startswith(start)]
    assert names == [f"{start}.latency_s", f"{start}.peak_memory_bytes"]


def test_reasons_of_the_gpu_hold_for_all_points(tmp_path):
    reasons = {
        "gpu_utilisation": "no NVML: use",
        "gpu_energy": "no NVML: energy",
        "gpu_memory": "no NVML: memory",
    }
    dense, pruned = _record("dense", rich_point(gpu=True)), _record("pruned", rich_point(), plan="ab")
    dense.efficiency[0] = dataclasses.replace(
        dense.efficiency[0], memory=dataclasses.replace(dense.efficiency[0].memory, process=2**30)
    )
    pruned.missing.update(reasons)
    comparison = line_up(save(tmp_path, dense=dense, pruned=pruned))
    for figure, key in (
        ("gpu_utilisation", "gpu_utilisation"),
        ("gpu_power_w", "gpu_utilisation"),
        ("joules_per_token", "gpu_energy"),
        ("memory.process", "gpu_memory"),
    ):
        assert _of(comparison, f"{POINT}.{figure}").cells[1].reason == reasons[key]
    # Where no model has a GPU, there is no row without a figure.
    assert not [
        name for name in _names(line_up(save(tmp_path / "cpu", pruned=pruned))) if "gpu" in name or "joule" in name
    ]


def test_the_reason_of_a_part_is_that_of_the_whole(tmp_path):
    pruned = _record("pruned", rich_point(work=None, limit=None), plan="ab")
    pruned.efficiency[0].missing["work"] = "not a model of transformers"
    pruned.efficiency[0].missing["limit"] = "no work, no limit"
    comparison = line_up(save(tmp_path, dense=_record("dense", rich_point()), pruned=pruned))
    assert _of(comparison, f"{POINT}.macs_per_prompt_token").cells[1].reason == "not a model of transformers"
    assert _of(comparison, f"{POINT}.limit_share").cells[1].reason == "no work, no limit"


# --------------------------------------------------------------------------------------------------- speed-ups


def _paired_rows(comparison):
    return {row.name.split(".", 7)[7]: row for row in comparison.rows if ".paired." in row.name}


def test_a_speed_up_has_its_interval_and_what_was_promised(tmp_path):
    comparison = _pair(tmp_path, [rich_point(4.8)], [rich_point(4.0, baseline="models/dense")])
    rows = _paired_rows(comparison)
    assert {name: row.cells[1].value for name, row in rows.items()} == {
        "latency": 1.19, "time_to_first_token": 1.19, "time_per_output_token": 1.19, "promise.layers": 1.25,
        "promise.prefill_layer_times": 1.2, "promise.decode_layer_times": 1.18, "promise.prefill_macs": 1.22,
        "promise.decode_bytes": 1.15, "baseline_latency": 4.8, "own_latency": 4.0,
    }  # fmt: skip
    assert rows["latency"].title == "Speed-up (batch 1, 12 + 128 tokens)"
    assert rows["latency"].protocol["baseline"] == "models/dense"
    text = markdown(comparison, {})
    assert "| Speed-up (batch 1, 12 + 128 tokens) | – [1] | 1.19× [1.17, 1.21] |" in text
    assert "[1] it is the baseline of the speed-ups" in text
    told = "Speed-ups are over models/dense, which ran in turn with each model in one process"
    assert told in text
    assert "[its confidence interval of 95.9 % or more]" in text
    assert 'title="1.19; 95.9 % interval 1.17 to 1.21; n = 20">1.19× [1.17, 1.21]</td>' in page(comparison, {})
    *_, line = csv.DictReader(csv_text(comparison).splitlines())
    name = rows["latency"].name
    assert [line[f"{name}{part}"] for part in ("", ".low", ".high", ".n")] == ["1.19", "1.17", "1.21", "20"]
    cells = next(row for row in json.loads(json_text(comparison))["rows"] if row["name"] == name)["cells"]
    assert (cells[1]["low"], cells[1]["high"], cells[1]["confidence"]) == (1.17, 1.21, 0.959)
    # Without one, nothing is said of them.
    assert told not in markdown(_pair(tmp_path / "alone", [rich_point()], [rich_point()]), {})


def test_speed_ups_of_a_large_grid_are_told_where_they_are_shown(tmp_path):
    grid = [rich_point(4.0, batch, baseline="hub/x") for batch in (1, 2, 4, 8)]
    comparison = line_up(save(tmp_path, pruned=_record("pruned", *grid, plan="a")))
    assert "Speed-ups are over hub/x" in page(comparison, {})
    assert "Speed-ups are over" not in markdown(comparison, {}) + latex(comparison)


def test_speed_ups_over_two_baselines_share_no_row(tmp_path):
    models = {name: _record(name, rich_point(baseline=f"hub/{name}"), plan=name) for name in "ab"}
    comparison = line_up(save(tmp_path, **models))
    rows = [row for row in comparison.rows if ".paired." in row.name and row.name.endswith(".latency")]
    assert [[cell.value for cell in row.cells] for row in rows] == [[1.19, None], [None, 1.19]]
    assert rows[0].cells[1].reason == "measured with baseline hub/b, here hub/a"
    assert rows[0].title == "Speed-up (batch 1, 12 + 128 tokens, baseline hub/a)"


def test_why_there_is_no_speed_up(tmp_path):
    reason = "out of memory with both models: OutOfMemoryError"
    other = _record("other", rich_point(3.0, missing={"paired": reason}), plan="cd")
    lost = _record("lost", lost_point(), plan="ef")
    pruned = _record("pruned", rich_point(4.0, baseline="models/dense"), plan="ab")
    comparison = line_up(save(tmp_path, pruned=pruned, other=other, lost=lost))
    assert [cell.reason for cell in _paired_rows(comparison)["latency"].cells] == [
        None, reason, "out of memory: the key/value cache alone takes 9.9 GB",
    ]  # fmt: skip


def test_speed_ups_tie_if_their_intervals_overlap(tmp_path):
    models = {}
    for name, low, value, high in (("a", 1.30, 1.32, 1.34), ("b", 1.2, 1.25, 1.31), ("c", 1.2, 1.25, 1.29)):
        point = rich_point(baseline="hub/x")
        assert isinstance(point.paired, Paired)
        ratio = dataclasses.replace(point.paired.latency, low=low, value=value, high=high)
        models[name] = _record(
            name, dataclasses.replace(point, paired=dataclasses.replace(point.paired, latency=ratio)), plan=name
        )
    comparison = line_up(save(tmp_path, **models))
    assert [cell.mark for cell in _paired_rows(comparison)["latency"].cells] == ["best", "tie", None]
    assert [cell.mark for cell in _paired_rows(comparison)["promise.layers"].cells] == [None] * 3


@pytest.mark.parametrize("quantization", [None, "int8 weight-only (torchao)"])
def test_what_loads_an_export_says_what_it_needs(quantization, tmp_path, capsys):
    export = tmp_path / "export"
    plan = Plan(Base("x", None, "llama", 6, 100, "0" * 64), Method("callbacks.SLEB", {}), None, (DropLayers((1,)),))
    plan.save(export / "plan.json")
    (export / "config.json").write_text("{}")
    record = record_of("pruned", plan=plan.sha256)
    record.model = dataclasses.replace(record.model, source=str(export), quantization=quantization)
    compare(save(tmp_path, pruned=record))
    shown = capsys.readouterr().out
    assert f"from_pretrained('{export}')" in shown
    assert ("# needs torchao" in shown) == (quantization is not None)
