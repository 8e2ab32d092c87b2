"""Writes the compressed model as an ordinary Hugging Face checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks.base import CompressionCallback, EarlyCheck, citations, on_first_rank
from slm_pl import files, sharding
from slm_pl.console import load_example
from slm_pl.errors import UsageError
from slm_pl.export import needs_own_code, save_compressed
from slm_pl.layer_map import load_dense_layers
from slm_pl.loading import DType
from slm_pl.module import CausalLM, may_overwrite
from slm_pl.pictures import load_figures
from slm_pl.quantization import Quantization, require_torchao
from slm_pl.trainer import TrainedCallback, check_checkpoint, previous, read_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ExportCheckpoint(EarlyCheck, TrainedCallback):
    """Exports at the end of ``fit``, LoRA merged; in ``prune``, right after compression.

    LoRA is merged in float32 and rounded to the model's dtype once; ``dtype`` and ``quantization`` come after that. Of
    a model that DeepSpeed's stage 3 has spread over the processes, the first one gathers the weights, one module at a
    time, in its main memory.

    The directory holds safetensors, config, generation config, tokenizer, every ``plan.json`` and a model card. It
    needs nothing but transformers to load, and appears only when it is whole. If the layers differ in width, it brings
    the code that says so to transformers (``trust_remote_code=True``); int8 weights need torchao. Put it below the
    compression callbacks::

        trainer:
          callbacks:
            - class_path: callbacks.SlidingWindowMerging
              init_args: {remove_layers: 6}
            - class_path: callbacks.ExportCheckpoint
              init_args: {output_dir: runs/mine/export}

    Args:
        output_dir: Where the model goes; ``{run}`` in it stands for the run directory, ``trainer.default_root_dir``.
        compressed_dir: In ``fit``, also export the compressed model as it is before training, to measure it by itself.
            A run that goes on from a checkpoint leaves the one that is there. It is in the model's own dtype and never
            quantised.
        weights: After ``fit``, those of the ``best`` checkpoint, if a ModelCheckpoint monitors a figure, or the
            ``last`` ones.
        dtype: Of what is written to ``output_dir``; ``auto`` is the model's.
        quantization: ``int8``: the weights of the linear maps in ``output_dir`` as int8 with torchao, except those of
            the language-model head and of experts. The checkpoint is written twice, so the disk has to hold both.

    Raises:
        UsageError: Before any work, if a directory is not empty and neither ``--overwrite`` nor ``--ckpt_path last``
            was given, or if torchao is needed and missing.
    """

    def __init__(
        self,
        output_dir: str,
        compressed_dir: str | None = None,
        weights: Literal["best", "last"] = "best",
        dtype: DType = "auto",
        quantization: Quantization | None = None,
    ) -> None:
        _check_apart(output_dir, compressed_dir)
        self._given = (output_dir, compressed_dir)
        self.output_dir = output_dir
        self.compressed_dir = compressed_dir
        self.weights = weights
        self.dtype: DType = dtype
        self.quantization: Quantization | None = quantization

    def check(self, trainer: pl.Trainer) -> None:
        """Refuses what would fail at the end, before the search starts."""
        run = str(trainer.default_root_dir)
        output_dir, compressed_dir = self._given
        self.output_dir = output_dir.replace("{run}", run)
        self.compressed_dir = compressed_dir and compressed_dir.replace("{run}", run)
        _check_apart(self.output_dir, self.compressed_dir)
        directories = self._directories(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        module = trainer.lightning_module
        if directories and getattr(module, "streaming", False) and (self.dtype != "auto" or self.quantization):
            raise UsageError(
                "callbacks.ExportCheckpoint was asked for another dtype or for int8, which takes the whole model in "
                "memory, and model.streaming is on. Export it as it is, and change it where there is memory."
            )
        if directories and any(isinstance(c, CompressionCallback) for c in callbacks[callbacks.index(self) :]):
            raise UsageError(
                "callbacks.ExportCheckpoint stands above a compression callback and would export the model before it. "
                "Move it below in trainer.callbacks."
            )
        if directories and self.quantization is not None:
            require_torchao(f"callbacks.ExportCheckpoint with quantization {self.quantization}")
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
            files.check_output_directory(directory, _may_replace(trainer))
            path = Path(directory)
            if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
                raise UsageError(
                    f"{directory} is not empty and not an earlier export (it has no config.json), so --overwrite "
                    "does not replace it. Give another directory, or empty it yourself."
                )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Exports the model between compression and LoRA."""
        assert isinstance(pl_module, CausalLM)
        pl_module.check_run(stage)
        self.check(trainer)
        if getattr(trainer, "pruning", False):
            self._export(trainer, pl_module, pl_module.load_model(), self.output_dir, recovered=False)
        elif pl_module.model is None and sharding.is_sharded(trainer.strategy):
            return  # nothing was compressed here, and no process is to hold the whole model
        elif stage == "fit" and self.compressed_dir in self._directories(trainer):
            assert self.compressed_dir is not None
            self._export(trainer, pl_module, pl_module.load_model(), self.compressed_dir, recovered=False)

    def on_trained(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exports the trained model."""
        assert isinstance(pl_module, CausalLM)
        assert pl_module.model is not None
        if self.weights == "best":
            _load_best(trainer, pl_module)
        if sharding.is_sharded(trainer.strategy):
            assert isinstance(trainer.strategy, DeepSpeedStrategy)
            model = sharding.merged_on_first_rank(pl_module.model, trainer.strategy)
        else:
            model = pl_module.merge_adapters()
        self._export(trainer, pl_module, model, self.output_dir, recovered=True)

    def _directories(self, trainer: pl.Trainer) -> list[str]:
        """What this run writes; nothing in validate, test and predict."""
        if getattr(trainer, "pruning", False):
            return [self.output_dir]
        if trainer.state.fn != TrainerFn.FITTING:
            return []
        made = trainer.ckpt_path is not None and (Path(self.compressed_dir or "") / "config.json").is_file()
        return [self.output_dir, *filter(None, [None if made else self.compressed_dir])]

    def _export(
        self,
        trainer: pl.Trainer,
        pl_module: CausalLM,
        model: "PreTrainedModel | None",
        directory: str,
        recovered: bool,
    ) -> None:
        """Writes the model that the first rank has."""
        tokenizer, plans, overwrite = pl_module.tokenizer, pl_module.plans, _may_replace(trainer)
        source = pl_module.source.directory
        final = directory == self.output_dir
        dtype, quantization = (self.dtype, self.quantization) if final else ("auto", None)

        def write() -> bool:
            assert model is not None
            carried = {} if source is None else load_figures(source, len(plans))
            if recovered:
                pl_module.draw_history()
            figures = {**carried, **pl_module.figures}
            dense_layers = pl_module.dense_layers
            if dense_layers is None and source is not None:
                dense_layers = load_dense_layers(source, plans)
            save_compressed(
                model,
                tokenizer,
                directory,
                plans,
                recovered,
                overwrite,
                figures,
                dtype,
                quantization,
                dense_layers,
                citations(plans),
            )
            return needs_own_code(model)

        own_code = on_first_rank(trainer, write)
        example = load_example(directory, "own code" if own_code else "stock", quantization is not None)
        rank_zero_info(f"Exported to {directory}. Load it with:\n{example}")


def _check_apart(output_dir: str, compressed_dir: str | None) -> None:
    if compressed_dir is not None and (_holds(output_dir, compressed_dir) or _holds(compressed_dir, output_dir)):
        raise UsageError(
            f"output_dir is {output_dir} and compressed_dir is {compressed_dir}; give two directories, neither in the "
            "other."
        )


def _may_replace(trainer: pl.Trainer) -> bool:
    """Whether an export that is there may go; a run that goes on may have been stopped just behind its own."""
    return may_overwrite(trainer) or bool(getattr(trainer, "resuming", False))


def _load_best(trainer: pl.Trainer, pl_module: CausalLM) -> None:
    """Puts the weights of the best checkpoint into the model, on all ranks."""
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
            continue
        path, score = callback.best_model_path, callback.best_model_score
        if not path:
            continue
        places = [Path(path), previous(Path(path))]
        there = on_first_rank(trainer, lambda places=places: [place for place in places if place.exists()])  # type: ignore[misc]
        if not there:
            rank_zero_warn(f"The best checkpoint, {path}, is gone: exporting the last weights instead.")
            continue
        path = there[0]
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            check_checkpoint(path)
            sharding.load_trained(trainer.strategy, path)
        else:
            state = read_checkpoint(path)["state_dict"]
            pl_module.load_state_dict(state, strict=False)
        rank_zero_info(f"Weights of the best checkpoint, {callback.monitor} = {score:.4g}: {path}")
        return


def _holds(outer: str, inner: str) -> bool:
    """Whether ``inner`` is ``outer``, or lies in it."""
    return Path(inner).resolve().is_relative_to(Path(outer).resolve())
