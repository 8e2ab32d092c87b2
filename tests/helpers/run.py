"""Real Lightning runs on pico models."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from callbacks import CompressionCallback
from slm_pl.compression.plan import DropLayers, Plan
from slm_pl.data import AlpacaDataModule, CalibrationSet, CalibrationText
from slm_pl.module import CausalLM
from slm_pl.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IDS = torch.arange(3, 45).reshape(2, 21) * 7 % 512
"""Token ids to compare logits on."""


class Drop(CompressionCallback):
    """The simplest method: it drops the given layers, and counts how often it was asked to decide."""

    def __init__(self, layers: list[int], plan_path: str | None = None) -> None:
        super().__init__(plan_path)
        self.layers = layers
        self.searches = 0

    def plan(self, model: "PreTrainedModel", calibration: CalibrationSet) -> Plan:
        self.searches += 1
        return self.make_plan(model, calibration, [DropLayers(tuple(self.layers))], [], {})


class Snapshot(pl.Callback):
    """Keeps copies of all parameters, and which of them train, from before and after the training loop."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.trainable = {name for name, p in pl_module.named_parameters() if p.requires_grad}
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def alpaca_data(directory: Path, rows: int = 12, **options: object) -> AlpacaDataModule:
    """Instruction rows and calibration ids in files of ``directory``; a quarter of the rows are for validation."""
    directory.mkdir(parents=True, exist_ok=True)
    path, calibration = directory / "alpaca.jsonl", directory / "calibration.json"
    path.write_text(
        "".join(
            json.dumps({"instruction": f"Count to {n}", "input": "", "output": "so many tokens " * (n % 4 + 1)}) + "\n"
            for n in range(rows)
        )
    )
    calibration.write_text(json.dumps(IDS.tolist()))
    settings = {"batch_size": 2, "eval_batch_size": 2, "val_size": rows // 4, "seed": 1, **options}
    return AlpacaDataModule(str(path), CalibrationText(str(calibration)), **settings)  # type: ignore[arg-type]


def make_trainer(run: Path, *callbacks: pl.Callback, overwrite: bool = False, **options: object) -> Trainer:
    """A quiet trainer on one CPU, two steps unless told otherwise."""
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": str(run),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "max_steps": 2,
        **options,
    }
    trainer = Trainer(callbacks=list(callbacks), **settings)  # type: ignore[arg-type]
    trainer.overwrite = overwrite
    return trainer


def make_module(pretrained: Path | str, **options: object) -> CausalLM:
    """A module that learns fast enough for two steps to show, without dropout."""
    from slm_pl.module import LoRA

    settings = {"lora": LoRA(r=2, alpha=8, dropout=0.0), "learning_rate": 1e-2, "warmup_steps": 1, **options}
    return CausalLM(str(pretrained), **settings)  # type: ignore[arg-type]


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits of a causal language model in eval mode."""
    return model.eval()(input_ids=ids).logits


def without(directory: Path, *gone: int) -> "PreTrainedModel":
    """The model of a directory with these layers left out, made without this project's surgery."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i not in gone)
    model.config.num_hidden_layers = len(model.model.layers)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    return model


@torch.no_grad()
def add_adapters(model: torch.nn.Module, weights: dict[str, torch.Tensor], scale: float) -> torch.nn.Module:
    """Adds scale · B A to every weight that has adapters among ``weights``, in place."""
    found = 0
    for name, a in weights.items():
        if "lora_A" in name:
            target = name.removeprefix("model.base_model.model.").partition(".lora_A")[0]
            b = weights[name.replace("lora_A", "lora_B")]
            assert b.abs().max() > 0, "an untrained adapter shows nothing"
            model.get_submodule(target).weight += scale * (b @ a)
            found += 1
    assert found
    return model
