"""Recovery in two real processes: every strategy gives the losses and the weights of one process."""

import contextlib
import json
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from callbacks import ExportCheckpoint
from slm_pl.recovery.adapters import LoRA
from tests.helpers.ranks import under_torchrun
from tests.helpers.run import IDS, Drop, alpaca_data, logits_of, make_module, make_trainer, without

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]

EPOCHS, STEPS = 2, 10
LORA = LoRA(r=2, alpha=8, dropout=0.0)


class StopAt(pl.Callback):
    """Breaks off before an optimizer step, on all ranks."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise InterruptedError


def strategy(name: str):
    """``one``, ``ddp`` or ``deepspeed_N``."""
    if name == "one":
        return "auto"
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    from tests.helpers.deepspeed import CPUDeepSpeedStrategy

    offload = {"offload_optimizer": True, "offload_parameters": "3" in name} if name.endswith("offload") else {}
    return CPUDeepSpeedStrategy(stage=int(name.split("_")[1]), exclude_frozen_parameters=True, **offload)


def recover(
    rank: int,
    directory: str,
    pretrained: str,
    name: str,
    precision: str = "32-true",
    tuning: str = "lora",
    stop_at: int | None = None,
    ckpt_path: str | None = None,
) -> None:
    """Prunes (unless the model is an export), trains, exports; leaves what was logged in ``history.json``."""
    run = Path(directory)
    pl.seed_everything(5, verbose=False)
    checkpoints = ModelCheckpoint(
        run / "checkpoints", filename="{step}", monitor="val/loss", save_top_k=-1, enable_version_counter=False
    )
    options = {"lora": LORA} if tuning == "lora" else {"lora": None, "last_layers": 2}
    dtype = "bfloat16" if precision == "bf16-true" else "float32"
    module = make_module(pretrained, dtype=dtype, gradient_checkpointing=True, **options)
    trainer = make_trainer(
        run,
        *([] if "export" in pretrained else [Drop([1, 3])]),
        StopAt(stop_at),
        ExportCheckpoint(str(run / "export")),
        checkpoints,
        overwrite=True,
        devices=1 if name == "one" else 2,
        strategy=strategy(name),
        precision=precision,
        max_steps=-1,
        max_epochs=EPOCHS,
        limit_val_batches=1.0,
        gradient_clip_val=0.5,
    )
    data = alpaca_data(run.parent / "data", rows=50, batch_size=2, global_batch_size=8, val_size=11)
    with contextlib.suppress(InterruptedError):
        trainer.fit(module, data, ckpt_path=ckpt_path)
    if rank == 0:
        found = {**module.history, "steps": trainer.global_step}
        (run / "history.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def one(pico_dir, tmp_path_factory):
    """The run of one process, for each way of tuning."""
    made: dict[str, Path] = {}

    def get(tuning: str) -> Path:
        if tuning not in made:
            made[tuning] = tmp_path_factory.mktemp("one") / "run"
            made[tuning].mkdir()
            recover(0, str(made[tuning]), str(pico_dir), "one", tuning=tuning)
        return made[tuning]

    return get


def history(run: Path) -> dict:
    return json.loads((run / "history.json").read_text())


def assert_equal_curves(run: Path, other: Path) -> None:
    mine, theirs = history(run), history(other)
    assert mine["steps"] == theirs["steps"] == STEPS
    for key in ("train/loss", "val/loss", "lr"):
        assert [step for step, _ in mine[key]] == [step for step, _ in theirs[key]]
        assert [value for _, value in mine[key]] == pytest.approx([value for _, value in theirs[key]], rel=1e-4), key
    assert theirs["train/loss"][0][1] > 1.03 * theirs["train/loss"][-1][1]  # it learnt something


@pytest.mark.parametrize(
    ("name", "tuning"),
    [
        ("ddp", "lora"),
        ("deepspeed_1", "lora"),
        ("deepspeed_2", "lora"),
        ("deepspeed_2_offload", "last_layers"),
        ("deepspeed_3", "lora"),
        ("deepspeed_3_offload", "last_layers"),
    ],
)
def test_two_processes_give_the_losses_of_one(one, pico_dir, tmp_path, name, tuning):
    if name.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is an optional dependency")
    run = tmp_path / "run"
    run.mkdir()
    under_torchrun(partial(recover, pretrained=str(pico_dir), name=name, tuning=tuning), run)
    assert_equal_curves(run, one(tuning))
    mine, theirs = (load_file(path / "export" / "model.safetensors") for path in (run, one(tuning)))
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-4)
    assert logits_of(AutoModelForCausalLM.from_pretrained(run / "export"), IDS).isfinite().all()
    dense = AutoModelForCausalLM.from_pretrained(pico_dir).state_dict()
    assert any(not torch.equal(mine[key], dense[key]) for key in mine if "layers.0." in key) == (tuning == "lora")


@pytest.mark.parametrize("name", ["deepspeed_2", "deepspeed_3"])
def test_resume_from_an_export_and_a_directory_of_parts(one, tmp_path, pico_dir, name):
    """From the pruned export, which stage 3 loads in parts; stopped after an epoch and gone on with."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is an optional dependency")
    export = tmp_path / "export"
    make_trainer(tmp_path / "prune", Drop([1, 3]), ExportCheckpoint(str(export))).prune(
        make_module(pico_dir), alpaca_data(tmp_path / "data")
    )
    run = tmp_path / "run"
    run.mkdir()
    started = partial(recover, pretrained=str(export), name=name)
    under_torchrun(partial(started, stop_at=STEPS // 2), run)
    assert not (run / "export").exists()
    checkpoint = run / "checkpoints" / f"step={STEPS // 2}.ckpt"
    assert checkpoint.is_dir()
    for states in checkpoint.rglob("*model_states.pt"):
        names = torch.load(states, weights_only=False)["module"]
        assert all("lora_" in name for name in names), "the frozen base is none of a checkpoint's business"
    under_torchrun(partial(started, ckpt_path=str(checkpoint)), run)
    assert_equal_curves(run, one("lora"))


@pytest.mark.parametrize(("name", "stage"), [("deepspeed_2", "prune"), ("deepspeed_2", "validate")])
def test_other_stages_under_deepspeed(pico_dir, tmp_path, name, stage):
    pytest.importorskip("deepspeed", reason="DeepSpeed is an optional dependency")
    (tmp_path / "run").mkdir()
    under_torchrun(partial(another_stage, pretrained=str(pico_dir), name=name, stage=stage), tmp_path / "run")
    if stage == "prune":
        export = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
        torch.testing.assert_close(logits_of(export), logits_of(without(pico_dir, 1, 3)), rtol=0, atol=1e-5)
    else:
        data = alpaca_data(tmp_path / "data")
        trainer = make_trainer(tmp_path / "one", Drop([1, 3]), limit_val_batches=1.0)
        trainer.validate(make_module(pico_dir), data, verbose=False)
        expected = trainer.callback_metrics["val/loss"].item()
        assert json.loads((tmp_path / "run" / "loss.json").read_text()) == pytest.approx(expected, rel=1e-5)


def another_stage(rank: int, directory: str, pretrained: str, name: str, stage: str) -> None:
    run = Path(directory)
    hooks = [Drop([1, 3]), *([ExportCheckpoint(str(run / "export"))] if stage == "prune" else [])]
    trainer = make_trainer(run, *hooks, devices=2, strategy=strategy(name), limit_val_batches=1.0)
    getattr(trainer, stage)(make_module(pretrained), datamodule=alpaca_data(run.parent / "data"))
    if rank == 0 and stage == "validate":
        (run / "loss.json").write_text(json.dumps(trainer.callback_metrics["val/loss"].item()))


@pytest.mark.parametrize("name", ["ddp", "deepspeed_2", "deepspeed_3"])
def test_bf16_true_trains(pico_dir, tmp_path, name):
    if name.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is an optional dependency")
    run = tmp_path / "run"
    run.mkdir()
    under_torchrun(partial(recover, pretrained=str(pico_dir), name=name, precision="bf16-true"), run)
    found = history(run)
    losses = [loss for _, loss in found["train/loss"]]
    assert losses[-1] < losses[0]
    assert found["val/loss"][-1][1] < found["val/loss"][0][1]
    assert {v.dtype for v in load_file(run / "export" / "model.safetensors").values()} == {torch.bfloat16}
