"""What several models write to the same prompts, as a hook of ``predict``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from callbacks.base import EarlyCheck, on_first_rank
from slm_pl import files, loading
from slm_pl.compression.plan import count_parameters, load_plans
from slm_pl.console import progress
from slm_pl.data.prompts import Prompt
from slm_pl.errors import UsageError
from slm_pl.evaluation.generation import Examples, GenerationProtocol, ModelCompletions, complete, markdown, to_json
from slm_pl.module import CausalLM


@dataclass(frozen=True)
class _Other:
    """A model beside the run's own."""

    label: str
    source: loading.Source
    plan_sha256: str | None


class GenerationExamples(EarlyCheck):
    """Writes the completions of several models side by side: ``examples.md`` and ``examples.json``.

    The first column is the model of the run, under the module's ``label`` or the run directory's name. Then each of
    ``models`` completes the same prompts, loaded one at a time in the same precision::

        - class_path: callbacks.GenerationExamples
          init_args:
            models: {pruned: runs/quickstart/pruned/export, recovered: runs/quickstart/recovered/export}

    The prompts are those of ``data.prompts``. Acts in ``predict`` only.

    Args:
        models: What else to compare: a column's label and a Hub id, a directory, a ``.gguf`` file or
            ``package:NAME/FILE.gguf``; null for the run's own model only.

    Raises:
        UsageError: If two columns have one label, or, before any work, if a model is not there.
    """

    def __init__(self, models: dict[str, str] | None = None) -> None:
        labels = [label.strip() for label in models or {}]
        if "" in labels:
            raise UsageError("GenerationExamples got a model with an empty label. Give every model a name.")
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise UsageError(f"GenerationExamples got two models with the label {twice[0]!r}. Rename one of them.")
        self.models = models
        self._others: list[_Other] = []

    def check(self, trainer: pl.Trainer) -> None:
        """Refuses, before any work, a label that is taken and a model that is not there."""
        if trainer.state.fn != TrainerFn.PREDICTING or getattr(trainer, "pruning", False):
            return
        module = trainer.lightning_module
        assert isinstance(module, CausalLM)
        self._others = on_first_rank(trainer, lambda: self._find(_label(trainer, module), module))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the models; where a compression callback stands above, it has made this check already."""
        self.check(trainer)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets the other models complete the prompts, on the first rank, and writes the table."""
        assert isinstance(pl_module, CausalLM)
        on_first_rank(trainer, lambda: self._write(trainer, pl_module))
        rank_zero_info(f"Examples: {Path(trainer.default_root_dir) / 'examples.md'}")

    def _find(self, own: str, module: CausalLM) -> list[_Other]:
        others = []
        for label, pretrained in (self.models or {}).items():
            if label.strip() == own.strip():
                raise UsageError(
                    f"GenerationExamples got a model with the label {label!r}, which is the run's own model's. Rename "
                    "it, or give --model.label."
                )
            try:
                source = loading.resolve(pretrained, trust_remote_code=module.source.trust_remote_code)
                loading.load_tokenizer(source)  # what is meant as a path may look like a Hub id
                plans = [] if source.directory is None else load_plans(source.directory)
            except UsageError as error:
                raise UsageError(f"GenerationExamples cannot use the model {label!r}: {error}") from error
            others.append(_Other(label, source, plans[-1].sha256 if plans else None))
        return others

    def _write(self, trainer: pl.Trainer, module: CausalLM) -> None:
        assert module.model is not None
        prompts = tuple(
            Prompt(prompt=row["prompt"], instruction=row.get("instruction", ""), input=row.get("input", ""))
            for row in module.predictions
        )
        own = ModelCompletions(
            label=_label(trainer, module),
            source=module.pretrained,
            # Adapters count as merged, which is how they are exported.
            num_parameters=sum(p.numel() for name, p in module.model.named_parameters() if ".lora_" not in name),
            plan_sha256=module.plans[-1].sha256 if module.plans else None,
            completions=tuple(row["completion"] for row in module.predictions),
        )
        dtype = str(module.load_model().dtype).removeprefix("torch.")
        others = _complete_all(trainer, module, self._others, prompts, dtype) if self._others else []
        protocol = GenerationProtocol(module.max_new_tokens, dtype, str(trainer.precision))
        examples = Examples(protocol, prompts, (own, *others))
        run = Path(trainer.default_root_dir)
        files.write_text(run / "examples.json", to_json(examples))
        files.write_text(run / "examples.md", markdown(examples))


def _label(trainer: pl.Trainer, module: CausalLM) -> str:
    return module.label or Path(trainer.default_root_dir).name


def _complete_all(
    trainer: pl.Trainer, module: CausalLM, others: list[_Other], prompts: tuple[Prompt, ...], dtype: str
) -> list[ModelCompletions]:
    """Completes the prompts with one model after the other; no two are in memory."""
    columns = []
    with progress("Completing prompts", total=len(others) * len(prompts)) as advance:
        for other in others:
            columns.append(_complete_with(trainer, module, other, prompts, dtype, advance))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return columns


def _complete_with(
    trainer: pl.Trainer,
    module: CausalLM,
    other: _Other,
    prompts: tuple[Prompt, ...],
    dtype: str,
    advance: Callable[[str], None],
) -> ModelCompletions:
    """Loads a model as the run's own was, and completes the prompts; the model is gone when this returns."""
    tokenizer = loading.load_tokenizer(other.source)
    model = loading.load_model(
        other.source, cast(loading.DType, dtype), module.attn_implementation, module.quantization
    )
    nn.Module.to(trainer.precision_plugin.convert_module(model), trainer.strategy.root_device)
    completions = []
    for prompt in prompts:
        with trainer.precision_plugin.predict_step_context():
            completions.append(complete(model, tokenizer, prompt["prompt"], module.max_new_tokens))
        advance(other.label)
    return ModelCompletions(
        other.label, other.source.pretrained, count_parameters(model), other.plan_sha256, tuple(completions)
    )
