"""Writes the compressed model as an ordinary Hugging Face checkpoint."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.base import CompressionCallback, EarlyCheck, on_first_rank
from slm_pl import files
from slm_pl.console import load_example
from slm_pl.errors import UsageError
from slm_pl.export import needs_own_code, save_compressed
from slm_pl.module import CausalLM, may_overwrite
from slm_pl.pictures import load_figures


class ExportCheckpoint(EarlyCheck):
    """Exports at the end of ``fit``, LoRA merged; in ``prune``, right after compression.

    The directory holds safetensors, config, generation config, tokenizer, every ``plan.json`` and a model card. It
    needs nothing but transformers to load, and appears only when it is whole. If the layers differ in width, it brings
    the code that says so to transformers (``trust_remote_code=True``). Put it below the compression callbacks::

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
        if compressed_dir is not None and (_holds(output_dir, compressed_dir) or _holds(compressed_dir, output_dir)):
            raise UsageError(
                f"output_dir is {output_dir} and compressed_dir is {compressed_dir}; give two "
                "directories, neither in the other."
            )
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
        if directories and _is_sharded(trainer.strategy):
            raise UsageError(
                f"{type(trainer.strategy).__name__} shards the weights, and the export does not gather them yet. "
                "Use ddp or DeepSpeed stage 1 or 2, or remove callbacks.ExportCheckpoint."
            )
        on_first_rank(trainer, lambda: self._check_directories(trainer, directories))

    def _check_directories(self, trainer: pl.Trainer, directories: list[str]) -> None:
        checkpoints = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        for directory in directories:
            for own in map(str, (trainer.default_root_dir, *checkpoints)):
                if _holds(directory, own):
                    raise UsageError(
                        f"The export directory {directory} holds {own}, where this run keeps its own files. Give a "
                        f"directory of its own, such as {Path(own) / 'export'}."
                    )
            files.check_output_directory(directory, may_overwrite(trainer))
            path = Path(directory)
            if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
                raise UsageError(
                    f"{directory} is not empty and not an earlier export (it has no config.json), so --overwrite "
                    "does not replace it. Give another directory, or empty it yourself."
                )

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
        tokenizer, plans, overwrite = pl_module.tokenizer, pl_module.plans, may_overwrite(trainer)
        source = pl_module.source.directory

        def write() -> None:
            carried = {} if source is None else load_figures(source, len(plans))
            figures = {**carried, **pl_module.figures}
            save_compressed(model, tokenizer, directory, plans, recovered, overwrite, figures)

        on_first_rank(trainer, write)
        rank_zero_info(f"Exported to {directory}. Load it with:\n{load_example(directory, needs_own_code(model))}")


def _holds(outer: str, inner: str) -> bool:
    """Whether ``inner`` is ``outer``, or lies in it."""
    return Path(inner).resolve().is_relative_to(Path(outer).resolve())


def _is_sharded(strategy: Strategy) -> bool:
    """Whether each process holds only a part of every weight during training."""
    if isinstance(strategy, DeepSpeedStrategy):
        return strategy.zero_stage_3
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
