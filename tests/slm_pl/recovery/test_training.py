"""The training job as a whole, on pico models: what is trained, logged, refused and merged."""

import csv
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slm_pl.data import TextDataModule
from slm_pl.errors import UsageError
from slm_pl.recovery.adapters import LoRA, add_adapters, merge_adapters
from slm_pl.recovery.distillation import Distillation
from tests.helpers.pico import pico_model
from tests.helpers.run import Drop, Snapshot, alpaca_data, logits_of, make_module, make_trainer, without
from tests.helpers.tokenizer import pico_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


class Poison(pl.Callback):
    """Makes the head's weights not a number before an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and batch_idx % 2 == 1:  # in the second micro-batch of the step
            self.batch = batch
            self.weights = {n: p.clone() for n, p in pl_module.named_parameters() if p.requires_grad}
            pl_module.plain.lm_head.weight.data[7] = math.nan


def test_loss_that_is_not_finite_stops_before_a_weight_changes_and_keeps_the_batch(pico_dir, tmp_path):
    poison, module = Poison(1), make_module(pico_dir)
    data = alpaca_data(tmp_path, batch_size=2, global_batch_size=4)
    with pytest.raises(FloatingPointError, match=r"loss of optimizer step 2 is nan\. Its micro-batches are in .*step2"):
        make_trainer(tmp_path, poison, max_steps=3).fit(module, data)
    kept = load_file(tmp_path / "nonfinite_step2_rank0.safetensors")
    assert torch.equal(kept["1.input_ids"], poison.batch["input_ids"])
    assert torch.equal(kept["1.labels"], poison.batch["labels"])
    assert kept["0.loss"].isfinite()
    assert kept["1.loss"].isnan()
    for name, value in poison.weights.items():
        assert torch.equal(module.get_parameter(name), value), name


def test_gradient_that_is_not_finite_stops_before_a_weight_changes(pico_dir, tmp_path):
    class Overflow(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 1:
                self.before = {n: p.clone() for n, p in pl_module.named_parameters() if p.requires_grad}
                next(p for p in pl_module.parameters() if p.grad is not None).grad[0, 0] = math.inf

    overflow, module = Overflow(), make_module(pico_dir)
    with pytest.raises(FloatingPointError, match=r"gradient of optimizer step 2 has the norm inf\. Its micro"):
        make_trainer(tmp_path, overflow, max_steps=3, gradient_clip_val=1.0).fit(module, alpaca_data(tmp_path))
    assert (tmp_path / "nonfinite_step2_rank0.safetensors").is_file()
    assert all(torch.equal(module.get_parameter(name), value) for name, value in overflow.before.items())


def test_run_that_was_stopped_early_stays_stopped_when_it_goes_on(pico_dir, tmp_path):
    def fit(**options):
        stop = pl.callbacks.EarlyStopping(monitor="val/loss", min_delta=100.0, patience=1)
        last = pl.callbacks.ModelCheckpoint(filename="last", monitor=None, every_n_epochs=1)
        module = make_module(pico_dir)
        settings = {"max_steps": -1, "max_epochs": 6, "limit_val_batches": 1.0}
        trainer = make_trainer(tmp_path, stop, last, **settings)
        trainer.fit(module, alpaca_data(tmp_path), **options)
        return trainer, module

    trainer, module = fit()
    steps = trainer.global_step
    assert len(module.history["val/loss"]) == 2  # the first, and one that is not better
    trainer, module = fit(ckpt_path=tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert (trainer.global_step, len(module.history["val/loss"])) == (steps, 2)


@pytest.mark.parametrize("count", [0, 2])
def test_last_layers_and_the_head_are_trained(pico_dir, tmp_path, count):
    seen = Snapshot()
    module = make_module(pico_dir, lora=None, last_layers=count)
    make_trainer(tmp_path, Drop([1]), seen).fit(module, alpaca_data(tmp_path))
    changed = {name for name in seen.before if not torch.equal(seen.before[name], seen.after[name])}
    layers = tuple(f"model.model.layers.{n}." for n in range(5 - count, 5))
    assert changed == seen.trainable == {n for n in seen.before if n.startswith((*layers, "model.lm_head"))}


def test_last_layers_are_refused_with_adapters_and_beyond_the_model(pico_dir, tmp_path):
    with pytest.raises(UsageError, match="model.last_layers is 2 and model.lora is set.*with lora: null"):
        make_module(pico_dir, last_layers=2)
    with pytest.raises(UsageError, match="model.last_layers is 7, but the model has 6"):
        make_trainer(tmp_path).fit(make_module(pico_dir, lora=None, last_layers=7), alpaca_data(tmp_path))


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
def test_merged_and_unmerged_logits_agree(changes):
    torch.manual_seed(3)
    adapted = add_adapters(pico_model(), LoRA(r=4, alpha=8, dropout=0.0, **changes), float32=True)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.1)
    before = logits_of(adapted)
    plain = merge_adapters(adapted)
    assert not any(isinstance(module, LoraLayer) for module in plain.modules())
    torch.testing.assert_close(logits_of(plain), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_of(pico_model()), before, rtol=0, atol=10)
    assert (logits_of(pico_model()) - before).abs().max() > 1e-2


def test_scaling_of_rslora():
    for rslora, scale in ((False, 8 / 4), (True, 8 / 2)):
        adapted = add_adapters(pico_model(), LoRA(r=4, alpha=8, rslora=rslora), float32=True)
        (found,) = {m.scaling["default"] for m in adapted.modules() if isinstance(m, LoraLayer)}
        assert found == scale


def test_adapters_are_added_in_float32_and_rounded_once():
    """In bfloat16, the update would be rounded first, and the sum again."""
    model = pico_model().bfloat16()
    weights = {name: m.weight.detach().clone() for name, m in model.named_modules() if name.endswith("q_proj")}
    adapted = add_adapters(model, LoRA(r=4, alpha=8, dropout=0.0), float32=True)
    updates = {}
    torch.manual_seed(1)
    with torch.no_grad():
        for name, module in adapted.named_modules():
            if name.endswith("q_proj"):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                b.copy_(torch.randn_like(b) * 0.02)
                assert a.dtype == b.dtype == torch.float32
                updates[name.removeprefix("base_model.model.")] = 2 * b @ a
    plain = merge_adapters(adapted)
    twice = 0
    for name, update in updates.items():
        found = plain.get_submodule(name).weight
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, (weights[name].float() + update).bfloat16())
        twice += int((found != weights[name] + update.bfloat16()).sum())
    assert twice > 0  # the difference would be seen


def test_distillation_adds_the_divergence_from_the_dense_model(pico_dir, tmp_path):
    settings = Distillation(weight=0.5, hidden_weight=0.25, temperature=2.0, top_k=None)

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.batch = batch

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.logged = {key: value.item() for key, value in trainer.logged_metrics.items()}

    watch, module = Watch(), make_module(pico_dir, distillation=settings)
    trainer = make_trainer(tmp_path, Drop([1, 4]), watch, max_steps=1, log_every_n_steps=1)
    trainer.fit(module, alpaca_data(tmp_path, batching="padded"))
    dense, pruned = AutoModelForCausalLM.from_pretrained(pico_dir), without(pico_dir, 1, 4)
    batch = watch.batch
    with torch.no_grad():
        outputs = [m(batch["input_ids"], output_hidden_states=True) for m in (pruned, dense)]
    selected = batch["labels"][:, 1:] != -100
    own, wanted = ((o.logits[:, :-1][selected] / 2).double().log_softmax(-1) for o in outputs)
    divergence = (wanted.exp() * (wanted - own)).sum(-1).mean() * 4
    distances = []
    for layer, origin in enumerate([0, 2, 3]):  # of 0, 2, 3, 5 the last is left to the logits
        mine, theirs = outputs[0].hidden_states[layer + 1], outputs[1].hidden_states[origin + 1]
        distances.append(((mine - theirs).square().sum(-1) / theirs.square().sum(-1))[batch["attention_mask"] == 1])
    expected = watch.logged["train/loss"] + 0.5 * divergence + 0.25 * torch.stack(distances).mean()
    assert watch.logged["train/objective"] == pytest.approx(expected.item(), rel=1e-4)
    assert divergence > 1e-3
    assert not any("teacher" in name for name, _ in module.named_parameters())


def test_distillation_leaves_the_teacher_alone_and_reaches_the_adapters(pico_dir, tmp_path):
    after = []
    for weight in (1.0, 50.0):
        pl.seed_everything(1, verbose=False)
        seen, module = Snapshot(), make_module(pico_dir, distillation=Distillation(weight=weight, top_k=8))
        make_trainer(tmp_path, Drop([2]), seen, max_steps=3).fit(module, alpaca_data(tmp_path))
        after.append(seen.after)
        dense = AutoModelForCausalLM.from_pretrained(pico_dir)
        assert all(
            torch.equal(p, q) for p, q in zip(module._teacher.model.parameters(), dense.parameters(), strict=True)
        )
        assert module._teacher.model.config.num_hidden_layers == 6
    assert any(not torch.equal(value, after[1][name]) for name, value in after[0].items())


def test_what_is_logged_of_a_step(pico_dir, tmp_path):
    data = alpaca_data(tmp_path, rows=30, batch_size=2, global_batch_size=6)
    logger = CSVLogger(str(tmp_path), "logs")
    trainer = make_trainer(tmp_path, logger=logger, log_every_n_steps=1, max_steps=3, limit_val_batches=1.0)
    trainer.fit(make_module(pico_dir), data)
    with open(tmp_path / "logs" / "version_0" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 3
    schedule = data.train_dataloader().sampler.schedule
    for number, row in enumerate(rows):
        batches = [data.train_dataloader().dataset[slot] for slot in schedule.step(number)]
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        positions = sum(batch["input_ids"].numel() for batch in batches)
        assert float(row["train/padding"]) == pytest.approx(1 - tokens / positions, abs=1e-6)
        assert float(row["train/packing_efficiency"]) == pytest.approx(tokens / positions, abs=1e-6)
        lines = sum(len(batch["input_ids"]) for batch in batches)
        assert float(row["train/examples_per_row"]) == pytest.approx(6 / lines)
        assert 0 < float(row["train/tokens_per_s"]) < 1e7
    assert float(rows[1]["lr"]) == pytest.approx(1e-2)
    picture = (tmp_path / "learning_curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_limits_that_cut_an_optimizer_step_are_refused(pico_dir, tmp_path):
    data = alpaca_data(tmp_path, rows=50, batch_size=2, global_batch_size=6)
    trainer = make_trainer(tmp_path, limit_train_batches=4)
    with pytest.raises(UsageError, match="limit_train_batches leaves 4 micro-batches .* step takes 3. Give a multiple"):
        trainer.fit(make_module(pico_dir), data)
    with pytest.raises(UsageError, match="trainer.overfit_batches puts another sampler"):
        make_trainer(tmp_path, overfit_batches=2).fit(make_module(pico_dir), data)


def test_flash_attention_takes_a_micro_batch_as_one_row(pico_dir, tmp_path):
    """With a stand-in for the name alone: there is no such attention on a CPU."""
    data, module = alpaca_data(tmp_path, rows=50, batch_size=10), make_module(pico_dir)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, data)
    slot = data.train_dataloader().sampler.schedule.step(0)[0]
    several = data.train_dataloader().dataset[slot]
    module.load_model().config._attn_implementation = "flash_attention_2"
    one = data.train_dataloader().dataset[slot]
    assert len(several["input_ids"]) > len(one["input_ids"]) == 1
    assert one["input_ids"].numel() == one["tokens"] == several["tokens"]


def test_validation_waits_for_the_end_of_a_step(pico_dir, tmp_path, caplog):
    module = make_module(pico_dir)
    data = alpaca_data(tmp_path, rows=50, batch_size=2, global_batch_size=6)
    trainer = make_trainer(tmp_path, max_steps=-1, max_epochs=1, val_check_interval=4, limit_val_batches=1.0)
    with caplog.at_level("INFO"):
        trainer.fit(module, data)
    assert "Validation is every 6 micro-batches, the next multiple of the 3 of an optimizer step" in caplog.text
    assert [step for step, _ in module.history["val/loss"]] == [2, 4, 6]


@pytest.mark.parametrize("model_type", ["bloom", "opt"])
def test_models_that_do_not_keep_packed_examples_apart_are_refused_before_the_search(model_type, tmp_path):
    pico_model(model_type).save_pretrained(tmp_path / "model")
    pico_tokenizer().save_pretrained(tmp_path / "model")
    method = Drop([1])
    with pytest.raises(UsageError, match="does not keep the examples of a row apart. Use data.batching: grouped"):
        make_trainer(tmp_path, method).fit(make_module(tmp_path / "model"), alpaca_data(tmp_path))
    assert method.searches == 0
    make_trainer(tmp_path, method).fit(make_module(tmp_path / "model"), alpaca_data(tmp_path, batching="grouped"))
    assert method.searches == 1


def test_continued_pretraining_on_text(pico_dir, tmp_path):
    data = TextDataModule("embedded", max_documents=1, sequence_length=32, val_size=4, batch_size=4, seed=3)
    module = make_module(pico_dir, lora=None, learning_rate=3e-3)
    make_trainer(tmp_path, max_steps=12, limit_val_batches=1.0, val_check_interval=6).fit(module, data)
    first, last = (module.history["val/loss"][i][1] for i in (0, -1))
    assert last < first < math.log(512) + 0.5
