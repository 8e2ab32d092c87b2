import json
from pathlib import Path

import matplotlib.image
import pytest
import torch
from transformers import AutoModelForCausalLM

from callbacks import ExportCheckpoint, RepresentationSimilarity, SlidingWindowMerging
from slm_pl.data import CalibrationText
from slm_pl.errors import UsageError
from slm_pl.evaluation.representation import representation_similarity
from tests.helpers.run import IDS, alpaca_data, make_module, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def record_of(directory: Path, name: str = "representation_similarity") -> dict:
    assert matplotlib.image.imread(directory / f"{name}.png").ndim == 3
    return json.loads((directory / f"{name}.json").read_text())


def dense_matrix(pico_dir: Path, kernel: str) -> list[list[float]]:
    return representation_similarity(AutoModelForCausalLM.from_pretrained(pico_dir), IDS, kernel)


@pytest.mark.parametrize("last", [True, False])
def test_prune_compares_the_dense_layers_wherever_it_stands(pico_dir, tmp_path, last):
    export = tmp_path / "export"
    chain = [SlidingWindowMerging(remove_layers=2), ExportCheckpoint(str(export))]
    chain.insert(2 if last else 0, RepresentationSimilarity())
    make_trainer(tmp_path, *chain).prune(make_module(pico_dir), datamodule=alpaca_data(tmp_path / "data"))
    # Standing last, it still sees the model before the merge, and the export shows it.
    record = record_of(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert record["matrix"] == dense_matrix(pico_dir, "rbf")
    assert record["windows"] == [[step["low"], step["high"]] for step in plan["steps"]]
    assert record["layers"] == [str(n) for n in range(6)]
    assert record["model"] == {"pretrained": str(pico_dir), "num_layers": 6, "plan_sha256": None}
    protocol = record["protocol"]
    assert (protocol["kernel"], protocol["samples"], protocol["tokens"]) == ("rbf", 2, 42)
    assert protocol["sha256"] == plan["calibration"]["sha256"]
    for name in ("representation_similarity.json", "representation_similarity.png", "search_trace.png"):
        assert (export / name).read_bytes() == (tmp_path / name).read_bytes()
    card = (export / "README.md").read_text()
    assert "](representation_similarity.png)" in card
    assert "](search_trace.png)" in card
    assert ".json)" not in card.replace("plan.json", "")


def test_an_export_made_from_an_export_keeps_the_pictures(pico_dir, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    data = alpaca_data(tmp_path / "data")
    chain = [RepresentationSimilarity(), SlidingWindowMerging(remove_layers=2), ExportCheckpoint(str(first))]
    make_trainer(tmp_path / "a", *chain).prune(make_module(pico_dir), datamodule=data)
    make_trainer(tmp_path / "b", ExportCheckpoint(str(second))).fit(make_module(first), datamodule=data)
    for name in ("representation_similarity.json", "representation_similarity.png", "search_trace.png"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    assert "](search_trace.png)" in (second / "README.md").read_text()


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
