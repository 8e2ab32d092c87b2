"""The LightningModule around a (compressed) causal language model."""

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from slm_pl import files, loading
from slm_pl.compression.architecture import num_layers
from slm_pl.compression.plan import Plan, count_parameters, load_plans
from slm_pl.errors import UsageError
from slm_pl.evaluation.generation import complete
from slm_pl.results import Environment, ModelIdentity, Results

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (arXiv 2106.09685); the defaults are those of the published recovery recipe.

    Attributes:
        r: Rank.
        alpha: The update is scaled by ``alpha / r``.
        dropout: On the input of the low-rank path.
        target_modules: Names of the linear maps to adapt; null for all projections of the decoder layers.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        """Refuses values PEFT would fail on later."""
        if self.r < 1:
            raise UsageError(f"lora.r is {self.r}; give a rank of at least 1 (published: 8), or lora: null.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"lora.dropout is {self.dropout}; give a probability in [0, 1) (published: 0.05).")


class CausalLM(pl.LightningModule):
    """A causal language model that is compressed, recovered and measured.

    Compression callbacks change the model before :meth:`setup` wraps it in LoRA. ``fit`` trains on the response tokens
    with AdamW and a linear warm-up and decay, as the published recovery recipe does (learning rate 1e-4, 100 warm-up
    steps, LoRA r 8, alpha 16). ``test`` measures nothing by itself: the hooks do, and this module writes their figures
    to ``results.json`` in the run directory.

    Args:
        pretrained: A Hub id, a directory, a ``.gguf`` file, or ``package:NAME/FILE.gguf``.
        revision: Commit, branch or tag of a Hub model.
        dtype: In which the weights are loaded; ``auto`` is the checkpoint's.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, …; null lets transformers choose.
        trust_remote_code: Run Python code that the checkpoint brings along. Off unless you have read that code.
        lora: Adapter settings, or null to train all weights.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's.
        warmup_steps: Optimizer steps of linear warm-up.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        label: Name in results and comparisons; null takes the run directory's name.
        max_new_tokens: Length of the completions that ``predict`` writes.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        dtype: loading.DType = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        lora: LoRA | None = LoRA(),  # noqa: B008  frozen
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        gradient_checkpointing: bool = False,
        label: str | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold the trainable weights only
        self.pretrained = pretrained
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.lora = lora
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.gradient_checkpointing = gradient_checkpointing
        self.label = label
        self.max_new_tokens = max_new_tokens
        self.source = loading.resolve(pretrained, revision, trust_remote_code)
        self.plans: list[Plan] = [] if self.source.directory is None else load_plans(self.source.directory)
        self.figures: dict[str, bytes] = {}
        """Files that go with an export and its model card, by name: what was seen of the model before compression."""
        self.results: Results | None = None
        self.predictions: list[dict[str, str]] = []
        self.model: PreTrainedModel | PeftModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._merged = False

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = loading.load_tokenizer(self.source)
        return self._tokenizer

    def load_model(self) -> "PreTrainedModel":
        """The Hugging Face model, loaded on first use; compression callbacks work on it before LoRA wraps it."""
        if self.model is None:
            self.model = loading.load_model(self.source, self.dtype_name, self.attn_implementation)
        return cast("PreTrainedModel", self.model)

    def check_run(self, stage: str) -> None:
        """Refuses, before any work, a run whose results would replace those of an earlier one.

        Raises:
            UsageError: If there are results in the run directory and ``--overwrite`` was not given.
        """
        path = results_file(self.trainer)
        if stage == "test" and path.exists() and not may_overwrite(self.trainer):
            raise UsageError(
                f"{path} holds the results of an earlier test. Pass --overwrite to replace them, or another "
                "--trainer.default_root_dir."
            )

    def setup(self, stage: str) -> None:
        """Wraps the model for training; without a checkpoint the other stages need no adapter."""
        self.check_run(stage)
        model = self.load_model()
        if stage != "fit" and self.trainer.ckpt_path is None:
            return
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.lora is None or self.adapted:
            model.train()
            return
        from peft import LoraConfig, get_peft_model

        from slm_pl.compression.architecture import lora_targets

        targets = self.lora.target_modules or lora_targets(model)
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        if unknown := sorted(set(targets) - names):
            raise UsageError(
                f"lora.target_modules names {unknown}, which the model does not have. Its projections are "
                f"{lora_targets(model)}."
            )
        config = LoraConfig(
            r=self.lora.r,
            lora_alpha=self.lora.alpha,
            lora_dropout=self.lora.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
            # What a layer lost whole has nothing to adapt.
            exclude_modules=_without_entries(model) or None,
        )
        # Adapters are kept in fp32, where small updates are not rounded away, unless the run is in 16 bit as a whole:
        # an adapter in fp32 among 16-bit parameters would stop DeepSpeed.
        full = self.trainer.precision not in ("bf16-true", "16-true")
        self.model = cast("PeftModel", get_peft_model(model, config, autocast_adapter_dtype=full))
        self.model.train()  # from_pretrained gives it in eval mode
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = count_parameters(self.model)
        rank_zero_info(f"LoRA r={self.lora.r}: {trainable / 1e6:,.2f} M of {total / 1e6:,.1f} M parameters are trained")

    @property
    def adapted(self) -> bool:
        """Whether the model carries adapters that are not merged into it."""
        return self.model is not None and hasattr(self.model, "peft_config")

    def merge_adapters(self) -> "PreTrainedModel":
        """Adds the adapters to the weights and removes them; returns the plain Hugging Face model."""
        if self.adapted:
            self.model = cast("PeftModel", self.model).merge_and_unload()
            self._merged = True
        return self.load_model()

    def forward(self, **inputs: Tensor) -> Tensor:
        """Returns the loss on ``labels``, where -100 marks tokens that do not count."""
        assert self.model is not None
        return self.model(**inputs).loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss on the response tokens."""
        loss = self(**batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss on the response tokens of held-out rows, each token counting the same."""
        counted = int((batch["labels"][:, 1:] != -100).sum())
        self.log("val/loss", self(**batch), prog_bar=True, batch_size=counted, sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Nothing: the test hooks measure."""

    def predict_step(self, batch: dict[str, str], batch_idx: int) -> dict[str, str]:
        """Completes a prompt greedily.

        Returns:
            The batch and ``completion``.
        """
        assert self.model is not None
        completion = complete(self.model, self.tokenizer, batch["prompt"], self.max_new_tokens)
        self.predictions.append({**batch, "completion": completion})
        return self.predictions[-1]

    def on_predict_start(self) -> None:
        """Forgets the completions of an earlier run."""
        self.predictions = []

    def on_predict_epoch_end(self) -> None:
        """Writes ``predictions.json``, with the completions of all ranks in the order of the prompts."""
        parts = [self.predictions]
        if dist.is_available() and dist.is_initialized():
            parts = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, self.predictions)
        # Lightning deals the prompts out in turn.
        self.predictions = [p for turn in zip_longest(*parts) for p in turn if p is not None]
        if self.trainer.is_global_zero and self.predictions:
            path = Path(self.trainer.default_root_dir) / "predictions.json"
            files.write_text(path, json.dumps(self.predictions, indent=1, ensure_ascii=False) + "\n")
            rank_zero_info(f"Completions: {path}")

    def configure_optimizers(self) -> "OptimizerLRSchedulerConfig":
        """AdamW with a linear warm-up and a linear decay to zero."""
        from transformers import get_linear_schedule_with_warmup

        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.learning_rate, weight_decay=self.weight_decay)
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UsageError(
                "The learning rate falls to zero over the run, and this one has no end. Set trainer.max_steps or "
                "trainer.max_epochs."
            )
        steps = int(total)
        scheduler = get_linear_schedule_with_warmup(optimizer, min(self.warmup_steps, steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trainable weights and the plans; the frozen base is read again from ``pretrained``."""
        trainable = self._trainable_shapes()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint["plans"] = [plan.to_json() for plan in self.plans]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that belongs to another model; loading, which is not strict, would pass over it.

        Raises:
            UsageError: If other plans were applied, or other weights were trained.
        """
        if checkpoint.get("plans") != [plan.to_json() for plan in self.plans]:
            raise UsageError(
                "The checkpoint was trained on a model that another plan had compressed. Resume with the compression "
                "callbacks and the plan.json (plan_path) of the run that wrote it, or start anew without --ckpt_path."
            )
        if self._merged:
            raise UsageError(
                "The adapters were merged into the weights, so a checkpoint of adapters cannot be loaded any more. "
                "Load it into a new CausalLM."
            )
        weights = checkpoint.get("state_dict")  # DeepSpeed keeps them in files of its own
        if weights is not None and {name: value.shape for name, value in weights.items()} != self._trainable_shapes():
            raise UsageError(
                f"The checkpoint holds other weights than this run trains ({len(weights)} tensors). Give the "
                "--model.lora of the run that wrote it, and in Python use slm_pl.trainer.Trainer."
            )

    def _trainable_shapes(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in self.named_parameters() if p.requires_grad}

    def on_test_start(self) -> None:
        """Opens the record that the hooks fill. What is measured is what would be exported: adapters are merged."""
        model = self.merge_adapters()
        base = self.plans[0].base.pretrained if self.plans else self.pretrained
        self.results = Results(
            model=ModelIdentity(
                label=self.label or Path(self.trainer.default_root_dir).name,
                source=self.pretrained,
                base=base,
                num_layers=num_layers(model),
                num_parameters=count_parameters(model),
                plan_sha256=self.plans[-1].sha256 if self.plans else None,
                requested_ratio=self.plans[0].requested_ratio if len(self.plans) == 1 else None,
            ),
            environment=Environment.collect(self.device, str(model.dtype).removeprefix("torch.")),
        )

    def measured(self) -> "tuple[PreTrainedModel, Results]":
        """What a test hook needs: the model it measures, and the record it fills."""
        assert self.results is not None
        return self.load_model(), self.results

    def on_test_end(self) -> None:
        """Writes ``results.json``."""
        assert self.results is not None
        if self.trainer.is_global_zero:
            path = results_file(self.trainer)
            self.results.save(path)
            rank_zero_info(f"Results: {path}")


def _without_entries(model: torch.nn.Module) -> list[str]:
    """Names of the linear maps that have no inputs or no outputs left."""
    linear = ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return [name for name, module in linear if module.weight.numel() == 0]


def may_overwrite(trainer: pl.Trainer) -> bool:
    """Whether the user passed ``--overwrite``; a trainer made in Python has it as an attribute, or not at all."""
    return bool(getattr(trainer, "overwrite", False))


def results_file(trainer: pl.Trainer) -> Path:
    """Where ``test`` writes its figures."""
    return Path(trainer.default_root_dir) / "results.json"
