import json
from pathlib import Path

import lightning.pytorch as pl
import matplotlib.image
import pytest
import torch
from transformers import AutoModelForCausalLM

from callbacks import ExportCheckpoint, RepresentationSimilarity, SlidingWindowMerging
from callbacks.base import PlanObserver
from slm_pl.data import CalibrationText
from slm_pl.errors import UsageError
from slm_pl.evaluation.representation import representation_similarity
from tests.helpers.run import IDS, Drop, alpaca_data, make_module, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


BEFORE = "representation_similarity_before"


def record_of(directory: Path, name: str = "representation_similarity") -> dict:
    assert matplotlib.image.imread(directory / f"{name}.png").ndim == 3
    return json.loads((directory / f"{name}.json").read_text())


def dense_matrix(pico_dir: Path, kernel: str) -> list[list[float]]:
    return representation_similarity(AutoModelForCausalLM.from_pretrained(pico_dir), IDS, kernel)


@pytest.mark.parametrize("last", [True, False])
def test_prune_compares_the_dense_layers_wherever_it_stands(pico_dir, tmp_path, last, recwarn):
    export = tmp_path / "export"
    chain = [SlidingWindowMerging(remove_layers=2), ExportCheckpoint(str(export))]
    chain.insert(2 if last else 0, RepresentationSimilarity())
    make_trainer(tmp_path, *chain).prune(make_module(pico_dir), datamodule=alpaca_data(tmp_path / "data"))
    assert not any("nothing to do" in str(warning.message) for warning in recwarn)
    # Standing last, it still sees the model before the merge, and the export shows it.
    record = record_of(tmp_path, BEFORE)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert record["matrix"] == dense_matrix(pico_dir, "rbf")
    assert record["windows"] == [[step["low"], step["high"]] for step in plan["steps"]]
    assert record["layers"] == [str(n) for n in range(6)]
    # The file goes into the export: no paths of this machine.
    assert record["model"] == {"pretrained": pico_dir.name, "num_layers": 6, "plan_sha256": None}
    assert "/" not in record["protocol"]["text"]
    protocol = record["protocol"]
    assert (protocol["kernel"], protocol["samples"], protocol["tokens"]) == ("rbf", 2, 42)
    assert protocol["sha256"] == plan["calibration"]["sha256"]
    for name in (f"{BEFORE}.json", f"{BEFORE}.png", "search_trace.png"):
        assert (export / name).read_bytes() == (tmp_path / name).read_bytes()
    card = (export / "README.md").read_text()
    assert f"]({BEFORE}.png)" in card
    assert "](search_trace.png)" in card
    assert ".json)" not in card.replace("plan.json", "")


def test_an_export_made_from_an_export_keeps_the_pictures(pico_dir, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    data = alpaca_data(tmp_path / "data")
    chain = [RepresentationSimilarity(), SlidingWindowMerging(remove_layers=2), ExportCheckpoint(str(first))]
    make_trainer(tmp_path / "a", *chain).prune(make_module(pico_dir), datamodule=data)
    make_trainer(tmp_path / "b", ExportCheckpoint(str(second))).fit(make_module(first), datamodule=data)
    for name in (f"{BEFORE}.json", f"{BEFORE}.png", "search_trace.png"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    assert "](search_trace.png)" in (second / "README.md").read_text()


def test_second_compression_draws_the_model_it_found(pico_dir, tmp_path):
    export = tmp_path / "export"
    chain = [
        SlidingWindowMerging(remove_layers=2),
        Drop([0]),
        RepresentationSimilarity(),
        ExportCheckpoint(str(export)),
    ]
    make_trainer(tmp_path, *chain).prune(make_module(pico_dir), datamodule=alpaca_data(tmp_path / "data"))
    first, second = record_of(export, BEFORE), record_of(export, f"{BEFORE}.2")
    assert (len(first["matrix"]), len(second["matrix"])) == (6, 4)
    assert any("–" in label for label in second["layers"])  # a row that stands for a merged window
    assert not (export / "search_trace.2.png").exists()  # Drop does not search
    # Another run into the same directory leaves no picture of a plan that is no more.
    make_trainer(tmp_path, SlidingWindowMerging(remove_layers=1), overwrite=True).prune(
        make_module(pico_dir), datamodule=alpaca_data(tmp_path / "data")
    )
    assert not (tmp_path / f"{BEFORE}.png").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("representation_similarity_before.json](x) <b>.png", b"\x89PNG\r\n"),
        ("representation_similarity_before.png", b"<html>"),
        ("representation_similarity_before.json", None),
    ],
)
def test_files_of_a_strangers_model_are_not_carried_on(pico_dir, tmp_path, name, content):
    first, second, secret = tmp_path / "first", tmp_path / "second", tmp_path / "secret"
    data = alpaca_data(tmp_path / "data")
    chain = [SlidingWindowMerging(remove_layers=2), ExportCheckpoint(str(first))]
    make_trainer(tmp_path / "a", *chain).prune(make_module(pico_dir), datamodule=data)
    if content is None:
        secret.write_text('{"secret": 1}')
        (first / name).symlink_to(secret)
    else:
        (first / name).write_bytes(content)
    make_trainer(tmp_path / "b", ExportCheckpoint(str(second))).fit(make_module(first), datamodule=data)
    assert not list(second.glob("representation*"))
    assert "representation" not in (second / "README.md").read_text()


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ({"task": "pica"}, "Did you mean"),
        ({"text": CalibrationText("none.jsonl")}, r"none\.jsonl"),
        ({"task": "piqa"}, "sample of 1 tokens from piqa"),
    ],
)
def test_text_that_cannot_be_used_is_found_before_the_search(pico_dir, tmp_path, problem, message, monkeypatch):
    if problem.get("task") == "piqa":
        monkeypatch.setattr("callbacks.representation.task_prompts", lambda *_: ["a", "a decoder layer that does"])
    trainer = make_trainer(tmp_path, SlidingWindowMerging(remove_layers=2), RepresentationSimilarity(**problem))
    with pytest.raises(UsageError, match=message):
        trainer.prune(make_module(pico_dir), datamodule=alpaca_data(tmp_path / "data"))
    assert not (tmp_path / "plan.json").exists()


def test_plan_of_another_model_is_refused_before_the_other_hooks(pico_dir, tmp_path):
    data = alpaca_data(tmp_path / "data")
    export = tmp_path / "export"
    chain = [SlidingWindowMerging(remove_layers=2), ExportCheckpoint(str(export))]
    make_trainer(tmp_path, *chain).prune(make_module(pico_dir), datamodule=data)
    measured = []

    class Measures(pl.Callback):
        def on_test_epoch_end(self, trainer, pl_module):
            measured.append(True)

    hook = RepresentationSimilarity(plan_path=str(tmp_path / "plan.json"))
    with pytest.raises(UsageError, match="is a plan for 6 layers, the tested model has 4"):
        make_trainer(tmp_path / "t", Measures(), hook).test(make_module(export), datamodule=data, verbose=False)
    assert not measured


def test_plan_that_is_not_the_models_own_does_not_stop_the_test(pico_dir, tmp_path):
    export = tmp_path / "export"
    data = alpaca_data(tmp_path / "data")
    chain = [SlidingWindowMerging(remove_layers=2), ExportCheckpoint(str(export))]
    make_trainer(tmp_path, *chain).prune(make_module(pico_dir), datamodule=data)
    plan = json.loads((export / "plan.json").read_text())
    plan["steps"] = [{**plan["steps"][0], "low": 1, "high": 40}]
    del plan["sha256"]  # edited on purpose
    (export / "plan.json").write_text(json.dumps(plan))
    (export / "slm_pl.sha256").unlink()
    make_trainer(tmp_path / "t", RepresentationSimilarity()).test(make_module(export), datamodule=data, verbose=False)
    record = record_of(tmp_path / "t")
    assert (record["layers"], record["windows"]) == (["0", "1", "2", "3"], [])


def test_without_compression_it_says_that_it_did_nothing(pico_dir, tmp_path):
    trainer = make_trainer(tmp_path, RepresentationSimilarity())
    with pytest.warns(UserWarning, match="no compression callback acted"):
        trainer.fit(make_module(pico_dir), datamodule=alpaca_data(tmp_path / "data"))


def test_observers_see_the_model_before_surgery_in_eval_mode_without_gradients(pico_dir, tmp_path):
    seen = []

    class Observer(PlanObserver):
        def on_plan(self, trainer, pl_module, plan):
            model = pl_module.load_model()
            seen.append((len(model.model.layers), model.training, torch.is_grad_enabled(), len(plan.steps)))

    module = make_module(pico_dir)
    module.load_model().train()
    trainer = make_trainer(tmp_path, Drop([2]), Observer())
    trainer.fit(module, datamodule=alpaca_data(tmp_path / "data"))
    assert seen == [(6, False, False, 1)]


def test_dollar_signs_in_names_are_only_dollar_signs(pico_dir, tmp_path):
    text = tmp_path / "a$b_{$.json"
    text.write_text(json.dumps(IDS.tolist()))
    hook = RepresentationSimilarity(text=CalibrationText(str(text)))
    make_trainer(tmp_path / "t", hook).test(
        make_module(pico_dir), datamodule=alpaca_data(tmp_path / "data"), verbose=False
    )
    assert record_of(tmp_path / "t")["protocol"]["text"] == "a$b_{$.json"


def test_test_compares_the_model_it_tests(pico_dir, tmp_path):
    data = alpaca_data(tmp_path / "data")
    export = tmp_path / "export"
    merging = SlidingWindowMerging(remove_layers=2)
    make_trainer(tmp_path, merging, ExportCheckpoint(str(export))).prune(make_module(pico_dir), datamodule=data)
    assert not (tmp_path / "representation_similarity.json").exists()
    steps = json.loads((tmp_path / "plan.json").read_text())["steps"]

    dense, merged = tmp_path / "dense", tmp_path / "merged"
    hook = RepresentationSimilarity("linear", plan_path=str(tmp_path / "plan.json"))
    make_trainer(dense, hook).test(make_module(pico_dir), datamodule=data, verbose=False)
    record = record_of(dense)
    assert record["matrix"] == dense_matrix(pico_dir, "linear")
    assert record["windows"] == [[step["low"], step["high"]] for step in steps]

    make_trainer(merged, RepresentationSimilarity()).test(make_module(export), datamodule=data, verbose=False)
    record = record_of(merged)
    assert len(record["matrix"]) == 4
    assert record["model"]["plan_sha256"] == json.loads((merged / "results.json").read_text())["model"]["plan_sha256"]
    # Which layers each row stands for, and where the merged ones are now.
    windows = {f"{s['low']}–{s['high']}" for s in steps}
    assert {record["layers"][row] for row, _ in record["windows"]} == windows
    covered = [n for label in record["layers"] for n in range(int(label.split("–")[0]), int(label.split("–")[-1]) + 1)]
    assert covered == list(range(6))


def test_text_of_its_own_and_prompts_of_a_task(pico_dir, tmp_path):
    data = alpaca_data(tmp_path / "data")
    (tmp_path / "ids.json").write_text(json.dumps(IDS[:1].tolist()))
    (tmp_path / "piqa").mkdir()
    rows = [{"goal": "do it " * (n + 1), "sol1": "one way", "sol2": "another", "label": 0} for n in range(3)]
    (tmp_path / "piqa" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_text = RepresentationSimilarity(text=CalibrationText(str(tmp_path / "ids.json")))
    make_trainer(tmp_path / "text", of_text).test(make_module(pico_dir), datamodule=data, verbose=False)
    of_task = RepresentationSimilarity(task="piqa", local_data=str(tmp_path), limit=2)
    make_trainer(tmp_path / "task", of_task).test(make_module(pico_dir), datamodule=data, verbose=False)
    model = AutoModelForCausalLM.from_pretrained(pico_dir)
    assert record_of(tmp_path / "text")["matrix"] == representation_similarity(model, IDS[:1], "rbf")
    protocol = record_of(tmp_path / "task")["protocol"]
    assert (protocol["text"], protocol["samples"]) == ("piqa", 2)
    tokenizer = make_module(pico_dir).tokenizer
    ids = [torch.tensor(tokenizer(f"Question: {row['goal']}\nAnswer:")["input_ids"]) for row in rows[:2]]
    assert record_of(tmp_path / "task")["matrix"] == representation_similarity(model, ids, "rbf")


def test_what_cannot_be_compared_is_missing_with_the_reason(pico_dir, tmp_path):
    module = make_module(pico_dir)
    with torch.no_grad():
        module.load_model().model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    trainer = make_trainer(tmp_path, RepresentationSimilarity())
    trainer.test(module, datamodule=alpaca_data(tmp_path / "data"), verbose=False)
    missing = json.loads((tmp_path / "results.json").read_text())["missing"]
    assert "layer 2 gives hidden states that are not finite" in missing["representation_similarity"]
    assert not (tmp_path / "representation_similarity.json").exists()


def test_impossible_arguments(pico_dir, tmp_path):
    with pytest.raises(UsageError, match=r"both text \(embedded\) and task \(piqa\)"):
        RepresentationSimilarity(text=CalibrationText(), task="piqa")
    with pytest.raises(UsageError, match="limit 0; give at least 1"):
        RepresentationSimilarity(limit=0)
    trainer = make_trainer(tmp_path, RepresentationSimilarity(plan_path=str(tmp_path / "none.json")))
    with pytest.raises(UsageError, match="There is no plan at"):
        trainer.test(make_module(pico_dir), datamodule=alpaca_data(tmp_path / "data"), verbose=False)


def test_a_second_run_of_the_same_object_reads_its_own_text(pico_dir, tmp_path):
    hook = RepresentationSimilarity()
    records = []
    for name, ids in (("a", IDS), ("b", IDS[:1])):
        data = alpaca_data(tmp_path / name)
        (tmp_path / name / "calibration.json").write_text(json.dumps(ids.tolist()))
        make_trainer(tmp_path / name, hook).test(make_module(pico_dir), datamodule=data, verbose=False)
        records.append(record_of(tmp_path / name)["protocol"])
    assert [record["samples"] for record in records] == [2, 1]
    assert records[0]["sha256"] != records[1]["sha256"]
