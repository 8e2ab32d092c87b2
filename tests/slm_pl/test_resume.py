"""A run that goes on from a checkpoint is the run that was never stopped, bit for bit."""

import contextlib
import hashlib
import random
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from slm_pl.errors import UsageError
from slm_pl.recovery.adapters import LoRA
from tests.helpers.run import Drop, Snapshot, alpaca_data, make_module, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 3


class Record(pl.Callback):
    """What every micro-batch held, and what was logged after every optimizer step."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, str]] = []
        self.losses: dict[int, float] = {}
        self.validations: dict[int, float] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((trainer.global_step, hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.losses[trainer.global_step] = pl_module.history["train/loss"][-1][1]

    def on_validation_end(self, trainer, pl_module):
        self.validations[trainer.global_step] = trainer.callback_metrics["val/loss"].item()


def fit(pico_dir, run: Path, *callbacks: pl.Callback, ckpt_path: Path | None = None, **data: object):
    """Three epochs of four steps of two micro-batches, with dropout, validation after every third and last step."""
    pl.seed_everything(11, verbose=False)
    module = make_module(pico_dir, lora=LoRA(r=2, alpha=8, dropout=0.3), warmup_steps=3)
    trainer = make_trainer(
        run, Drop([1, 3]), *callbacks, max_steps=-1, max_epochs=EPOCHS, val_check_interval=6, limit_val_batches=1.0
    )
    settings = {"rows": 20, "batch_size": 2, "global_batch_size": 4, **data}
    trainer.fit(module, alpaca_data(run, **settings), ckpt_path=ckpt_path, weights_only=True)  # type: ignore[arg-type]
    return module


@pytest.fixture(scope="module")
def whole(pico_dir, tmp_path_factory):
    """An uninterrupted run that keeps a checkpoint of every step and every validation."""
    run = tmp_path_factory.mktemp("whole")
    record, seen = Record(), Snapshot()
    steps = ModelCheckpoint(run / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    best = ModelCheckpoint(run / "best", filename="val-{step}", monitor="val/loss", save_top_k=-1)
    module = fit(pico_dir, run, record, seen, steps, best)
    assert len(record.losses) == 12
    return run, record, seen, module


@pytest.mark.parametrize("name", [*(f"steps/step={n}" for n in (1, 3, 4, 8, 11)), "best/val-step=3", "best/val-step=7"])
def test_resumed_run_is_the_uninterrupted_one(pico_dir, whole, tmp_path, name):
    run, record, seen, module = whole
    (tmp_path / "plan.json").write_bytes((run / "plan.json").read_bytes())
    again, after = Record(), Snapshot()
    resumed = fit(pico_dir, tmp_path, again, after, ckpt_path=run / f"{name}.ckpt")
    done = int(name.rpartition("=")[2])
    assert again.batches == [batch for batch in record.batches if batch[0] >= done]
    assert again.losses == {step: loss for step, loss in record.losses.items() if step > done}
    for key in seen.trainable:
        assert torch.equal(after.after[key], seen.after[key]), key
    assert resumed.history["train/loss"] == module.history["train/loss"]
    assert resumed.history["lr"] == module.history["lr"]
    # A checkpoint of the step itself is from before the validation behind it, which is made up for.
    first = done + 1 if name.startswith("best") else done
    assert again.validations == {step: loss for step, loss in record.validations.items() if step >= first}
    assert resumed.history == module.history


def test_dropout_was_on(pico_dir, whole, tmp_path):
    """Else the test above would not see whether its random numbers are those of the step."""
    pl.seed_everything(12, verbose=False)
    record = Record()
    module = make_module(pico_dir, lora=LoRA(r=2, alpha=8, dropout=0.3), warmup_steps=3)
    data = alpaca_data(tmp_path, rows=20, batch_size=2, global_batch_size=4)
    trainer = make_trainer(tmp_path, Drop([1, 3]), record, max_steps=-1, max_epochs=1)
    trainer.fit(module, data)
    assert record.batches == whole[1].batches[: len(record.batches)]
    assert record.losses[1] == whole[1].losses[1]  # B is zero until the first step
    assert record.losses[3] != whole[1].losses[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "data.seed = 1, this run has 2"),
        ({"global_batch_size": 6}, "data.global_batch_size = 4, this run has 6"),
        ({"batch_size": 1}, "micro-batches of a step = 2, this run has 4"),
        ({"batching": "padded"}, "data.batching = 'packed', this run has 'padded'"),
        ({"rows": 24}, "the number of training examples = 15, this run has 18"),
        ({"cutoff": 200}, "the fingerprint of its tokens = "),
    ],
)
def test_other_batches_are_refused(pico_dir, whole, tmp_path, changes, message):
    (tmp_path / "plan.json").write_bytes((whole[0] / "plan.json").read_bytes())
    with pytest.raises(UsageError, match=message):
        fit(pico_dir, tmp_path, ckpt_path=whole[0] / "steps" / "step=3.ckpt", **changes)


class StopAt(pl.Callback):
    """Breaks off at an optimizer step, or at the first validation from it on."""

    def __init__(self, step: int, validating: bool) -> None:
        self.step, self.validating = step, validating

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.validating and trainer.global_step >= self.step:
            raise InterruptedError

    def on_validation_start(self, trainer, pl_module):
        if self.validating and trainer.global_step >= self.step:
            raise InterruptedError


@pytest.mark.parametrize("seed", [0, 3, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 8))])
def test_stopped_again_and_again(pico_dir, whole, tmp_path, seed):
    """A checkpoint of a run that went on is as good as one of a run that did not, also at the end of an epoch."""
    generator, done = random.Random(seed), 0
    while done < 12:
        stop = StopAt(done + generator.randint(1, 6), generator.random() < 0.5)
        last = ModelCheckpoint(
            tmp_path / "checkpoints",
            filename="{step}",
            every_n_train_steps=1,
            save_last=True,
            enable_version_counter=False,
        )
        best = ModelCheckpoint(
            tmp_path / "checkpoints", filename="best", monitor="val/loss", enable_version_counter=False
        )
        newest = max((tmp_path / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns, default=None)
        with contextlib.suppress(InterruptedError):
            fit(pico_dir, tmp_path, stop, last, best, ckpt_path=newest)
            break
        done = torch.load(last.last_model_path, weights_only=True)["global_step"]
    module = fit(pico_dir, tmp_path, last, best, ckpt_path=Path(last.last_model_path))
    assert module.history == whole[3].history
    whole_best = [value for _, value in module.history["val/loss"]]
    assert best.best_model_score.item() == pytest.approx(min(whole_best))
    state = torch.load(last.last_model_path, weights_only=True)["state_dict"]
    for key in whole[2].trainable:
        assert torch.equal(state[key], whole[2].after[key]), key
