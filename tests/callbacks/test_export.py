import json
import os
import sys

import lightning.pytorch as pl
import pytest
import torch

import callbacks
from callbacks import ExportCheckpoint
from slm_pl.compression.plan import Plan
from slm_pl.errors import UsageError
from slm_pl.export import load_compressed
from slm_pl.loading import load_model, quantization_of, resolve
from tests.helpers.run import Drop, Snapshot, add_adapters, alpaca_data, logits_of, make_module, make_trainer, without

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("lora", [True, False])
def test_fit_writes_the_compressed_and_the_recovered_model(pico_dir, tmp_path, lora):
    seen = Snapshot()
    export = ExportCheckpoint(str(tmp_path / "recovered"), compressed_dir=str(tmp_path / "pruned"))
    module = make_module(pico_dir, **({} if lora else {"lora": None}))
    make_trainer(tmp_path / "run", Drop([1, 4]), export, seen).fit(module, alpaca_data(tmp_path))

    expected = without(pico_dir, 1, 4)
    pruned, _, plans = load_compressed(tmp_path / "pruned")
    assert torch.equal(logits_of(pruned), logits_of(expected))
    assert plans == [Plan.load(tmp_path / "run" / "plan.json")]

    if lora:
        add_adapters(expected, seen.after, scale=8 / 2)
    else:
        expected.load_state_dict({name.removeprefix("model."): value for name, value in seen.after.items()})
    recovered, tokenizer, plans = load_compressed(tmp_path / "recovered")
    torch.testing.assert_close(logits_of(recovered), logits_of(expected), rtol=0, atol=1e-5)
    assert (logits_of(recovered) - logits_of(pruned)).abs().max() > 1e-3  # training changed something
    assert plans == [Plan.load(tmp_path / "run" / "plan.json")]
    assert recovered.config.num_hidden_layers == 4
    assert not any("lora" in name for name, _ in recovered.named_parameters())
    assert tokenizer.eos_token_id == 1
    assert "Not trained" in (tmp_path / "pruned" / "README.md").read_text()
    assert "Recovered by training" in (tmp_path / "recovered" / "README.md").read_text()


def test_prune_exports_without_training(pico_dir, tmp_path):
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "mine").write_text("not written in prune, so it is nobody's business")
    export = ExportCheckpoint(str(tmp_path / "export"), compressed_dir=str(tmp_path / "pruned"))
    make_trainer(tmp_path / "run", Drop([0]), export).prune(make_module(pico_dir), alpaca_data(tmp_path))
    assert torch.equal(logits_of(load_compressed(tmp_path / "export")[0]), logits_of(without(pico_dir, 0)))
    assert "Not trained" in (tmp_path / "export" / "README.md").read_text()
    assert os.listdir(tmp_path / "pruned") == ["mine"]


@pytest.mark.parametrize("stage", ["fit", "prune"])
def test_export_above_compression_is_refused(stage, pico_dir, tmp_path):
    method = Drop([0])
    trainer = make_trainer(tmp_path / "run", ExportCheckpoint(str(tmp_path / "export")), method)
    with pytest.raises(UsageError, match="stands above a compression callback.*Move it below in trainer.callbacks"):
        getattr(trainer, stage)(make_module(pico_dir), datamodule=alpaca_data(tmp_path))
    assert method.searches == 0
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(("stage", "which"), [("fit", "export"), ("fit", "pruned"), ("prune", "export")])
def test_directory_that_is_not_empty(stage, which, pico_dir, tmp_path):
    (tmp_path / which).mkdir()
    (tmp_path / which / "stale").write_text("old")

    def start(method: Drop, overwrite: bool) -> None:
        export = ExportCheckpoint(str(tmp_path / "export"), compressed_dir=str(tmp_path / "pruned"))
        trainer = make_trainer(tmp_path / "run", method, export, overwrite=overwrite)
        getattr(trainer, stage)(make_module(pico_dir), datamodule=alpaca_data(tmp_path))

    method = Drop([0])
    with pytest.raises(UsageError, match=f"{tmp_path / which} exists and is not empty.*--overwrite"):
        start(method, overwrite=False)
    assert method.searches == 0  # before the search
    assert os.listdir(tmp_path / which) == ["stale"]
    assert not (tmp_path / "run" / "plan.json").exists()
    with pytest.raises(UsageError, match="not an earlier export"):
        start(method, overwrite=True)
    assert os.listdir(tmp_path / which) == ["stale"]
    (tmp_path / which / "config.json").write_text("{}")
    start(method, overwrite=True)
    assert method.searches == 1
    assert not (tmp_path / which / "stale").exists()
    assert load_compressed(tmp_path / which)[0].config.num_hidden_layers == 5


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_neither_export_nor_mind_what_is_there(stage, pico_dir, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine").write_text("old")
    export = ExportCheckpoint(str(tmp_path / "export"), compressed_dir=str(tmp_path / "pruned"))
    module = make_module(pico_dir, max_new_tokens=1)
    trainer = make_trainer(tmp_path / "run", Drop([0]), export)
    options = {} if stage == "predict" else {"verbose": False}
    getattr(trainer, stage)(module, datamodule=alpaca_data(tmp_path), **options)
    assert os.listdir(tmp_path / "export") == ["mine"]
    assert not (tmp_path / "pruned").exists()
    assert module.load_model().config.num_hidden_layers == 5


def test_a_second_compression_still_knows_the_dense_layers_and_the_first_method(pico_dir, tmp_path):
    first = callbacks.LayerRemoval(order="reverse", remove_layers=1)
    export = ExportCheckpoint(str(tmp_path / "first"))
    make_trainer(tmp_path / "one", first, export).prune(make_module(pico_dir), alpaca_data(tmp_path))
    export = ExportCheckpoint(str(tmp_path / "second"))
    module = make_module(str(tmp_path / "first"))
    make_trainer(tmp_path / "two", Drop([0]), export).prune(module, alpaca_data(tmp_path))
    layers = json.loads((tmp_path / "second" / "layer_map.json").read_text())["layers"]
    own = sum(p.numel() for p in load_compressed(tmp_path / "second")[0].model.layers[0].parameters())
    assert [(one["before"], one["after"]) for one in layers] == [
        (own, 0), (own, own), (own, own), (own, own), (own, 0), (own, own)
    ]  # fmt: skip
    card = (tmp_path / "second" / "README.md").read_text()
    assert f"```bibtex\n{callbacks.LayerRemoval.citation}\n```" in card
    assert "![What became of every layer](layer_map.png)" in card


def test_fit_then_test_in_one_program_measures_the_recovered_model(pico_dir, tmp_path):
    module = make_module(pico_dir)
    trainer = make_trainer(tmp_path / "run", Drop([0]), ExportCheckpoint(str(tmp_path / "export")))
    trainer.fit(module, alpaca_data(tmp_path))
    trainer.test(module, alpaca_data(tmp_path), verbose=False)
    assert torch.equal(logits_of(module.measured()[0]), logits_of(load_compressed(tmp_path / "export")[0]))


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_training_that_breaks_off_exports_nothing(pico_dir, tmp_path, error):
    class Break(pl.Callback):
        def on_train_batch_end(self, *arguments):
            raise error

    trainer = make_trainer(tmp_path / "run", Drop([0]), ExportCheckpoint(str(tmp_path / "export")), Break())
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        trainer.fit(make_module(pico_dir), alpaca_data(tmp_path))
    assert not (tmp_path / "export").exists()
    assert not list(tmp_path.glob(".export*"))


def test_both_directories_must_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in ("a/b", "a", "a/b/c"):
        with pytest.raises(UsageError, match="output_dir is a/b and compressed_dir is .* neither in the other"):
            ExportCheckpoint("a/b", compressed_dir=str(tmp_path / other))


def test_fit_writes_the_recovered_model_as_it_was_asked_for_and_the_compressed_one_as_it_is(pico_dir, tmp_path):
    pytest.importorskip("torchao", reason="torchao is an optional dependency")
    module, plain = make_module(pico_dir), tmp_path / "plain"
    export = ExportCheckpoint(
        str(tmp_path / "recovered"), str(tmp_path / "pruned"), dtype="bfloat16", quantization="int8"
    )
    make_trainer(tmp_path / "run", Drop([1, 4]), ExportCheckpoint(str(plain)), export).fit(
        module, alpaca_data(tmp_path)
    )
    # The model in memory is still what was trained.
    trained = load_compressed(plain)[0]
    assert torch.equal(logits_of(module.load_model()), logits_of(trained))
    assert quantization_of(module.load_model().config) is None

    pruned, _, plans = load_compressed(tmp_path / "pruned")
    assert torch.equal(logits_of(pruned), logits_of(without(pico_dir, 1, 4)))
    assert pruned.dtype == torch.float32
    assert quantization_of(pruned.config) is None
    recovered, _, theirs = load_compressed(tmp_path / "recovered")
    assert recovered.dtype == torch.bfloat16
    assert quantization_of(recovered.config) == "int8 weight-only (torchao)"
    assert theirs == plans
    expected = load_model(resolve(str(plain)), "bfloat16", quantization="int8")
    assert torch.equal(logits_of(recovered), logits_of(expected))


def test_prune_writes_it_as_it_was_asked_for(pico_dir, tmp_path, caplog):
    caplog.set_level("INFO")
    export = ExportCheckpoint(str(tmp_path / "export"), dtype="bfloat16")
    make_trainer(tmp_path / "run", Drop([0]), export).prune(make_module(pico_dir), alpaca_data(tmp_path))
    exported = load_compressed(tmp_path / "export")[0]
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    assert "torchao" not in caplog.text


def test_prune_to_int8_says_what_loads_it(pico_dir, tmp_path, caplog):
    pytest.importorskip("torchao", reason="torchao is an optional dependency")
    caplog.set_level("INFO")
    export = ExportCheckpoint(str(tmp_path / "export"), quantization="int8")
    make_trainer(tmp_path / "run", Drop([0]), export).prune(make_module(pico_dir), alpaca_data(tmp_path))
    assert "Load it with:\n# needs torchao: pip install torchao\nfrom transformers import" in caplog.text


@pytest.mark.parametrize("stage", ["fit", "prune"])
def test_int8_without_torchao_is_refused_before_the_search(stage, pico_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    method = Drop([0])
    trainer = make_trainer(tmp_path / "run", method, ExportCheckpoint(str(tmp_path / "export"), quantization="int8"))
    with pytest.raises(
        UsageError, match=r"ExportCheckpoint with quantization int8 needs torchao .*'.\[quantization\]'"
    ):
        getattr(trainer, stage)(make_module(pico_dir), datamodule=alpaca_data(tmp_path))
    assert method.searches == 0
    assert not (tmp_path / "export").exists()


def test_int8_model_is_not_exported_again(pico_dir, tmp_path):
    pytest.importorskip("torchao", reason="torchao is an optional dependency")
    trainer = make_trainer(tmp_path / "run", ExportCheckpoint(str(tmp_path / "export")))
    with pytest.raises(UsageError, match="are quantised .* and cannot be exported again. Start from"):
        trainer.prune(make_module(pico_dir, quantization="int8"), alpaca_data(tmp_path))
    assert not (tmp_path / "export").exists()
