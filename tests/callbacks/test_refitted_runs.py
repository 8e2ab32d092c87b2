"""Consolidation by least squares in real runs: text of its own, the plan's files, the export, and training on top."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from callbacks import ExportCheckpoint, LayerRemoval
from slm_pl.compression.least_squares import LeastSquares
from slm_pl.compression.plan import Plan, RefitOutput
from slm_pl.data import CalibrationText
from slm_pl.errors import UsageError
from tests.helpers.run import Snapshot, alpaca_data, logits_of, make_module, make_trainer, without

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(3, 460, (24, 16), generator=torch.Generator().manual_seed(1))


def texts(directory) -> list[CalibrationText]:
    paths = [directory / "letters.json", directory / "novels.json"]
    for path, ids in zip(paths, IDS.split(14), strict=True):
        path.write_text(json.dumps(ids.tolist()))
    return [CalibrationText(str(path)) for path in paths]


def refitting(**arguments) -> LayerRemoval:
    return LayerRemoval([2], consolidation="least_squares", least_squares=LeastSquares(ridge=(3.0,)), **arguments)


@pytest.fixture
def pruned(pico_dir, tmp_path):
    """A run that pruned and exported."""
    data = alpaca_data(tmp_path, fitting=texts(tmp_path))
    callbacks = refitting(), ExportCheckpoint(str(tmp_path / "export"))
    make_trainer(tmp_path / "run", *callbacks).prune(make_module(pico_dir), data)
    return tmp_path


def by_hand(pico_dir, plan: Plan):
    model = without(pico_dir, 2)
    (step,) = (step for step in plan.steps if isinstance(step, RefitOutput))
    assert (step.layer, step.group) == (1, "mlp")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.copy_(plan.tensors[step.weight])
    return model


def test_run_fits_on_its_own_texts_and_exports_what_it_fitted(pico_dir, pruned):
    plan = Plan.load(pruned / "run" / "plan.json")
    told = plan.outcome["least_squares"]
    assert told["source"] == f"{pruned / 'letters.json'} + {pruned / 'novels.json'}"
    assert (told["samples"], told["tokens"]) == (24, 24 * 16)
    assert plan.method.init_args["least_squares"] == {
        "outputs": "mlp",
        "later_layers": False,
        "ridge": [3.0],
        "held_out": 0.125,
    }
    assert (pruned / "run" / "plan.tensors.safetensors").is_file()
    exported = AutoModelForCausalLM.from_pretrained(pruned / "export")
    assert torch.equal(logits_of(exported), logits_of(by_hand(pico_dir, plan)))
    assert not torch.equal(logits_of(exported), logits_of(without(pico_dir, 2)))
    assert sum(p.numel() for p in exported.parameters()) == sum(p.numel() for p in without(pico_dir, 2).parameters())
    assert "refit by least squares what the mlp of layer 1 writes" in (pruned / "export" / "README.md").read_text()
    assert Plan.load(pruned / "export" / "plan.json") == plan


def test_plan_is_applied_again_without_any_text(pico_dir, pruned):
    module = make_module(pico_dir)
    given = refitting(plan_path=str(pruned / "run" / "plan.json"))
    make_trainer(pruned / "again", given).prune(module, alpaca_data(pruned, fitting=[CalibrationText("none.json")]))
    exported = AutoModelForCausalLM.from_pretrained(pruned / "export")
    assert torch.equal(logits_of(module.load_model()), logits_of(exported))


def test_training_starts_from_the_refitted_weights(pico_dir, tmp_path):
    module, snapshot = make_module(pico_dir), Snapshot()
    data = alpaca_data(tmp_path, fitting=texts(tmp_path))
    make_trainer(tmp_path / "run", refitting(), snapshot).fit(module, data)
    plan = Plan.load(tmp_path / "run" / "plan.json")
    name = next(name for name in snapshot.before if "layers.1.mlp.down_proj.base_layer.weight" in name)
    assert torch.equal(snapshot.before[name], plan.tensors["layers.1.mlp.weight"])
    assert torch.equal(snapshot.after[name], snapshot.before[name])
    assert all("lora" in trainable for trainable in snapshot.trainable)


def test_without_texts_of_its_own_it_fits_on_the_calibration_text(pico_dir, tmp_path):
    make_trainer(tmp_path / "run", refitting()).prune(make_module(pico_dir), data := alpaca_data(tmp_path))
    told = Plan.load(tmp_path / "run" / "plan.json").outcome["least_squares"]
    assert told["source"] == data.calibration.source
    assert told["sha256"] == data.calibration_batches().sha256
    with pytest.raises(UsageError, match="data.fitting is an empty list"):
        make_trainer(tmp_path / "b", refitting()).prune(make_module(pico_dir), alpaca_data(tmp_path, fitting=[]))


def test_an_unknown_consolidation_is_refused():
    with pytest.raises(UsageError, match="consolidation is 'mean'; allowed are drop and least_squares"):
        LayerRemoval([2], consolidation="mean")
