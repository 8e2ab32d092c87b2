import ast
import csv
import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

import pytest

import slm_pl
from slm_pl.evaluation.drift import DriftResult
from slm_pl.report.comparison import line_up
from slm_pl.report.tables import csv_text, json_text, latex, latex_text, markdown
from tests.helpers.records import record_of, rich_point, save


def _many(folder, count=6):
    records = {"dense": record_of("dense")}
    for number in range(count):
        name = f"m_{number}"
        records[name] = record_of(name, name, perplexity=30.0 + 5 * number, accuracy=0.5, latency=3.0 + number)
    records["m_1"].missing["zero_shot"] = "50 % of the data & more"
    records["m_1"].zero_shot = None
    records["m_1"].environment = dataclasses.replace(records["m_1"].environment, threads=8)
    return line_up(save(folder, **records))


def test_csv_has_a_line_per_model_and_raw_numbers(tmp_path):
    pruned = record_of('a "pruned", one', "ab", perplexity=math.inf, accuracy=1 / 3)
    pruned.drift = [DriftResult("embedded", 128, "none", 4064, "dense", 0.25, 0.01, 0.8, 0.005)]
    comparison = line_up(save(tmp_path, dense=record_of("dense"), pruned=pruned))
    dense, line = csv.DictReader(csv_text(comparison).splitlines())
    assert (dense["label"], line["label"]) == ("dense", 'a "pruned", one')
    assert (line["source"], line["plan_sha256"], line["threads"]) == ('models/a "pruned", one', "ab", "2")
    assert {row.name for row in comparison.rows} <= line.keys()
    assert float(line["zero_shot.boolq.acc.25"]) == 1 / 3
    assert float(line["zero_shot.boolq.acc.25.stderr"]) == 0.02
    assert line["zero_shot.boolq.acc.25.n"] == "25"
    assert float(line["zero_shot.boolq.acc.25.ratio"]) == pytest.approx(1 / 3 / 0.6)
    assert line["perplexity.embedded.128.none.4064"] == ""
    assert dense["perplexity.embedded.128.none.4064.n"] == "4064"
    latency = "efficiency.shortened_llama.1.12.128.latency_s"
    assert (float(line[latency]), float(line[f"{latency}.stdev"]), line[f"{latency}.n"]) == (4.0, 0.1, "20")
    assert line["efficiency.shortened_llama.1.12.128.peak_memory_bytes"] == str(2**30)
    setting = f"embedded.128.none.4064.{hashlib.sha256(b'dense').hexdigest()[:8]}"
    assert (dense[f"drift.kl.{setting}"], line[f"drift.kl.{setting}"]) == ("", "0.25")
    assert line[f"drift.top1_agreement.{setting}.stderr"] == "0.005"


@pytest.mark.parametrize("sign", "=+-@")
def test_a_spreadsheet_computes_no_text_and_numbers_stay_numbers(sign, tmp_path):
    label = f'{sign}HYPERLINK("http://tracker.example";"x")'
    pruned = record_of(f"\t{label}", "ab", accuracy=-31.5, dtype=f"{sign}1")
    pruned.model = dataclasses.replace(pruned.model, source=f"{sign}2", base=f"{sign}3")
    comparison = line_up(save(tmp_path, dense=record_of("dense"), pruned=pruned))
    _, line = csv.DictReader(csv_text(comparison).splitlines())
    assert line["label"] == f"'{label}"
    assert (line["weights"], line["source"], line["base"]) == (f"'{sign}1", f"'{sign}2", f"'{sign}3")
    assert float(line["zero_shot.boolq.acc.25"]) == -31.5


def test_warnings_of_strangers_records_are_text(tmp_path):
    label = "![t](http://tracker.example/p.png) <img> `x`"
    pruned = record_of(label, "ab", threads=8)
    pruned.efficiency = [rich_point(baseline=label)]
    dense = record_of("dense")
    dense.efficiency = [rich_point()]
    comparison = line_up(save(tmp_path, dense=dense, pruned=pruned))
    assert any(label in warning for warning in comparison.warnings)
    text = markdown(comparison, {})
    assert "![" not in text
    assert "<img" not in text
    escaped = r"!\[t\](http://tracker.example/p.png) &lt;img> \`x\`"
    assert f"Speed-ups are over {escaped}" in text
    (warning,) = [line for line in text.splitlines() if line.startswith("**Warning:**") and "threads" in line]
    assert escaped in warning


def test_details_are_only_where_there_is_room(tmp_path):
    pruned = record_of("pruned", "ab")
    task = dataclasses.replace(pruned.zero_shot.tasks["boolq"], all={"acc": 0.6, "acc_norm": 0.61})
    pruned.zero_shot.tasks["boolq"] = task
    pruned.perplexity[0] = dataclasses.replace(pruned.perplexity[0], word_value=70.0, words=2900)
    comparison = line_up(save(tmp_path, dense=record_of("dense"), pruned=pruned))
    for text in (markdown(comparison, {}), latex(comparison)):
        assert "Word perplexity" not in text
        assert "norm" not in text
    names = [row["name"] for row in json.loads(json_text(comparison))["rows"]]
    assert "zero_shot.boolq.acc_norm.25" in names
    assert "word_perplexity.embedded.128.none.2900" in names
    assert "zero_shot.boolq.acc_norm.25,zero_shot.boolq.acc_norm.25.stderr" in csv_text(comparison)


def test_json_has_the_protocols(tmp_path):
    comparison = line_up(save(tmp_path, dense=record_of("dense"), pruned=record_of("pruned", "ab")))
    rows = {row["name"]: row for row in json.loads(json_text(comparison))["rows"]}
    assert rows["perplexity.embedded.128.none.4064"]["protocol"] == {
        "corpus": "embedded", "sequence_length": 128, "bos": "none", "stride": None, "tail": "drop", "tokens": 4064,
        "sha256": None,
    }  # fmt: skip
    assert rows["perplexity.embedded.128.none.4064"]["cells"][1]["ratio"] == 1.0


def test_markdown_takes_labels_for_text(tmp_path):
    pruned, other = record_of("a|b *c* <script>`", "ab", accuracy=0.5), record_of("__init__", "cd", accuracy=0.2)
    text = markdown(line_up(save(tmp_path, dense=record_of("dense"), pruned=pruned, other=other)), {})
    assert r"|  | dense | a\|b \*c\* &lt;script>\` | \__init_\_ |" in text
    assert "| boolq, acc (n = 25) | 60.0 ± 2.0 % | **50.0 ± 2.0 %** | 20.0 ± 2.0 % |" in text


def test_ties_have_their_sign(tmp_path):
    records = {name: record_of(name, name, accuracy=value) for name, value in (("a", 0.5), ("b", 0.48), ("c", 0.4))}
    comparison = line_up(save(tmp_path, dense=record_of("dense"), **records))
    line = next(line for line in markdown(comparison, {}).splitlines() if line.startswith("| boolq"))
    assert line == "| boolq, acc (n = 25) | 60.0 ± 2.0 % | **50.0 ± 2.0 %** | 48.0 ± 2.0 % ≈ | 40.0 ± 2.0 % |"
    assert r"\textbf{50.0 $\pm$ 2.0 \%} & 48.0 $\pm$ 2.0 \% $\approx$ & 40.0" in latex(comparison)
    for text in (markdown(comparison, {}), latex(comparison)):
        assert "Errors are taken as independent" in text
    alone = line_up(save(tmp_path / "alone", dense=record_of("dense"), a=records["a"]))
    assert "≈" not in markdown(alone, {})
    assert "**" not in markdown(alone, {})


@pytest.mark.parametrize("count", [2, 6])
def test_latex_table_is_well_formed(tmp_path, count):
    text = latex(_many(tmp_path, count))
    assert text.startswith("% \\usepackage{booktabs}\n% Warning: The records differ in threads (dense: 2; ")
    columns = re.search(r"\\begin\{tabular\}\{@\{\}(l(r+))@\{\}\}", text)[1]
    body = text.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
    # A line ends in \\ at the end of a line of text; those inside of heads do not.
    lines = [line for line in body.splitlines() if line.endswith(r" \\")]
    assert len(lines) == (8 if count == 6 else 10)
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(columns) - 1}
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert text.count("$") % 2 == 0
    text = "\n".join(line for line in text.splitlines() if not line.startswith("% "))
    assert re.search(r"(?<!\\)[%#]", text) is None
    assert re.search(r"(?<!\\)_", text) is None
    assert r"50 \% of the data \& more" in text
    assert (r"m\_0 & 24 & 80 (80.0 \%)" in text) == (count == 6)


def test_readme_table_fits_its_page(tmp_path):
    """The shape of the quickstart: three models, long figures, and nothing in a cell that is not needed."""
    records = {
        "dense": record_of("dense", perplexity=24.07),
        "pruned": record_of("pruned", "ab", perplexity=123.6, accuracy=0.4),
        "recovered": record_of("recovered", "ab", perplexity=50.38, latency=3.2),
    }
    for record, parameters in zip(records.values(), (134_515_008, 113_275_008, 113_275_008), strict=True):
        record.model = dataclasses.replace(record.model, num_parameters=parameters)
    lines = [line for line in markdown(line_up(save(tmp_path, **records)), {}).splitlines() if line.startswith("| ")]
    assert "| Parameters | 134.5 M | 113.3 M (84.2 %) | 113.3 M (84.2 %) |" in lines
    perplexity = "| 24.07 ± 0.50 | 123.60 ± 0.50 (5.14×) | **50.38 ± 0.50 (2.09×)** |"
    assert f"| Perplexity embedded @ 128 (4,064 tokens) {perplexity}" in lines
    assert "| boolq, acc (n = 25) | 60.0 ± 2.0 % | 40.0 ± 2.0 % | **60.0 ± 2.0 %** |" in lines
    assert max(map(len, lines)) <= 112


def test_dense_models_stand_apart_and_are_named(tmp_path):
    records = {f"d{number}": record_of(f"d{number}", base=f"models/d{number}") for number in range(2)}
    for number in range(4):
        name = f"m{number}"
        records[name] = record_of(name, name, base=f"models/d{number % 2}", accuracy=0.5)
    comparison = line_up(save(tmp_path, **records))
    lines = latex(comparison).splitlines()
    rule = next(index for index, line in enumerate(lines) if line.startswith("d1 &")) + 1
    assert lines[rule] == r"\midrule"
    assert lines[rule + 1].startswith("m0 &")
    assert "Ratios are against the dense model of the same base." in markdown(comparison, {})
    data = json.loads(json_text(comparison))
    assert [model["baseline"] for model in data["models"]] == [None, None, "d0", "d1", "d0", "d1"]


def test_latex_sets_every_letter_of_our_own_texts():
    root = Path(slm_pl.__file__).parents[1]
    letters = set()
    for path in [*root.glob("slm_pl/**/*.py"), *root.glob("callbacks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                letters |= {char for char in node.value if not char.isascii()}
    assert {"×", "±", "≈", "→", "←", "√", "–", "Σ", "θ"} <= letters
    not_said = {"\ufffd", "\u2581"}  # what stands for broken letters, and for SentencePiece's spaces
    assert {char for char in letters | set("“”‘’—·−αβγδελμπρστφω") if "?" in latex_text(char)} == not_said


def test_latex_escapes_every_special_character():
    assert latex_text(r"\{}$&%#_^~") == (r"\textbackslash{}\{\}\$\&\%\#\_\textasciicircum{}\textasciitilde{}")
    assert latex_text("[a] ± θ é 模") == r"{[}a{]} $\pm$ $\theta$ é ?"
