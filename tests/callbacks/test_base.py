import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from callbacks import CompressionCallback, ExportCheckpoint, SlidingWindowMerging
from callbacks.base import on_first_rank
from slm_pl.compression import surgery
from slm_pl.compression.plan import Base, DropLayers, Method, Plan
from slm_pl.errors import UsageError
from slm_pl.export import save_compressed
from slm_pl.trainer import Trainer
from tests.helpers.pico import pico_model
from tests.helpers.run import IDS, Drop, alpaca_data, logits_of, make_module, make_trainer, without
from tests.helpers.tokenizer import pico_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


class Keep(Drop):
    """Another method, which differs from Drop in its name only."""


def run(stage: str, trainer: Trainer, module: pl.LightningModule, data: pl.LightningDataModule) -> None:
    options = {"verbose": False} if stage in ("validate", "test") else {}
    getattr(trainer, stage)(module, datamodule=data, **options)


@pytest.fixture
def carried(pico_dir, tmp_path):
    """A model directory that Drop([5]) made, with its plan."""
    model = AutoModelForCausalLM.from_pretrained(pico_dir)
    plan = Plan(Base.of(model), Method(Drop([5]).class_path, {"layers": [5]}), None, (DropLayers((5,)),))
    surgery.apply(model, plan)
    return save_compressed(model, pico_tokenizer(), tmp_path / "carried", [plan], recovered=False)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict", "prune"])
def test_compression_acts_in_every_stage(stage, pico_dir, tmp_path):
    module, method = make_module(pico_dir, learning_rate=0.0, max_new_tokens=1), Drop([1, 3])
    run(stage, make_trainer(tmp_path / "run", method, limit_val_batches=1), module, alpaca_data(tmp_path))
    model = module.merge_adapters()
    assert model.config.num_hidden_layers == 4
    torch.testing.assert_close(logits_of(model), logits_of(without(pico_dir, 1, 3)), rtol=0, atol=1e-6)
    assert method.searches == 1
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert plan.steps == (DropLayers((1, 3)),)
    assert plan.method == Method("tests.helpers.run.Drop", {"layers": [1, 3]})
    assert plan.base == Base.of(AutoModelForCausalLM.from_pretrained(pico_dir))
    assert plan.calibration is not None
    assert plan.calibration.samples == len(IDS)


def test_the_real_method_acts_and_the_plan_can_be_read(pico_dir, tmp_path):
    module = make_module(pico_dir)
    make_trainer(tmp_path, SlidingWindowMerging(remove_layers=2)).test(module, alpaca_data(tmp_path), verbose=False)
    assert module.load_model().config.num_hidden_layers == 4
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.method.class_path == "callbacks.SlidingWindowMerging"
    assert "plan_path" not in plan.method.init_args
    assert plan.method.init_args["remove_layers"] == 2


def test_the_search_sees_a_model_in_eval_mode_without_gradients_and_gives_it_back(pico_dir, tmp_path):
    seen = []

    class Look(Drop):
        def plan(self, model, calibration):
            seen.append((model.training, torch.is_grad_enabled(), [b.tolist() for b in calibration.batches]))
            return super().plan(model, calibration)

    module = make_module(pico_dir)
    make_trainer(tmp_path, Look([0])).fit(module, alpaca_data(tmp_path))
    assert seen == [(False, False, [[row] for row in IDS.tolist()])]
    assert module.model.training


def test_the_same_objects_run_a_second_stage_without_compressing_again(pico_dir, tmp_path):
    module, method = make_module(pico_dir), Drop([2])
    trainer = make_trainer(tmp_path, method, limit_val_batches=1)
    trainer.fit(module, alpaca_data(tmp_path))
    trainer.test(module, alpaca_data(tmp_path), verbose=False)
    assert method.searches == 1
    assert json.loads((tmp_path / "results.json").read_text())["model"]["num_layers"] == 5
    # A new callback object on the same module finds the plan there, too.
    again = Drop([2])
    make_trainer(tmp_path, again, limit_val_batches=1).validate(module, alpaca_data(tmp_path), verbose=False)
    assert again.searches == 0
    assert module.load_model().config.num_hidden_layers == 5


def test_a_second_model_is_compressed_too(pico_dir, tmp_path):
    trainer = make_trainer(tmp_path, Drop([2]), limit_val_batches=1)
    for _ in range(2):
        module = make_module(pico_dir)
        trainer.validate(module, alpaca_data(tmp_path), verbose=False)
        assert module.load_model().config.num_hidden_layers == 5


def test_model_that_carries_the_methods_plan_is_not_compressed_again(carried, tmp_path):
    module, method = make_module(carried), Drop([5])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not compressed again.*")
        make_trainer(tmp_path, method).test(module, alpaca_data(tmp_path), verbose=False)
    assert method.searches == 0
    assert module.load_model().config.num_hidden_layers == 5
    assert not (tmp_path / "plan.json").exists()
    model = json.loads((tmp_path / "results.json").read_text())["model"]
    assert model["plan_sha256"] == Plan.load(carried / "plan.json").sha256
    assert model["source"] == str(carried)


def test_other_arguments_than_the_carried_plans_are_warned_of(carried, tmp_path):
    module, method = make_module(carried), Drop([4])
    message = r"was compressed by tests.helpers.run.Drop with \{'layers': \[5\]\} and is not compressed again with "
    with pytest.warns(UserWarning, match=message + r"\{'layers': \[4\]\}"):
        make_trainer(tmp_path, method).test(module, alpaca_data(tmp_path), verbose=False)
    assert method.searches == 0
    assert module.load_model().config.num_hidden_layers == 5


def test_model_that_carries_another_methods_plan_is_compressed(carried, tmp_path):
    module, method = make_module(carried), Keep([0])
    trainer = make_trainer(tmp_path / "run", method, ExportCheckpoint(str(tmp_path / "export")))
    trainer.prune(module, alpaca_data(tmp_path))
    assert method.searches == 1
    assert torch.equal(logits_of(module.load_model()), logits_of(without(carried, 0)))
    first, second = module.plans
    assert first == Plan.load(carried / "plan.json")
    assert second.base.num_layers == 5
    assert Plan.load(tmp_path / "run" / "plan.2.json") == second
    assert Plan.load(tmp_path / "export" / "plan.2.json") == second
    assert Plan.load(tmp_path / "export" / "plan.json") == first


@pytest.mark.parametrize("classes", [(Drop, Keep), (Drop, Drop)])
def test_callbacks_in_sequence(classes, pico_dir, tmp_path):
    first, second = classes[0]([0, 5]), classes[1]([1])  # the second counts in the model that the first left
    module = make_module(pico_dir)
    export = ExportCheckpoint(str(tmp_path / "export"))
    make_trainer(tmp_path / "run", first, second, export).prune(module, alpaca_data(tmp_path))
    assert torch.equal(logits_of(module.load_model()), logits_of(without(pico_dir, 0, 2, 5)))
    for directory in (tmp_path / "run", tmp_path / "export"):
        plans = [Plan.load(directory / name) for name in ("plan.json", "plan.2.json")]
        assert [plan.base.num_layers for plan in plans] == [6, 4]
        assert plans[1].base == Base.of(without(pico_dir, 0, 5))
        assert [plan.steps for plan in plans] == [(DropLayers((0, 5)),), (DropLayers((1,)),)]
        assert [plan.to_json() for plan in plans] == [plan.to_json() for plan in module.plans]

    # The export, run through the same callbacks, stays what it is.
    again = make_module(tmp_path / "export")
    methods = classes[0]([0, 5]), classes[1]([1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not compressed again.*")
        make_trainer(tmp_path / "again", *methods).test(again, alpaca_data(tmp_path), verbose=False)
    assert [method.searches for method in methods] == [0, 0]
    assert again.load_model().config.num_hidden_layers == 3


def test_plan_path_skips_the_search_and_needs_no_calibration_text(pico_dir, tmp_path):
    found = Drop([1, 4])
    make_trainer(tmp_path / "a", found).prune(make_module(pico_dir), alpaca_data(tmp_path))
    given, module = Drop([0], plan_path=str(tmp_path / "a" / "plan.json")), make_module(pico_dir)
    trainer = make_trainer(tmp_path / "b", given, limit_val_batches=1)
    trainer.predict(module, torch.utils.data.DataLoader([{"prompt": "a"}], collate_fn=lambda rows: rows[0]))
    assert given.searches == 0
    assert torch.equal(logits_of(module.load_model()), logits_of(without(pico_dir, 1, 4)))
    assert (tmp_path / "b" / "plan.json").read_bytes() == (tmp_path / "a" / "plan.json").read_bytes()
    with pytest.raises(UsageError, match="There is no plan at"):
        make_trainer(tmp_path / "c", Drop([0], plan_path=str(tmp_path / "none.json"))).prune(
            make_module(pico_dir), alpaca_data(tmp_path)
        )


def test_search_needs_the_data_module(pico_dir, tmp_path):
    trainer = make_trainer(tmp_path, Drop([0]))
    with pytest.raises(UsageError, match="Drop needs calibration text from .* slm_pl.data.*; got NoneType"):
        trainer.predict(make_module(pico_dir), torch.utils.data.DataLoader([{"prompt": "a"}]))


def test_plan_of_another_model_is_refused_and_not_written(pico_dir, tmp_path):
    other = pico_model(num_hidden_layers=5)
    Plan(Base.of(other), Method("x", {}), None, (DropLayers((1,)),)).save(tmp_path / "other.json")
    module = make_module(pico_dir)
    with pytest.raises(UsageError, match="num_layers 5 .*this model has num_layers 6"):
        make_trainer(tmp_path / "run", Drop([0], plan_path=str(tmp_path / "other.json"))).prune(
            module, alpaca_data(tmp_path)
        )
    assert not (tmp_path / "run" / "plan.json").exists()
    assert module.plans == []
    assert torch.equal(logits_of(module.load_model()), logits_of(without(pico_dir)))


def test_a_plan_that_cannot_be_carried_out_is_not_written(pico_dir, tmp_path):
    module = make_module(pico_dir)
    with pytest.raises(UsageError, match=r"touches layers \[6\]"):
        make_trainer(tmp_path / "run", Drop([6])).prune(module, alpaca_data(tmp_path))
    assert not (tmp_path / "run" / "plan.json").exists()
    assert module.load_model().config.num_hidden_layers == 6


def test_plan_is_written_before_any_weight_changes(pico_dir, tmp_path, monkeypatch):
    written = []

    def interrupted(model, plan, settle):
        written.append((tmp_path / "plan.json").read_text() == plan.file_text)
        raise KeyError("power cut")

    monkeypatch.setattr(surgery, "apply", interrupted)
    module = make_module(pico_dir)
    with pytest.raises(KeyError, match="power cut"):
        make_trainer(tmp_path, Drop([1])).prune(module, alpaca_data(tmp_path))
    assert written == [True]
    assert torch.equal(logits_of(module.load_model()), logits_of(without(pico_dir)))


def test_a_failing_search_leaves_no_plan(pico_dir, tmp_path):
    class Broken(Drop):
        def plan(self, model, calibration):
            raise FloatingPointError("not finite")

    with pytest.raises(FloatingPointError):
        make_trainer(tmp_path / "run", Broken([1])).prune(make_module(pico_dir), alpaca_data(tmp_path))
    assert not (tmp_path / "run").exists()


def test_unwritable_run_directory_is_one_message(pico_dir, tmp_path):
    (tmp_path / "file").write_text("x")
    module = make_module(pico_dir)
    with pytest.raises(UsageError, match="Cannot write to .*file/run"):
        make_trainer(tmp_path / "file" / "run", Drop([1])).prune(module, alpaca_data(tmp_path))
    assert module.load_model().config.num_hidden_layers == 6


def test_prune_trains_and_predicts_nothing(pico_dir, tmp_path):
    module = make_module(pico_dir, max_new_tokens=1)
    trainer = make_trainer(tmp_path / "run", Drop([1]))
    trainer.prune(module, alpaca_data(tmp_path))
    assert not module.adapted
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["plan.json"]
    assert trainer.pruning is False
    trainer.predict(module, alpaca_data(tmp_path))  # the same trainer still predicts
    assert len(module.predictions) == 3


def test_a_method_is_its_signature():
    class Method(CompressionCallback):
        def __init__(self, one: int = 1, two: str | None = None, plan_path: str | None = None) -> None:
            super().__init__(plan_path)
            self.one, self.two = one, two

        def plan(self, model, calibration):
            raise NotImplementedError

    method = Method(one=3, plan_path="p.json")
    assert method.arguments() == {"one": 3, "two": None}
    assert method.class_path == f"{__name__}.{Method.__qualname__}"
    assert SlidingWindowMerging(threshold=0.5).class_path == "callbacks.SlidingWindowMerging"


def test_a_moved_export_is_still_what_it_was(carried, tmp_path):
    moved = Path(shutil.move(carried, tmp_path / "elsewhere"))
    module, method = make_module(moved), Drop([5])
    make_trainer(tmp_path / "run", method).test(module, alpaca_data(tmp_path), verbose=False)
    assert method.searches == 0


def test_failure_of_the_first_rank_is_told_to_all():
    """Two ranks that take turns: what the first broadcasts is what the second gets."""
    sent = []

    class Strategy:
        def __init__(self, rank):
            self.rank = rank

        def broadcast(self, value):
            if self.rank == 0:
                sent.append(value)
            return sent[-1]

    def run(rank, work):
        return on_first_rank(SimpleNamespace(is_global_zero=rank == 0, strategy=Strategy(rank)), work)

    def fails(error):
        raise error

    for error, others, message in (
        (UsageError("mend this"), UsageError, "mend this"),
        (ValueError("a bug"), RuntimeError, "The first rank failed with ValueError: a bug"),
    ):
        with pytest.raises(type(error), match=str(error)):
            run(0, lambda error=error: fails(error))
        with pytest.raises(others, match=message):
            run(1, lambda: None)
    assert [run(rank, lambda: 7) for rank in (0, 1)] == [7, 7]
