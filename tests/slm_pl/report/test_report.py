import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slm_pl.compression.plan import Base, DropLayers, Method, Plan
from slm_pl.errors import UsageError
from slm_pl.evaluation import PerplexityResult
from slm_pl.report import compare
from slm_pl.results import Environment, FormError, Results, decode
from tests.helpers.pico import pico_model
from tests.helpers.records import record_of, row_of, save, values_of

# ------------------------------------------------------------------------------------------------- the record


def test_round_trip_and_names(tmp_path):
    record = record_of("pruned", plan="ab")
    record.missing["gpu_utilisation"] = "no NVML device"
    record.save(tmp_path / "new" / "results.json")
    assert Results.load(tmp_path / "new" / "results.json") == record
    data = json.loads((tmp_path / "new" / "results.json").read_text())
    assert list(data) == [
        "schema_version", "model", "environment", "perplexity", "zero_shot", "efficiency", "missing", "sha256",
    ]  # fmt: skip
    assert data["model"] == {
        "label": "pruned",
        "source": "models/pruned",
        "base": "models/dense",
        "num_layers": 24,
        "num_parameters": 80,
        "plan_sha256": "ab",
        "requested_ratio": None,
        "quantization": None,
    }
    assert data["perplexity"][0] == {
        "corpus": "embedded", "sequence_length": 128, "bos": "none", "tokens": 4064, "value": 20.0, "stderr": 0.5,
        "sha256": None, "stride": None, "tail": "drop", "word_value": None, "words": None,
    }  # fmt: skip
    boolq = {"metric": "acc", "value": 0.6, "stderr": 0.02, "n": 25, "all": {"acc": 0.6}, "stderrs": {}}
    assert boolq.items() <= data["zero_shot"]["tasks"]["boolq"].items()
    assert (data["zero_shot"]["harness"], data["zero_shot"]["mean"]) == ("lm_eval 0.4.13", 0.6)
    entry = data["efficiency"][0]
    latency = {"median": 4.0, "mean": 4.0, "stdev": 0.1, "min": 4.0, "max": 4.0}
    assert entry["latency_s"] == latency | dict.fromkeys(("p90", "p95", "p99", "n"))
    assert entry["peak_memory_bytes"] == {
        "max": 2**30, "source": "process peak resident set (VmHWM)", "reserved": None,
    }  # fmt: skip
    assert (entry["limit"], entry["paired"]) == (None, None)
    assert data["environment"]["git"] is None
    assert data["missing"] == {"gpu_utilisation": "no NVML device"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.json"]


def test_what_is_missing_is_absent_with_its_reason(tmp_path):
    record = record_of("pruned", plan="ab", perplexity=math.inf)
    record.zero_shot = None
    record.efficiency[0] = dataclasses.replace(
        record.efficiency[0], peak_memory_bytes=None, missing={"peak_memory_bytes": "not allowed"}
    )
    record.save(tmp_path / "results.json")
    data = json.loads((tmp_path / "results.json").read_text())
    assert "zero_shot" not in data
    assert "value" not in data["perplexity"][0]
    assert "peak_memory_bytes" not in data["efficiency"][0]
    assert data["missing"] == {
        "perplexity[0].value": "not a finite number (inf)",
        "efficiency[0].peak_memory_bytes": "not allowed",
    }
    again = Results.load(tmp_path / "results.json")
    assert math.isnan(again.perplexity[0].value)
    assert again.efficiency[0].peak_memory_bytes is None
    del data["sha256"]
    assert again.to_dict() == data


def test_fields_of_a_later_version_are_ignored(tmp_path):
    data = record_of("dense").to_dict()
    data["energy"] = 3
    data["perplexity"][0]["bits_per_byte"] = 1.5
    (tmp_path / "results.json").write_text(json.dumps(data))
    assert Results.load(tmp_path / "results.json") == record_of("dense")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema_version=2), "has schema_version 2; this program reads 1"),
        (lambda data: data.pop("schema_version"), "has schema_version 'none'"),
        (lambda data: data.pop("model"), "model is missing"),
        (lambda data: data["model"].pop("num_layers"), "model.num_layers is missing"),
        (lambda data: data["environment"].pop("threads"), "environment.threads is missing"),
        (lambda data: data["perplexity"][0].pop("value"), r"perplexity\[0\].value is missing"),
        (lambda data: data["model"].update(num_layers="24"), "model.num_layers is a text, not int"),
        (lambda data: data.update(efficiency={}), "efficiency is an object, not a list"),
        (
            lambda data: data["perplexity"][0].update(value=-2.0),
            r"perplexity\[0\]: value is -2.0; a perplexity",
        ),
        (lambda data: data["perplexity"][0].update(word_value=0), "word_value is 0.0; a perplexity is above 0"),
    ],
)
def test_broken_records(tmp_path, change, message):
    data = record_of("dense").to_dict()
    change(data)
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message):
        Results.load(tmp_path / "results.json")


def test_files_that_are_no_records(tmp_path):
    (tmp_path / "text").write_text("perplexity 20")
    (tmp_path / "list").write_text("[]")
    for name, message in (("text", "is no JSON that can be read"), ("list", "a list"), ("absent", "No such file")):
        with pytest.raises(UsageError, match=message):
            Results.load(tmp_path / name)


def test_environment_of_this_process():
    environment = Environment.collect(torch.device("cpu"), torch.bfloat16)
    assert environment.packages["torch"] == torch.__version__
    assert environment.packages["python"] == sys.version.split()[0]
    assert {"transformers", "lightning", "lm_eval", "slm_pl"} <= set(environment.packages)
    assert (environment.device, environment.dtype, environment.threads) == (
        "cpu", "bfloat16", torch.get_num_threads(),
    )  # fmt: skip
    assert environment.date.endswith("+00:00")
    assert environment.device_name


def test_git_commit_is_the_working_directorys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert Environment.collect("cpu", "float32").git is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert len(commit) == 40
    assert Environment.collect("cpu", "float32").git == commit


def test_import_is_light():
    code = (
        "import sys, slm_pl.report, slm_pl.evaluation; "
        "print({'transformers', 'datasets', 'lm_eval', 'matplotlib', 'torchmetrics', 'lightning'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --------------------------------------------------------------------------------------------- the comparison


def test_figures_side_by_side(tmp_path, capsys):
    paths = save(
        tmp_path,
        pruned=record_of("pruned", "ab", perplexity=9000.0, accuracy=0.25, latency=3.2),
        dense=record_of("dense"),
        recovered=record_of("recovered", "ab", perplexity=40.0, accuracy=0.5, latency=3.2),
    )
    comparison = compare(paths)
    assert comparison.labels == ["dense", "pruned", "recovered"]
    assert comparison.baseline
    assert comparison.warnings == []
    assert values_of(comparison, "num_layers") == [30, 24, 24]
    assert values_of(comparison, "perplexity.embedded.128") == [20.0, 9000.0, 40.0]
    assert values_of(comparison, "zero_shot.boolq.acc") == [0.6, 0.25, 0.5]
    assert values_of(comparison, "zero_shot.mean") == [0.6, 0.25, 0.5]
    assert [cell.ratio for cell in row_of(comparison, "num_parameters").cells] == [None, 0.8, 0.8]
    (speed,) = [row for row in comparison.rows if row.name.endswith("output_tokens_per_s")]
    assert [cell.ratio for cell in speed.cells] == [None, pytest.approx(1.25), pytest.approx(1.25)]

    assert comparison.output_dir == tmp_path.resolve()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "comparison.csv", "comparison.html", "comparison.json", "comparison.md", "comparison.png", "comparison.tex",
        "comparison_efficiency.png", "pareto.png",
    ]  # fmt: skip
    markdown = (tmp_path / "comparison.md").read_text()
    printed = capsys.readouterr().out
    for text in (markdown, printed):
        lines = [[cell.strip() for cell in line.replace("│", "|").strip("| ").split("|")] for line in text.split("\n")]
        bold = "**{}**" if text is markdown else "{}"
        title = "Perplexity embedded @ 128 (4,064 tokens)"
        assert [title, "20.00 ± 0.50", "9,000 ± 0.50 (450×)", bold.format("40.00 ± 0.50 (2.00×)")] in lines
        assert ["boolq, acc (n = 25)", "60.0 ± 2.0 %", "25.0 ± 2.0 %", bold.format("50.0 ± 2.0 %")] in lines
        mean = ["60.0 ± 2.0 %", "25.0 ± 2.0 % (41.7 %)", bold.format("50.0 ± 2.0 % (83.3 %)")]
        assert ["Zero-shot mean (1 task, 25 questions)", *mean] in lines
        equal = bold.format("40.0 (1.25×)")  # both are the best
        assert ["Output tokens/s, median (batch 1, 12 + 128 tokens)", "32.0", equal, equal] in lines
        assert sum("the best of the compressed models. ≈: not told apart" in line[0] for line in lines) == 1
    assert "| | dense | pruned | recovered |" in markdown.replace("|  |", "| |")

    data = json.loads((tmp_path / "comparison.json").read_text())
    assert data["schema_version"] == 1
    assert data["baseline"] == "dense"
    assert [model["results"] for model in data["models"]] == [paths[1], paths[0], paths[2]]
    assert data["models"][0]["environment"]["threads"] == 2
    by_name = {row["name"]: row["cells"] for row in data["rows"]}
    assert [cell["value"] for cell in by_name["num_parameters"]] == [100, 80, 80]


def test_picture_is_a_png_with_every_bar(tmp_path):
    from matplotlib.image import imread

    paths = save(tmp_path, dense=record_of("dense"), pruned=record_of("pruned", "ab", perplexity=9000.0))
    compare(paths, output_dir=str(tmp_path / "out"))
    picture = imread(tmp_path / "out" / "comparison.png")
    assert picture.shape[1] > picture.shape[0] > 300
    colours = {tuple(int(round(255 * part)) for part in pixel[:3]) for pixel in picture[::4, ::4].reshape(-1, 4)}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= colours
    assert (tmp_path / "out" / "comparison.png").stat().st_mode == (tmp_path / "out" / "comparison.md").stat().st_mode


def test_many_models_are_a_line_each(tmp_path, capsys):
    names = [f"method{n}" for n in range(5)]
    pruned = {n: record_of(n, n, perplexity=100.0 + i, latency=3.2) for i, n in enumerate(names)}
    ruined = pruned["method4"].perplexity
    ruined[0] = dataclasses.replace(ruined[0], value=3_032_846_592.0, stderr=1_161_448_840.0)
    compare(save(tmp_path, dense=record_of("dense"), **pruned))
    for text in ((tmp_path / "comparison.md").read_text(), capsys.readouterr().out):
        lines = [[cell.strip() for cell in line.replace("│", "|").strip("| ").split("|")] for line in text.split("\n")]
        cells = next(line for line in lines if line[0] == "method3")
        assert cells[:4] == ["method3", "24", "80 (80.0 %)", "103.00 ± 0.50 (5.15×)"]
        assert "40.0 (1.25×)" in [cell.strip("*") for cell in cells]
        assert next(line for line in lines if line[0] == "method4")[3] == "3.0e9 ± 1.2e9 (>1,000×)"
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert [len(row["cells"]) for row in data["rows"]] == [6] * len(data["rows"])


def test_narrow_terminal_gets_several_tables_and_no_folded_number(tmp_path, capsys, monkeypatch):
    pruned = {f"method{n}": record_of(f"method{n}", f"{n}", perplexity=100.0 + n) for n in range(6)}
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take the output for a terminal
    monkeypatch.setenv("TERM", "xterm")  # a dumb one always has 80 columns
    monkeypatch.setenv("COLUMNS", "70")
    compare(save(tmp_path, dense=record_of("dense"), **pruned))
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    tables = printed.split("Written:")[0].split("Comparison")[1:]
    assert len(tables) > 1
    lines = [line for table in tables for line in table.splitlines()]
    assert max(map(len, lines)) <= 70
    assert "104.00 ± 0.50" in printed
    for n in range(6):
        assert sum(f"method{n} " in line for line in lines) == len(tables)


def test_missing_figures_are_dashes_with_footnotes(tmp_path):
    pruned = record_of("pruned", "ab", perplexity=math.inf)
    pruned.zero_shot = None
    pruned.missing["zero_shot"] = "no data on this machine"
    pruned.efficiency[0] = dataclasses.replace(
        pruned.efficiency[0], peak_memory_bytes=None, missing={"peak_memory_bytes": "not allowed"}
    )
    compare(save(tmp_path, dense=record_of("dense"), pruned=pruned))
    markdown = (tmp_path / "comparison.md").read_text()
    assert "| Perplexity embedded @ 128 (4,064 tokens) | 20.00 ± 0.50 | – [1] |" in markdown
    assert "| boolq, acc (n = 25) | 60.0 ± 2.0 % | – [2] |" in markdown
    assert "| Peak memory (batch 1, 12 + 128 tokens) | 1,024 MiB | – [3] |" in markdown
    for footnote in ("[1] not a finite number (inf)", "[2] no data on this machine", "[3] not allowed"):
        assert footnote in markdown


def test_protocols_do_not_share_a_row(tmp_path):
    pruned = record_of("pruned", "ab")
    pruned.perplexity[0] = dataclasses.replace(pruned.perplexity[0], sequence_length=2048)
    pruned.zero_shot = dataclasses.replace(
        pruned.zero_shot, limit=10, tasks={"boolq": dataclasses.replace(pruned.zero_shot.tasks["boolq"], n=10)}
    )
    comparison = compare(save(tmp_path, dense=record_of("dense"), pruned=pruned))
    assert values_of(comparison, "perplexity.embedded.128") == [20.0, None]
    assert values_of(comparison, "perplexity.embedded.2048") == [None, 20.0]
    assert values_of(comparison, "zero_shot.boolq.acc.25") == [0.6, None]
    means = [[cell.value for cell in row.cells] for row in comparison.rows if row.name.startswith("zero_shot.mean")]
    assert means == [[0.6, None], [None, 0.6]]
    assert (
        row_of(comparison, "perplexity.embedded.2048").cells[0].reason == "measured with sequence_length 128, here 2048"
    )
    assert any("perplexity protocol" in warning for warning in comparison.warnings)
    assert any("zero-shot protocol" in warning and "limit 10" in warning for warning in comparison.warnings)


@pytest.mark.parametrize(
    ("environment", "field"),
    [
        ({"threads": 8}, "threads (dense: 2; pruned: 8)"),
        ({"dtype": "bfloat16"}, "dtype (dense: float32; pruned: bfloat16)"),
        ({"device": "cuda:0"}, "device (dense: cpu; pruned: cuda:0)"),
        ({"packages": {"torch": "2.6.0"}}, "torch version (dense: 2.13.0; pruned: 2.6.0)"),
    ],
)
def test_other_environments_are_warned_of(tmp_path, capsys, environment, field):
    comparison = compare(
        save(tmp_path, dense=record_of("dense"), pruned=record_of("pruned", "ab", **environment)),
    )
    (warning,) = comparison.warnings
    assert field in warning
    assert f"**Warning:** {warning}" in (tmp_path / "comparison.md").read_text()
    assert warning.split("(")[0] in capsys.readouterr().out


def test_without_a_dense_baseline(tmp_path):
    comparison = compare(save(tmp_path, a=record_of("a", "ab"), b=record_of("b", "cd")))
    assert not comparison.baseline
    assert any("no dense baseline" in warning for warning in comparison.warnings)
    assert all(cell.ratio is None for row in comparison.rows for cell in row.cells)
    assert json.loads((tmp_path / "comparison.json").read_text())["baseline"] is None


def test_equal_labels_are_told_apart(tmp_path):
    paths = save(tmp_path, one=record_of("pruned", "ab"), two=record_of("pruned", "cd"), dense=record_of("dense"))
    assert compare([*paths, paths[0]]).labels == ["dense", "pruned (one)", "pruned (two)"]
    elsewhere = save(tmp_path / "other", one=record_of("pruned", "ef"))
    comparison = compare([*paths, *elsewhere])
    assert comparison.labels == ["dense", "pruned (one) #1", "pruned (two)", "pruned (one) #2"]
    assert comparison.output_dir == tmp_path.resolve()


def test_the_last_export_that_is_there_as_measured_and_how_to_load_it(tmp_path, capsys):
    plan = Plan(Base.of(pico_model()), Method("callbacks.SLEB", {}), None, (DropLayers((1,)),))
    records = {}
    for name in ("pruned", 'own"); import os #', "other", "gone"):
        record = record_of(name, plan.sha256)
        export = tmp_path / name / "export"
        if name != "gone":
            plan.save(export / "plan.json")
            (export / "config.json").write_text("{}")
        record.model = dataclasses.replace(record.model, source=str(export))
        records[name] = record
    dataclasses.replace(plan, outcome={"by now": "another"}).save(tmp_path / "other" / "export" / "plan.json")
    (tmp_path / "other" / "export" / "modeling_pruned.py").write_text("print('a stranger')")
    export = str(tmp_path / 'own"); import os #' / "export")
    files = save(tmp_path, dense=record_of("dense"), **records)
    compare(files)
    assert capsys.readouterr().out.endswith(
        f"\nThe compressed model: {export}\nLoad it with\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({export!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({export!r})\n"
    )
    # What a directory brings may be a stranger's; this package loads it without.
    (Path(export) / "modeling_pruned.py").write_text("print('a stranger')")
    compare(files)
    told = capsys.readouterr().out
    assert "trust_remote_code" not in told
    assert told.endswith(
        f"from slm_pl.export import load_compressed\nmodel, tokenizer, plans = load_compressed({export!r})\n"
    )


def test_figures_and_names_of_strangers_are_compared(tmp_path, capsys):
    """A source that is no path, and figures that nobody measured: below 1, for which a logarithmic bar has no place."""
    records = {}
    for number, (source, perplexity) in enumerate((("a" * 5000, 1e-3), ("a\0b", 0.5), ("x", 1e308))):
        record = record_of(f"m{number}", "ab", perplexity=perplexity)
        record.model = dataclasses.replace(record.model, source=source, num_parameters=10**99, num_layers=0)
        records[f"m{number}"] = record
    compare(save(tmp_path, **records))
    assert "Load it with" not in capsys.readouterr().out
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_number_that_no_float_holds_is_no_figure():
    with pytest.raises(FormError, match="value is larger than a number can be"):
        decode(PerplexityResult, {**dataclasses.asdict(record_of("x").perplexity[0]), "value": 10**400})


def test_nothing_to_compare():
    with pytest.raises(UsageError, match="got no files"):
        compare([])
