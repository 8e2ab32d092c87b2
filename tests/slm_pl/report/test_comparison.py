import csv
import dataclasses
import hashlib
import math

import pytest
import torch

from callbacks import Drift, Perplexity
from slm_pl.data import EvaluationText
from slm_pl.evaluation import PerplexityResult, TaskResult, ZeroShotResult
from slm_pl.evaluation.drift import DriftResult
from slm_pl.report.comparison import line_up, word_stderr
from slm_pl.report.figures import ratio_text
from slm_pl.report.protocols import harness_series
from slm_pl.report.ranking import with_marks
from slm_pl.report.rows import Cell, Row, one_line
from slm_pl.report.tables import csv_text
from slm_pl.results import Results
from tests.helpers.records import marks_of, reasons_of, record_of, row_of, save, values_of
from tests.helpers.run import Drop, alpaca_data, make_module, make_trainer


def _with_task(record, name="boolq", harness=None, limit=None, chat_template=False, **task):
    one = dataclasses.replace(record.zero_shot.tasks["boolq"], **task)
    record.zero_shot = dataclasses.replace(
        record.zero_shot,
        tasks={name: one},
        mean=one.value,
        harness=harness or record.zero_shot.harness,
        limit=limit,
        chat_template=chat_template,
    )
    return record


def _with_perplexity(record, **protocol):
    record.perplexity[0] = dataclasses.replace(record.perplexity[0], **protocol)
    return record


# ---------------------------------------------------------------------------------------------------- protocols


@pytest.mark.parametrize(
    ("theirs", "reason", "title"),
    [
        ({"n": 10, "limit": 10}, "limit 10, here 25", "boolq, acc (n = 10)"),
        ({"n": 10}, "n 10, here 25", "boolq, acc (n = 10)"),
        ({"num_fewshot": 5}, "num_fewshot 5, here 0", "boolq, acc (n = 25, 5-shot)"),
        ({"harness": "lm_eval 0.3.0"}, "harness lm_eval 0.3.0, here 0.4", "boolq, acc (n = 25, lm_eval 0.3)"),
        ({"harness": "lm_eval 3326c54"}, "harness lm_eval 3326c54, here 0.4", "boolq, acc (n = 25, lm_eval 3326c54)"),
        ({"chat_template": True}, "chat_template yes, here no", "boolq, acc (n = 25, chat template)"),
        ({"version": "3.0"}, "task version 3.0, here unknown", "boolq, acc (n = 25, task version 3.0)"),
        (
            {"requests_sha256": "0123456789"},
            "requests hash 01234567, here unknown",
            "boolq, acc (n = 25, requests hash 01234567)",
        ),
        (
            {"num_fewshot": 5, "requests_sha256": "0123456789"},  # other examples are other requests: told once
            "num_fewshot 5, here 0",
            "boolq, acc (n = 25, 5-shot)",
        ),
    ],
)
def test_a_task_asked_in_another_way_has_its_own_row_and_says_why(tmp_path, theirs, reason, title):
    paths = save(tmp_path, dense=record_of("dense"), pruned=_with_task(record_of("pruned", "ab"), **theirs))
    comparison = line_up(paths)
    tasks = [row for row in comparison.rows if row.name.startswith("zero_shot.boolq")]
    means = [row for row in comparison.rows if row.name.startswith("zero_shot.mean")]
    for here, there in (tasks, means):
        assert [cell.value for cell in here.cells] == [0.6, None]
        assert [cell.value for cell in there.cells] == [None, 0.6]
        assert here.cells[1].reason == f"measured with {reason}"
    assert tasks[1].title == title
    assert len({row.name for row in comparison.rows}) == len(comparison.rows)
    # The names do not depend on what else is compared.
    alone = line_up(paths[1:])
    assert {tasks[1].name, means[1].name} <= {row.name for row in alone.rows}


def test_versions_of_a_series_share_a_row_if_the_questions_are_the_same(tmp_path):
    asked = {"version": "2.0", "requests_sha256": "abc", "harness": "lm_eval 0.4.12"}
    older = _with_task(record_of("older", "a", accuracy=0.5), **asked)
    newer = _with_task(record_of("newer", "b", accuracy=0.4), **asked | {"harness": "lm_eval 0.4.13"})
    other = _with_task(record_of("other", "c", accuracy=0.3), **asked | {"requests_sha256": "abd"})
    unknown = _with_task(record_of("unknown", "d", accuracy=0.2), **asked | {"requests_sha256": None})
    comparison = line_up(save(tmp_path, older=older, newer=newer, other=other, unknown=unknown))
    tasks = [row for row in comparison.rows if row.name.startswith("zero_shot.boolq")]
    assert [[cell.value for cell in row.cells] for row in tasks] == [
        [0.5, 0.4, None, None],
        [None, None, 0.3, None],
        [None, None, None, 0.2],
    ]
    assert tasks[0].cells[2].reason == "measured with requests hash abd, here abc"
    assert tasks[1].cells[3].reason == "measured with requests hash unknown, here abd"
    assert len({row.title for row in tasks}) == 3
    assert tasks[0].protocol == {
        "metric": "acc", "n": 25, "num_fewshot": 0, "harness": "lm_eval 0.4", "version": "2.0",
        "requests_sha256": "abc", "chat_template": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("harness", "series"),
    [
        ("lm_eval 0.4.13", "lm_eval 0.4"),
        ("lm_eval 0.4", "lm_eval 0.4"),
        ("lm_eval 0.4.0.dev1", "lm_eval 0.4"),
        ("lm_eval 0.40.1", "lm_eval 0.40"),
        ("lm_eval 3326c54", "lm_eval 3326c54"),
    ],
)
def test_harness_series(harness, series):
    assert harness_series(harness) == series


@pytest.mark.parametrize(
    ("theirs", "reason", "title"),
    [
        ({"stride": 64}, "stride 64, here none", ", stride 64"),
        ({"tail": "keep"}, "tail keep, here drop", ", tail keep"),
        ({"bos": "stream"}, "bos stream, here none", ", BOS stream"),
        ({"sha256": "80bd965a6bb0"}, "tokens hash 80bd965a, here unknown", ", tokens hash 80bd965a"),
        ({"sequence_length": 64, "sha256": "80bd"}, "sequence_length 64, here 128", ""),
    ],
)
def test_a_text_cut_in_another_way_has_its_own_row_and_says_why(tmp_path, theirs, reason, title):
    pruned = _with_perplexity(record_of("pruned", "ab", perplexity=30.0), **theirs)
    comparison = line_up(save(tmp_path, dense=record_of("dense"), pruned=pruned))
    here, there = [row for row in comparison.rows if row.name.startswith("perplexity.")]
    assert [cell.value for cell in here.cells] == [20.0, None]
    assert [cell.value for cell in there.cells] == [None, 30.0]
    assert here.cells[1].reason == f"measured with {reason}"
    length = theirs.get("sequence_length", 128)
    assert there.title == f"Perplexity embedded @ {length} (4,064 tokens{title})"


def test_the_nearest_protocol_is_told(tmp_path):
    pruned = _with_perplexity(record_of("pruned", "ab"), sequence_length=64, stride=32, bos="stream")
    pruned.perplexity.append(dataclasses.replace(pruned.perplexity[0], sequence_length=128, stride=None))
    comparison = line_up(save(tmp_path, dense=record_of("dense"), pruned=pruned))
    assert reasons_of(comparison, "perplexity.embedded.128.none")[1] == "measured with bos stream, here none"


def test_another_text_or_task_was_not_measured(tmp_path):
    pruned = _with_task(_with_perplexity(record_of("pruned", "ab"), corpus="other"), name="piqa")
    comparison = line_up(save(tmp_path, dense=record_of("dense"), pruned=pruned))
    assert reasons_of(comparison, "perplexity.embedded") == [None, "not measured"]
    assert reasons_of(comparison, "zero_shot.boolq") == [None, "not measured"]
    means = [row for row in comparison.rows if row.name.startswith("zero_shot.mean")]
    assert means[0].cells[1].reason == "measured with other tasks: without boolq and piqa besides"


def test_a_mean_names_the_tasks_that_differ(tmp_path):
    records = {}
    for label, shots in (("dense", 0), ("pruned", 5)):
        record = record_of(label, None if label == "dense" else "ab")
        record.zero_shot.tasks["piqa"] = TaskResult("acc", 0.7, 0.01, 40, {"acc": 0.7}, num_fewshot=shots)
        records[label] = record
    comparison = line_up(save(tmp_path, **records))
    means = [row for row in comparison.rows if row.name.startswith("zero_shot.mean")]
    assert means[0].cells[1].reason == "measured with piqa: num_fewshot 5, here 0"
    assert means[0].title.startswith("Zero-shot mean (2 tasks, 65 questions, protocol ")
    assert means[0].title != means[1].title


def test_only_shares_are_percentages_also_in_a_mean(tmp_path):
    """A perplexity or a score on a scale of its own is a plain number, whatever the record says of it."""
    tasks = {
        "wikitext": TaskResult("word_perplexity", 0.8, 0.1, 62, {"word_perplexity": 0.8}),
        "gsm8k": TaskResult("exact_match,strict", 0.5, 0.1, 50, {"exact_match,strict": 0.5}),
        "judged": TaskResult("accumulated", 0.7, 0.1, 50, {"accumulated": 0.7}),
    }
    record = record_of("dense")
    record.zero_shot = ZeroShotResult("lm_eval 0.4.13", tasks, 0.65, 0.1, mean_of=["wikitext", "gsm8k"])
    (path,) = save(tmp_path, dense=record)
    quantities = {row.name.split(".")[1]: row.quantity for row in line_up([path]).rows if "zero_shot" in row.name}
    assert quantities == {"wikitext": "number", "gsm8k": "accuracy", "judged": "number", "mean": "number"}
    record.zero_shot = dataclasses.replace(record.zero_shot, mean=0.5, mean_of=["gsm8k"])
    record.save(path)
    assert row_of(line_up([path]), "zero_shot.mean").quantity == "accuracy"
    # No task counts: there is no mean to show.
    record.zero_shot = dataclasses.replace(record.zero_shot, mean=math.nan, mean_of=[])
    record.save(path)
    assert not [row for row in line_up([path]).rows if row.name.startswith("zero_shot.mean")]


def test_a_group_whose_tasks_differ_in_their_examples_has_a_name_of_its_own(tmp_path):
    dense, pruned = record_of("dense"), _with_task(record_of("pruned", "ab"), num_fewshot=None)
    pruned.zero_shot = dataclasses.replace(pruned.zero_shot, num_fewshot=None)
    names = [row.name for row in line_up(save(tmp_path, dense=dense, pruned=pruned)).rows]
    assert [name for name in names if name.startswith("zero_shot.boolq")] == [
        "zero_shot.boolq.acc.25", "zero_shot.boolq.acc.25.mixedshot",
    ]  # fmt: skip


def test_a_metric_that_one_record_reports_and_another_has_besides_is_one_row(tmp_path):
    both = {"acc": 0.5, "acc_norm": 0.55}
    dense = _with_task(record_of("dense"), value=0.5, all=both, stderrs={"acc_norm": 0.03})
    pruned = _with_task(record_of("pruned", "ab"), metric="acc_norm", value=0.4, all={"acc": 0.3, "acc_norm": 0.4})
    comparison = line_up(save(tmp_path, dense=dense, pruned=pruned))
    assert values_of(comparison, "zero_shot.boolq.acc.") == [0.5, 0.3]
    normed = row_of(comparison, "zero_shot.boolq.acc_norm.")
    assert [(cell.value, cell.stderr) for cell in normed.cells] == [(0.55, 0.03), (0.4, 0.02)]
    assert normed.place == "table"
    alone = line_up(save(tmp_path / "alone", dense=dense))
    assert row_of(alone, "zero_shot.boolq.acc_norm.").place == "data"


def test_other_dtypes_and_batch_sizes_are_warned_of_but_share_a_row(tmp_path):
    dense, pruned = record_of("dense"), record_of("pruned", "ab")
    dense.zero_shot = dataclasses.replace(dense.zero_shot, dtype="float32", batch_size=8)
    pruned.zero_shot = dataclasses.replace(pruned.zero_shot, dtype="bfloat16", batch_size=16)
    comparison = line_up(save(tmp_path, dense=dense, pruned=pruned))
    assert values_of(comparison, "zero_shot.boolq") == [0.6, 0.6]
    assert [warning.partition(" (")[0] for warning in comparison.warnings] == [
        "The records differ in zero-shot dtype",
        "The records differ in zero-shot batch size",
    ]


# ---------------------------------------------------------------------------------- ratios, the best, new figures


def test_what_was_kept_of_the_dense_model(tmp_path):
    pruned = record_of("pruned", "ab", perplexity=26.2, accuracy=0.51)
    other = PerplexityResult("other", 128, "none", 4064, 10.0, 0.5)
    dense = record_of("dense")
    dense.perplexity.append(other)
    pruned.perplexity.append(dataclasses.replace(other, value=15.0))
    comparison = line_up(save(tmp_path, dense=dense, pruned=pruned))
    ratios = {row.name.split(".128")[0]: (row.cells[1].ratio, row.show_ratio) for row in comparison.rows}
    assert ratios["perplexity.embedded"] == (pytest.approx(1.31), True)
    assert ratios["perplexity.other"] == (pytest.approx(1.5), False)
    assert ratios["zero_shot.boolq.acc.25"] == (pytest.approx(0.85), False)
    (mean,) = [value for name, value in ratios.items() if name.startswith("zero_shot.mean")]
    assert mean == (pytest.approx(0.85), True)
    assert ratios["num_layers"] == (None, False)


def test_each_model_is_held_against_the_dense_model_of_its_own_base(tmp_path):
    records = {
        "small": record_of("small", base="models/small", perplexity=20.0),
        "large": record_of("large", base="models/large", perplexity=10.0),
        "again": record_of("again", base="models/small", perplexity=21.0),
        "a": record_of("a", "a", base="models/small", perplexity=30.0),
        "b": record_of("b", "b", base="models/large", perplexity=30.0),
        "c": record_of("c", "c", base="models/other", perplexity=30.0),
    }
    comparison = line_up(save(tmp_path, **records))
    ratios = [cell.ratio for cell in row_of(comparison, "perplexity.").cells]
    assert ratios == [None, None, pytest.approx(1.05), pytest.approx(1.5), pytest.approx(3.0), None]
    lacking, bases = comparison.warnings
    assert "(c: made of models/other; dense records are small: models/small; large: models/large; again:" in lacking
    assert "models of different bases (a: models/small; b: models/large; c: models/other)" in bases
    # They are ranked all the same.
    assert marks_of(comparison, "perplexity.") == [None] * 3 + ["best"] * 3


def test_the_only_dense_model_may_be_the_wrong_one(tmp_path):
    paths = save(tmp_path, dense=record_of("dense"), pruned=record_of("pruned", "ab", base="hub/other"))
    comparison = line_up(paths)
    assert all(cell.ratio is None for row in comparison.rows for cell in row.cells)
    (warning,) = comparison.warnings
    assert "pruned: made of hub/other; dense records are dense: models/dense" in warning
    right = record_of("dense", base="hub/other")
    right.model = dataclasses.replace(right.model, source="hub/other")
    right.save(tmp_path / "dense" / "results.json")
    comparison = line_up(paths)
    assert (comparison.warnings, row_of(comparison, "num_parameters").cells[1].ratio) == ([], 0.8)


def test_ratios_that_mean_nothing_stay_short():
    texts = [ratio_text(ratio, "perplexity") for ratio in (0.987, 1.312, 12.34, 345.6, 1.3e8, 1e300)]
    assert texts == ["0.99×", "1.31×", "12.3×", "346×", ">1,000×", ">1,000×"]
    assert ratio_text(0.8512, "accuracy") == "85.1 %"


def _marked(quantity, *cells, competing=None):
    row = with_marks(Row("name", "title", quantity, list(cells)), competing or [True] * len(cells))
    return [cell.mark for cell in row.cells]


def test_the_best_and_what_its_error_does_not_tell_apart():
    accuracies = [Cell(0.60, 0.03), Cell(0.56, 0.03), Cell(0.55, 0.03), Cell(None)]
    assert math.hypot(0.03, 0.03) == pytest.approx(0.0424, abs=1e-4)  # 4 points are inside, 5 are not
    assert _marked("accuracy", *accuracies) == ["best", "tie", None, None]
    # The dense model does not compete, and one competitor has nobody to beat.
    assert _marked("accuracy", *accuracies, competing=[False, True, True, True]) == [None, "best", "tie", None]
    assert _marked("accuracy", *accuracies, competing=[False, True, False, True]) == [None, None, None, None]
    latencies = [Cell(1.0, spread=0.03), Cell(1.04, spread=0.03), Cell(1.05, spread=0.03)]
    assert _marked("seconds", *latencies) == ["best", "tie", None]
    assert _marked("rate", *latencies) == [None, "tie", "best"]
    assert _marked("bytes", Cell(2**30), Cell(2**30 + 1), Cell(2**30 + 2**20)) == ["best", "tie", None]
    assert _marked("divergence", Cell(0.3, 0.01), Cell(0.3, 0.02), Cell(0.4, 0.01)) == ["best", "best", None]
    assert _marked("parameters", Cell(100), Cell(80)) == [None, None]


def test_perplexities_are_compared_by_their_logarithms():
    # ln(22 / 20) = 0.0953; the errors of the logarithms are 0.075 and 0.068, together 0.101; of 24, 0.182 and 0.098.
    assert _marked("perplexity", Cell(20.0, 1.5), Cell(22.0, 1.5), Cell(24.0, 1.5)) == ["best", "tie", None]
    # A ruined model whose error is larger than its value.
    assert _marked("perplexity", Cell(20.0, 1.5), Cell(3e9, 4e9)) == ["best", None]


def test_speeds_of_two_machines_are_not_ranked(tmp_path):
    records = {name: record_of(name, name, latency=3.0 + index) for index, name in enumerate("ab")}
    same = line_up(save(tmp_path / "same", **records))
    assert marks_of(same, "efficiency.shortened_llama.1.12.128.latency") == ["best", None]
    records["b"].environment = dataclasses.replace(records["b"].environment, threads=8)
    other = line_up(save(tmp_path / "other", **records))
    assert marks_of(other, "efficiency.shortened_llama.1.12.128.latency") == [None, None]
    assert marks_of(other, "zero_shot.boolq") == ["best", "best"]


def test_perplexity_of_words(tmp_path):
    loss, tokens_of_a_word, error = 3.0, 1.4, 0.02
    token = PerplexityResult("embedded", 128, "none", 4064, math.exp(loss), error * math.exp(loss))
    one = dataclasses.replace(token, word_value=math.exp(loss * tokens_of_a_word), words=2900)
    # The slope of exp(1.4 x) at 3, from both sides.
    slope = (math.exp(1.4 * (loss + 1e-6)) - math.exp(1.4 * (loss - 1e-6))) / 2e-6
    assert word_stderr(one) == pytest.approx(error * slope)
    assert word_stderr(token) is None
    dense, pruned = record_of("dense"), record_of("pruned", "ab")
    dense.perplexity, pruned.perplexity = [one], [dataclasses.replace(one, tokens=5000, sha256="another tokenizer")]
    row = row_of(line_up(save(tmp_path, dense=dense, pruned=pruned)), "word_perplexity.")
    assert (row.title, row.place) == ("Word perplexity embedded @ 128 (2,900 words)", "page")
    assert [cell.value for cell in row.cells] == pytest.approx([math.exp(4.2)] * 2)
    assert [cell.n for cell in row.cells] == [2900, 2900]


@pytest.mark.parametrize("tail", ["drop", "keep"])
def test_words_of_two_tokenizers_need_the_whole_text(tmp_path, tail):
    dense, pruned = record_of("dense"), record_of("pruned", "ab")
    words = {"drop": (2900, 2880), "keep": (2950, 2950)}[tail]
    for record, tokens, covered in zip((dense, pruned), (4064, 5000), words, strict=True):
        _with_perplexity(record, tokens=tokens, sha256=str(tokens), tail=tail, words=covered, word_value=70.0)
    rows = [row for row in line_up(save(tmp_path, dense=dense, pruned=pruned)).rows if row.name.startswith("word")]
    if tail == "keep":
        assert [[cell.value for cell in row.cells] for row in rows] == [[70.0, 70.0]]
        assert rows[0].title == "Word perplexity embedded @ 128 (2,950 words, tail keep)"
    else:
        assert [[cell.value for cell in row.cells] for row in rows] == [[70.0, None], [None, 70.0]]
        reason = "measured with words 2880 (tail: keep would cover the whole text), here 2900"
        assert rows[0].cells[1].reason == reason


def test_drift_from_the_dense_model(tmp_path):
    pruned, other = record_of("pruned", "ab"), record_of("other", "cd")
    pruned.drift = [DriftResult("embedded", 128, "none", 4064, "dense", 0.25, 0.01, 0.8, 0.005, "ff")]
    other.drift = [dataclasses.replace(pruned.drift[0], reference="another", kl=0.1)]
    comparison = line_up(save(tmp_path, dense=record_of("dense"), pruned=pruned, other=other))
    kl, of_another = [row for row in comparison.rows if row.quantity == "divergence"]
    assert kl.title == "KL from dense, nats (embedded @ 128, reference dense)"
    assert [cell.value for cell in kl.cells] == [None, 0.25, None]
    assert [cell.reason for cell in kl.cells] == [
        "it is the distance from the dense model",
        None,
        "measured with reference another, here dense",
    ]
    assert [cell.value for cell in of_another.cells] == [None, None, 0.1]
    assert {row.place for row in comparison.rows if row.quantity == "agreement"} == {"page"}
    names = {"dense": kl.name, "another": of_another.name}
    for reference, name in names.items():
        assert name == f"drift.kl.embedded.128.none.4064.ff.{hashlib.sha256(reference.encode()).hexdigest()[:8]}"
    header, *lines = csv.reader(csv_text(comparison).splitlines())
    assert len(set(header)) == len(header)
    assert [line[header.index(names["dense"])] for line in lines] == ["", "0.25", ""]
    assert [line[header.index(names["another"])] for line in lines] == ["", "", "0.1"]


def test_rows_of_one_name_are_refused(tmp_path, monkeypatch):
    pruned, other = record_of("pruned", "ab"), record_of("other", "cd")
    pruned.drift = [DriftResult("embedded", 128, "none", 4064, "dense", 0.25, 0.01, 0.8, 0.005, "ff")]
    other.drift = [dataclasses.replace(pruned.drift[0], reference="another", kl=0.1)]
    monkeypatch.setattr("slm_pl.report.protocols.short", lambda text: "same")
    with pytest.raises(AssertionError):
        line_up(save(tmp_path, pruned=pruned, other=other))


# ---------------------------------------------------------------------------- the reasons that the hooks leave


@pytest.mark.usefixtures("one_thread")
def test_a_broken_models_reason_is_told_as_the_hooks_wrote_it(pico_dir, tmp_path):
    class Breaks(Drop):
        def setup(self, trainer, pl_module, stage):
            super().setup(trainer, pl_module, stage)
            with torch.no_grad():
                pl_module.load_model().model.norm.weight[0] = math.nan

    texts = [EvaluationText(sequence_length=32, max_tokens=128), EvaluationText("wikitext2", 24, stride=8)]
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text("pieces of ordinary English prose " * 20)
    for label, methods in {"dense": [], "whole": [Drop([1])], "broken": [Breaks([1])]}.items():
        hooks = [Perplexity(texts, local_data=str(tmp_path)), Drift(texts, local_data=str(tmp_path))]
        trainer = make_trainer(tmp_path / label, *methods, *hooks)
        trainer.test(make_module(pico_dir), alpaca_data(tmp_path / "data"), verbose=False)
    path = tmp_path / "broken" / "results.json"
    broken = Results.load(path)
    assert (broken.perplexity, broken.drift) == ([], [])
    paths = [str(tmp_path / label / "results.json") for label in ("dense", "whole", "broken")]
    comparison = line_up(paths)
    for corpus, length in (("embedded", 32), ("wikitext2", 24)):
        for start, reason in (
            ("perplexity", f"The model's logits on window 0 of '{corpus}' are not finite"),
            ("word_perplexity", f"The model's logits on window 0 of '{corpus}' are not finite"),
            ("drift.kl", f"The divergence from {pico_dir} on window 0 of '{corpus}' is not finite"),
            ("drift.top1_agreement", f"The divergence from {pico_dir} on window 0 of '{corpus}' is not finite"),
        ):
            cells = row_of(comparison, f"{start}.{corpus}.{length}").cells
            assert cells[1].value is not None
            assert cells[2].value is None
            assert cells[2].reason.startswith(reason)
            assert cells[0].reason == ("the dense model itself" if "drift" in start else None)
    # Nor is it taken for a difference of protocols, where another text of this name was measured.
    whole = Results.load(paths[1])
    broken.perplexity = [dataclasses.replace(whole.perplexity[0], sequence_length=16)]
    broken.drift = [dataclasses.replace(whole.drift[0], sequence_length=16)]
    broken.save(path)
    comparison = line_up(paths)
    for start in ("perplexity", "drift.kl"):
        assert "not finite" in reasons_of(comparison, f"{start}.embedded.32")[2]
        assert reasons_of(comparison, f"{start}.embedded.16")[1] == "measured with sequence_length 32, here 16"


def test_texts_from_files_are_one_line(tmp_path):
    pruned = record_of("two\nlines \x1b[31m", "ab")
    pruned.missing["drift"] = "a\nreason"
    pruned.drift = []
    dense = record_of("dense", "x")
    dense.drift = [DriftResult("embedded", 128, "none", 4064, "dense", 0.25, 0.01, 0.8, 0.005)]
    comparison = line_up(save(tmp_path, dense=dense, pruned=pruned))
    assert comparison.labels[1] == "two lines [31m"
    assert one_line("a\ud800\n b") == "a? b"
    assert reasons_of(comparison, "drift.kl")[1] == "a reason"
