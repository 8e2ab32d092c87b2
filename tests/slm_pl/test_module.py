import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from slm_pl.compression.plan import Plan
from slm_pl.errors import UsageError
from slm_pl.module import CausalLM, LoRA
from slm_pl.results import Results
from tests.helpers.run import Drop, Snapshot, add_adapters, alpaca_data, logits_of, make_module, make_trainer, without

pytestmark = pytest.mark.usefixtures("one_thread")

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def checkpointing(run: Path) -> ModelCheckpoint:
    """Keeps a checkpoint of every step."""
    return ModelCheckpoint(run / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1)


def load_checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_lora_wraps_the_projections_of_the_compressed_model(pico_dir, tmp_path):
    module, seen = make_module(pico_dir, lora=LoRA(r=3, alpha=6)), Snapshot()
    make_trainer(tmp_path, Drop([1, 4]), seen).fit(module, alpaca_data(tmp_path))
    modules = [name.partition(".lora_")[0] for name in seen.trainable]
    assert {name.rpartition(".")[2] for name in modules} == PROJECTIONS
    assert len(set(modules)) == 7 * 4  # seven projections in each of the four layers that are left
    assert len(modules) == 2 * 7 * 4  # A and B
    assert {min(seen.before[name].shape) for name in seen.trainable} == {3}
    layer = 3 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))  # r times (inputs + outputs)
    assert sum(seen.before[name].numel() for name in seen.trainable) == 4 * layer


def test_lora_on_chosen_modules_and_unknown_ones_are_refused(pico_dir, tmp_path):
    seen = Snapshot()
    module = make_module(pico_dir, lora=LoRA(target_modules=["q_proj", "up_proj"]))
    make_trainer(tmp_path / "a", seen).fit(module, alpaca_data(tmp_path))
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in seen.trainable} == {"q_proj", "up_proj"}
    with pytest.raises(UsageError, match=r"lora.target_modules names \['qproj'\].*projections are \['down_proj'"):
        make_trainer(tmp_path / "b").fit(
            make_module(pico_dir, lora=LoRA(target_modules=["qproj"])), alpaca_data(tmp_path)
        )


@pytest.mark.parametrize(("changes", "message"), [({"r": 0}, "lora.r is 0"), ({"dropout": 1.0}, "lora.dropout is 1.0")])
def test_lora_out_of_range(changes, message):
    with pytest.raises(UsageError, match=message):
        LoRA(**changes)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_fit_changes_the_adapters_only(pico_dir, tmp_path, gradient_checkpointing):
    module, seen = make_module(pico_dir, gradient_checkpointing=gradient_checkpointing), Snapshot()
    make_trainer(tmp_path, Drop([2]), seen).fit(module, alpaca_data(tmp_path))
    changed = {name for name in seen.before if not torch.equal(seen.before[name], seen.after[name])}
    assert changed
    assert changed <= seen.trainable
    # B starts at zero and every B gets a gradient; A gets one from the second step on.
    assert {name for name in seen.trainable if "lora_B" in name} <= changed
    frozen = AutoModelForCausalLM.from_pretrained(pico_dir)
    assert torch.equal(seen.after["model.base_model.model.lm_head.weight"], frozen.lm_head.weight)


def test_gradient_checkpointing_changes_no_weight(pico_dir, tmp_path):
    after = []
    for on in (False, True):
        pl.seed_everything(1)
        seen = Snapshot()
        module = make_module(pico_dir, gradient_checkpointing=on)
        make_trainer(tmp_path, seen).fit(module, alpaca_data(tmp_path))
        after.append(seen.after)
    for name, value in after[0].items():
        torch.testing.assert_close(value, after[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_rotary_frequencies_are_never_rounded(pico_dir, tmp_path, precision):
    module = make_module(pico_dir, dtype="auto" if precision == "32-true" else "bfloat16")
    make_trainer(tmp_path, precision=precision).fit(module, alpaca_data(tmp_path))
    expected = AutoModelForCausalLM.from_pretrained(pico_dir).model.rotary_emb.inv_freq
    found = dict(module.named_buffers())
    (name,) = (name for name in found if name.endswith("rotary_emb.inv_freq"))
    assert torch.equal(found[name], expected)
    assert not torch.equal(expected.bfloat16().float(), expected)
    assert {p.dtype for n, p in module.named_parameters() if "lora" in n} == {torch.float32}
    weights = {p.dtype for n, p in module.named_parameters() if "lora" not in n}
    assert weights == {torch.float32 if precision == "32-true" else torch.bfloat16}


def test_without_lora_all_weights_train(pico_dir, tmp_path):
    module, seen = make_module(pico_dir, lora=None), Snapshot()
    make_trainer(tmp_path, Drop([0]), checkpointing(tmp_path), seen).fit(module, alpaca_data(tmp_path))
    assert seen.trainable == set(seen.before)
    assert {n for n in seen.before if not torch.equal(seen.before[n], seen.after[n])} == seen.trainable
    assert load_checkpoint(tmp_path / "checkpoints" / "step=2.ckpt")["state_dict"].keys() == seen.trainable
    assert not module.adapted


def test_checkpoint_holds_trainable_weights_and_the_plan_only(pico_dir, tmp_path):
    module, seen = make_module(pico_dir), Snapshot()
    make_trainer(tmp_path, Drop([3]), checkpointing(tmp_path), seen).fit(module, alpaca_data(tmp_path))
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "step=2.ckpt")
    assert checkpoint["state_dict"].keys() == seen.trainable
    assert all(torch.equal(value, seen.after[name]) for name, value in checkpoint["state_dict"].items())
    assert checkpoint["plans"] == [Plan.load(tmp_path / "plan.json").to_json()]


def fit_and_resume(pico_dir, tmp_path, first: list[pl.Callback], second: list[pl.Callback], **changes):
    """Two steps of one epoch each, then new objects that continue from the first step's checkpoint."""
    data = {"rows": 12, "batch_size": 9}  # of 9 training rows
    make_trainer(tmp_path, *first, checkpointing(tmp_path)).fit(make_module(pico_dir), alpaca_data(tmp_path, **data))
    module = make_module(pico_dir, **changes)
    trainer = make_trainer(tmp_path, *second)
    path = tmp_path / "checkpoints" / "step=1.ckpt"
    trainer.fit(module, alpaca_data(tmp_path, **data), ckpt_path=path, weights_only=True)
    return trainer, module


def test_resume_takes_the_plan_on_disk_and_continues(pico_dir, tmp_path):
    whole, resumed, search = Snapshot(), Snapshot(), Drop([1, 2])
    trainer, module = fit_and_resume(pico_dir, tmp_path, [Drop([1, 2]), whole], [search, resumed])
    assert search.searches == 0
    assert [plan.file_text for plan in module.plans] == [(tmp_path / "plan.json").read_text()]
    assert trainer.global_step == 2
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "step=1.ckpt")["state_dict"]
    assert all(torch.equal(resumed.before[name], value) for name, value in checkpoint.items())
    # It goes on with the optimizer's state and the schedule: the same rows give the same second step.
    for name in whole.trainable:
        torch.testing.assert_close(resumed.after[name], whole.after[name], rtol=0, atol=1e-5)


def test_checkpoint_of_another_plan_is_refused(pico_dir, tmp_path):
    (tmp_path / "other").mkdir()
    make_trainer(tmp_path / "other", Drop([4])).fit(make_module(pico_dir), alpaca_data(tmp_path))
    other = Drop([4], plan_path=str(tmp_path / "other" / "plan.json"))
    with pytest.raises(UsageError, match="another plan.*plan_path"):
        fit_and_resume(pico_dir, tmp_path, [Drop([1])], [other])


def test_checkpoint_is_refused_where_the_compression_callback_is_forgotten(pico_dir, tmp_path):
    with pytest.raises(UsageError, match="another plan"):
        fit_and_resume(pico_dir, tmp_path, [Drop([1])], [])


@pytest.mark.parametrize("lora", [None, LoRA(r=2, target_modules=["q_proj"]), LoRA(r=4)])
def test_checkpoint_of_other_trainable_weights_is_refused(pico_dir, tmp_path, lora):
    with pytest.raises(UsageError, match="other weights.*--model.lora"):
        fit_and_resume(pico_dir, tmp_path, [Drop([1])], [Drop([1])], lora=lora)


def test_checkpoint_is_not_loaded_on_top_of_merged_adapters(pico_dir, tmp_path):
    module = make_module(pico_dir)
    trainer = make_trainer(tmp_path, checkpointing(tmp_path))
    trainer.fit(module, alpaca_data(tmp_path))
    trainer.test(module, alpaca_data(tmp_path), verbose=False)  # merges the adapters
    trainer.overwrite = True
    with pytest.raises(UsageError, match="merged into the weights.*new CausalLM"):
        trainer.test(
            module, alpaca_data(tmp_path), ckpt_path=tmp_path / "checkpoints" / "step=1.ckpt", weights_only=True
        )


def test_test_with_a_checkpoint_measures_the_recovered_model(pico_dir, tmp_path):
    seen = Snapshot()
    make_trainer(tmp_path, Drop([1]), checkpointing(tmp_path), seen).fit(make_module(pico_dir), alpaca_data(tmp_path))
    module = make_module(pico_dir)
    path = tmp_path / "checkpoints" / "step=2.ckpt"
    trainer = make_trainer(tmp_path, Drop([1]))
    trainer.test(module, alpaca_data(tmp_path), ckpt_path=path, verbose=False, weights_only=True)
    expected = add_adapters(without(pico_dir, 1), seen.after, scale=8 / 2)
    torch.testing.assert_close(logits_of(module.load_model()), logits_of(expected), rtol=0, atol=1e-5)
    assert not module.adapted


def test_test_writes_results(pico_dir, tmp_path):
    run = tmp_path / "pruned"
    module = make_module(pico_dir)
    make_trainer(run, Drop([0, 1])).test(module, alpaca_data(tmp_path), verbose=False)
    data = json.loads((run / "results.json").read_text())
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    assert data["model"] == {
        "label": "pruned",  # the run directory's name
        "source": str(pico_dir),
        "base": str(pico_dir),
        "num_layers": 4,
        "num_parameters": 2 * 512 * 32 + 32 + 4 * layer,
        "plan_sha256": Plan.load(run / "plan.json").sha256,
        "requested_ratio": None,
        "quantization": None,
    }
    assert data["environment"]["device"] == "cpu"
    assert data["environment"]["dtype"] == "float32"
    assert Results.load(run / "results.json").model.num_layers == 4


def test_dense_results_have_no_plan(pico_dir, tmp_path):
    make_trainer(tmp_path).test(make_module(pico_dir, label="dense"), alpaca_data(tmp_path), verbose=False)
    model = json.loads((tmp_path / "results.json").read_text())["model"]
    assert (model["label"], model["num_layers"], model.get("plan_sha256")) == ("dense", 6, None)


def test_second_test_is_refused_before_any_work_unless_told(pico_dir, tmp_path):
    make_trainer(tmp_path).test(make_module(pico_dir, label="first"), alpaca_data(tmp_path), verbose=False)
    before = (tmp_path / "results.json").read_bytes()
    method, module = Drop([1]), make_module(pico_dir, label="second")
    with pytest.raises(UsageError, match="results.json holds the results of an earlier test. Pass --overwrite"):
        make_trainer(tmp_path, method).test(module, alpaca_data(tmp_path), verbose=False)
    assert (tmp_path / "results.json").read_bytes() == before
    assert method.searches == 0
    assert not (tmp_path / "plan.json").exists()
    make_trainer(tmp_path, method, overwrite=True).test(module, alpaca_data(tmp_path), verbose=False)
    assert Results.load(tmp_path / "results.json").model.label == "second"


def test_failing_hook_leaves_no_results(pico_dir, tmp_path):
    class Broken(pl.Callback):
        def on_test_epoch_end(self, trainer, pl_module):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        make_trainer(tmp_path / "run", Broken()).test(make_module(pico_dir), alpaca_data(tmp_path), verbose=False)
    assert not (tmp_path / "run" / "results.json").exists()


class LearningRates(pl.Callback):
    """The learning rate that each step is made with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(("warmup", "steps", "accumulate"), [(3, 8, 1), (0, 4, 1), (100, 5, 1), (2, 4, 2)])
def test_learning_rate_warms_up_and_decays_linearly(pico_dir, tmp_path, warmup, steps, accumulate):
    rates = LearningRates()
    module = make_module(pico_dir, learning_rate=0.02, warmup_steps=warmup, weight_decay=0.1)
    trainer = make_trainer(tmp_path, rates, max_steps=steps, accumulate_grad_batches=accumulate)
    trainer.fit(module, alpaca_data(tmp_path))
    peak = min(warmup, steps)
    expected = [0.02 * step / peak if step < peak else 0.02 * (steps - step) / (steps - peak) for step in range(steps)]
    assert rates.seen == pytest.approx(expected)
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_validation_loss_counts_every_response_token_the_same(pico_dir, tmp_path):
    data = alpaca_data(tmp_path, rows=24, eval_batch_size=2)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(make_module(pico_dir), data, verbose=False)
    model = AutoModelForCausalLM.from_pretrained(pico_dir)
    total, count, means = 0.0, 0, []
    for example in data.val_examples:  # row by row, without padding
        ids, labels = torch.tensor(example["input_ids"]), example["labels"]
        logp = logits_of(model, ids[None])[0].double().log_softmax(-1)
        losses = [-logp[i - 1, ids[i]].item() for i in range(1, len(ids)) if labels[i] != -100]
        total, count = total + sum(losses), count + len(losses)
        means.append(sum(losses) / len(losses))
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(total / count, abs=1e-5)
    assert abs(sum(means) / len(means) - total / count) > 1e-4  # a mean of rows would be seen


@pytest.mark.parametrize("batching", ["packed", "padded", "grouped"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_loss_is_the_mean_over_the_labels_of_the_step(pico_dir, tmp_path, batching, accumulate):
    """Whatever the micro-batches are: the same gradient as from every example by itself."""

    class Record(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.loss = trainer.logged_metrics["train/loss"].item()
            self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    record, module = Record(), make_module(pico_dir, lora=None)
    data = alpaca_data(tmp_path, batch_size=3, batching=batching)
    trainer = make_trainer(tmp_path, record, max_steps=1, accumulate_grad_batches=accumulate, log_every_n_steps=1)
    trainer.fit(module, data)
    examples = [data.train_examples[i] for slot in data.train_dataloader().sampler.schedule.step(0) for i in slot[0]]
    assert len(examples) == 3 * accumulate
    model = AutoModelForCausalLM.from_pretrained(pico_dir)
    total, count = torch.zeros(()), 0
    for example in examples:
        ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])[1:]
        picked = model(ids[None]).logits[0, :-1].log_softmax(-1)[labels != -100]
        total = total - picked.gather(1, labels[labels != -100][:, None]).sum()
        count += int((labels != -100).sum())
    (total / count).backward()
    assert record.loss == pytest.approx((total / count).item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(record.gradients[f"model.{name}"], p.grad, rtol=1e-4, atol=1e-6)


def test_predict_writes_greedy_completions(pico_dir, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A decoder layer\nDescribe\n")
    module = make_module(pico_dir, max_new_tokens=5)
    make_trainer(tmp_path / "run").predict(module, alpaca_data(tmp_path, prompts=str(prompts)))
    written = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert [row["prompt"] for row in written] == ["A decoder layer", "Describe"]
    model = AutoModelForCausalLM.from_pretrained(pico_dir)
    for row in written:
        ids = torch.tensor([module.tokenizer(row["prompt"]).input_ids])
        start = ids.shape[1]
        for _ in range(5):
            token = logits_of(model, ids)[0, -1].argmax()
            if token == module.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token[None, None]], dim=1)
        assert row["completion"] == module.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_predicting_twice_writes_the_second_time_only(pico_dir, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A decoder layer\n")
    module, trainer = make_module(pico_dir, max_new_tokens=2), make_trainer(tmp_path)
    for _ in range(2):
        trainer.predict(module, alpaca_data(tmp_path, prompts=str(prompts)))
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == 1


def test_unknown_model_is_refused_when_the_module_is_made(tmp_path):
    with pytest.raises(UsageError, match="There is no directory"):
        CausalLM(str(tmp_path / "none"))
