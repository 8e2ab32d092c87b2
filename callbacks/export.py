"""Writes the compressed model as an ordinary Hugging Face checkpoint."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.base import CompressionCallback, EarlyCheck
from slm_pl import files
from slm_pl.console import LOAD_EXAMPLE
from slm_pl.errors import UsageError
from slm_pl.export import save_compressed
from slm_pl.module import CausalLM, may_overwrite


class ExportCheckpoint(EarlyCheck):
    """Exports at the end of ``fit``, LoRA merged; in ``prune``, right after compression.

    The directory holds safetensors, config, generation config, tokenizer, every ``plan.json`` and a model card. It
    needs nothing but transformers to load, and appears only when it is whole. Put it below the compression callbacks::

        trainer:
          callbacks:
            - class_path: callbacks.SlidingWindowMerging
              init_args: {remove_layers: 6}
            - class_path: callbacks.ExportCheckpoint
              init_args: {output_dir: runs/mine/export}

    Args:
        output_dir: Where the model goes.
        compressed_dir: In ``fit``, also export the compressed model as it is before training, to measure it by itself.

    Raises:
        UsageError: Before any work, if a directory is not empty and ``--overwrite`` was not given.
    """

    def __init__(self, output_dir: str, compressed_dir: str | None = None) -> None:
        if compressed_dir is not None and Path(compressed_dir).resolve() == Path(output_dir).resolve():
            raise UsageError(f"output_dir and compressed_dir are both {output_dir}; give two directories.")
        self.output_dir = output_dir
        self.compressed_dir = compressed_dir

    def check(self, trainer: pl.Trainer) -> None:
        """Refuses what would fail at the end, before the search starts."""
        directories = self._directories(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if directories and any(isinstance(c, CompressionCallback) for c in callbacks[callbacks.index(self) :]):
            raise UsageError(
                "callbacks.ExportCheckpoint stands above a compression callback and would export the model before it. "
                "Move it below in trainer.callbacks."
            )
        if not trainer.is_global_zero:
            return
        for directory in directories:
            files.check_output_directory(directory, may_overwrite(trainer))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Exports the model between compression and LoRA."""
        self.check(trainer)
        if getattr(trainer, "pruning", False):
            self._export(trainer, pl_module, self.output_dir, recovered=False)
        elif stage == "fit" and self.compressed_dir is not None:
            self._export(trainer, pl_module, self.compressed_dir, recovered=False)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exports the trained model."""
        self._export(trainer, pl_module, self.output_dir, recovered=True)

    def _directories(self, trainer: pl.Trainer) -> list[str]:
        """What this run writes; nothing in validate, test and predict."""
        if getattr(trainer, "pruning", False):
            return [self.output_dir]
        if trainer.state.fn != TrainerFn.FITTING:
            return []
        return [self.output_dir, *filter(None, [self.compressed_dir])]

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule, directory: str, recovered: bool) -> None:
        assert isinstance(pl_module, CausalLM)
        model = pl_module.merge_adapters() if recovered else pl_module.load_model()
        if trainer.is_global_zero:
            path = save_compressed(
                model, pl_module.tokenizer, directory, pl_module.plans, recovered, may_overwrite(trainer)
            )
            rank_zero_info(f"Exported to {path}. Load it with:\n{LOAD_EXAMPLE.format(path=path)}")
        trainer.strategy.barrier("export")
