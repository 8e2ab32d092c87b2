"""The LightningModule around a (compressed) causal language model."""

import json
import math
import os
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from slm_pl import files, loading, sharding
from slm_pl.compression.architecture import ARCHITECTURES, logits, num_layers
from slm_pl.compression.plan import Plan, count_parameters, load_plans
from slm_pl.data.batching import Batch
from slm_pl.errors import UsageError
from slm_pl.evaluation.generation import complete
from slm_pl.recovery import objective
from slm_pl.recovery.adapters import LoRA, add_adapters, merge_adapters, say_trainable, train_last_layers
from slm_pl.recovery.distillation import Distillation
from slm_pl.recovery.learning_curves import learning_curves
from slm_pl.recovery.step_record import StepRecord
from slm_pl.recovery.teacher import Teacher
from slm_pl.results import Environment, ModelIdentity, Results

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slm_pl.trainer import Trainer


CURVES = "learning_curves.png"


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
        last_layers: Train the last so many decoder layers and the language-model head instead of adapters
            (arXiv 2411.15558); needs ``lora: null``.
        distillation: Also learn from the dense model; null for the labels alone.
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
        last_layers: int | None = None,
        distillation: Distillation | None = None,
        label: str | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        super().__init__()
        if last_layers is not None and (lora is not None or last_layers < 0):
            raise UsageError(
                f"model.last_layers is {last_layers} and model.lora is {'null' if lora is None else 'set'}. Give a "
                "number of layers from 0 on with lora: null, or adapters with last_layers: null."
            )
        self.strict_loading = False  # checkpoints hold the trainable weights only
        self.pretrained = pretrained
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.lora = lora
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.gradient_checkpointing = gradient_checkpointing
        self.last_layers = last_layers
        self.distillation = distillation
        self.label = label
        self.max_new_tokens = max_new_tokens
        self.source = loading.resolve(pretrained, revision, trust_remote_code)
        self.plans: list[Plan] = [] if self.source.directory is None else load_plans(self.source.directory)
        self.figures: dict[str, bytes] = {}
        """Files that go with an export and its model card, by name: what was seen of the model before compression."""
        self.history: dict[str, list[tuple[int, float]]] = {"train/loss": [], "val/loss": [], "lr": []}
        """Losses and learning rate by optimizer step; a checkpoint holds them, so that a resumed run draws all."""
        self.results: Results | None = None
        self.predictions: list[dict[str, str]] = []
        self.model: PreTrainedModel | PeftModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._merged = False
        self._teacher: Teacher | None = None
        self._stopping = False
        self._step_began = 0.0

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
        """Chooses what is trained; without a checkpoint the other stages need no adapter."""
        self.check_run(stage)
        sharding.check_strategy(self.trainer.strategy, stage == "fit")
        if self.model is None and stage == "fit" and sharding.is_sharded(self.trainer.strategy):
            return  # nobody needed the whole model: every process loads its part, in `configure_model`
        self.load_model()
        if stage == "fit" or self.trainer.ckpt_path is not None:
            self._prepare_training()

    def configure_model(self) -> None:
        """Loads the model in parts where each process is to hold a part only; Lightning calls it ready to do so."""
        if self.model is None:
            self.model = sharding.load_sharded(self.source, self.dtype_name, self.attn_implementation)
            with sharding.whole_parameters():
                self._prepare_training()

    def _prepare_training(self) -> None:
        model = self.load_model()
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.last_layers is not None:
            train_last_layers(model, self.last_layers)
        elif self.lora is None:
            say_trainable(model, "Full fine-tuning")
        elif not self.adapted:
            if self.lora.dora and sharding.is_sharded(self.trainer.strategy):
                raise UsageError(
                    "model.lora.dora needs whole weights, and DeepSpeed's stage 3 spreads them over the processes. Use "
                    "stage 2, or plain LoRA."
                )
            # In 16 bit, small updates would be rounded away. DeepSpeed keeps a copy in float32 for its optimizer.
            deepspeed = isinstance(self.trainer.strategy, DeepSpeedStrategy)
            half = self.trainer.precision in ("bf16-true", "16-true")
            self.model = add_adapters(model, self.lora, float32=not (deepspeed and half))
        assert self.model is not None
        self.model.train()  # from_pretrained gives it in eval mode

    @property
    def adapted(self) -> bool:
        """Whether the model carries adapters that are not merged into it."""
        return self.model is not None and hasattr(self.model, "peft_config")

    @property
    def plain(self) -> "PreTrainedModel":
        """The Hugging Face model itself, adapters among its modules or not."""
        return cast("PreTrainedModel", self.model.get_base_model() if self.adapted else self.model)  # type: ignore[union-attr, operator]

    @property
    def packable(self) -> bool:
        """Whether the model keeps examples apart that share a row; told from its config, before it is loaded."""
        known = ARCHITECTURES.get(loading.read_config(self.source).model_type)
        return known is not None and known.packable

    @property
    def variable_length_attention(self) -> bool:
        """Whether attention over a packed row costs no more than over its examples."""
        return "flash" in str(getattr(self.load_model().config, "_attn_implementation", ""))

    def merge_adapters(self) -> "PreTrainedModel":
        """Adds the adapters to the weights and removes them; returns the plain Hugging Face model."""
        if self.adapted:
            self.model = merge_adapters(cast("PeftModel", self.model))
            self._merged = True
        return self.load_model()

    def on_fit_start(self) -> None:
        """Loads the teacher, if there is one."""
        if self.distillation is not None:
            self._teacher = Teacher.load(self.distillation, self.source, self.plans, self.plain, self.device)

    def on_train_start(self) -> None:
        """Validation, and with it the checkpoint of its loss, falls between two optimizer steps."""
        trainer, micro_batches = self.trainer, self.trainer.accumulate_grad_batches
        if trainer.num_training_batches % micro_batches:
            raise UsageError(
                f"trainer.limit_train_batches leaves {trainer.num_training_batches} micro-batches of an epoch, but an "
                f"optimizer step takes {micro_batches}. Give a multiple, or limit the run by trainer.max_steps."
            )
        self._step_began = time.perf_counter()
        if isinstance(trainer.val_check_batch, int) and trainer.val_check_batch % micro_batches:
            trainer.val_check_batch += micro_batches - trainer.val_check_batch % micro_batches
            rank_zero_info(
                f"Validation is every {trainer.val_check_batch} micro-batches, the next multiple of the "
                f"{micro_batches} of an optimizer step"
            )
        if trainer.ckpt_path is not None:
            cast("Trainer", trainer).catch_up_validation({step for step, _ in self.history["val/loss"]})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CausalLM":
        # A run in 16 bit as a whole casts everything. Transformers keeps the frequencies of rotary embeddings in
        # float32 whatever the dtype of the weights: rounded, a position of 256 would be off by a tenth of a radian. And
        # AdamW cannot train adapters in bfloat16: most updates, and the decay of its moments, are below its precision.
        kept = {name: b for name, b in self.named_buffers() if b.dtype == torch.float32}
        if self.adapted:
            trained = ((name, p.data) for name, p in self.named_parameters() if p.requires_grad)
            kept |= {name: p for name, p in trained if p.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, tensor in (*self.named_buffers(), *self.named_parameters()):
            if name in kept and tensor.dtype != torch.float32:
                tensor.data = kept[name].to(tensor.device)
        return self

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum of -log p over the labels of a micro-batch, and what distillation adds to it by name."""
        model, distillation = self.plain, self.distillation
        inputs = objective.model_inputs(model, batch)
        hidden = distillation is not None and distillation.hidden_weight > 0
        states, every = objective.final_states(model, inputs, every_layer=hidden)
        selected = objective.predicting(batch["labels"])
        targets = batch["labels"].roll(-1, 1)[selected]
        if self._teacher is None or not self.training:
            most = batch["most_labels"]
            return objective.negative_log_likelihood(model, states[selected], targets, most), {}
        scores = logits(model, states[selected])
        likelihood = torch.nn.functional.cross_entropy(scores.float(), targets, reduction="sum")
        return likelihood, self._teacher.losses(inputs, selected, scores, every, batch["attention_mask"])

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout depends on the seed and on which micro-batch this is alone, also in a run that was resumed."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        world, rank = self.trainer.world_size, self.trainer.global_rank
        torch.manual_seed((seed * 1_000_003 + self.trainer.fit_loop.epoch_loop.total_batch_idx) * world + rank)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._step = StepRecord()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The share of this micro-batch in the mean over all labels of the optimizer step.

        Raises:
            FloatingPointError: If the loss of the step is not finite, on all processes; the micro-batches of the step
                are left in the run directory.
        """
        likelihood, others = self(batch)
        loss = likelihood / batch["step_labels"]
        for name, value in others.items():
            loss = loss + value / batch["step_tokens" if name == "hidden" else "step_labels"]
        self._step.add(batch, likelihood, loss)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self._end_step(batch)
        # Lightning divides by the number of micro-batches, and averages over processes; so does DeepSpeed, which
        # divides by the number of micro-batches once more.
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size
        if self.trainer.strategy.handles_gradient_accumulation:
            factor *= self.trainer.accumulate_grad_batches
        return loss * factor

    def _end_step(self, batch: Batch) -> None:
        """Logs the step, before its gradient changes a weight."""
        step, trainer = self._step, self.trainer
        stop = torch.tensor(float(getattr(trainer, "stop_signal", None) is not None))
        sums = torch.stack([step.likelihood.float(), step.loss.float(), stop.to(step.loss.device)])
        summed = cast(Tensor, trainer.strategy.reduce(sums, reduce_op="sum")).tolist()
        likelihood, loss = summed[0] / batch["step_labels"], summed[1]
        self._stopping = summed[2] > 0
        number = trainer.global_step + 1
        if not (math.isfinite(loss) and math.isfinite(likelihood)):
            self._fail(f"loss of optimizer step {number} is {loss}", number)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.log("train/loss", likelihood, prog_bar=True)
        if self._teacher is not None:
            self.log("train/objective", loss)
        self.log("lr", rate)
        self.log("train/padding", 1 - step.tokens / step.positions)
        self.log("train/packing_efficiency", step.tokens / step.positions)
        self.log("train/examples_per_row", step.examples / step.rows)
        self.history["train/loss"].append((number, likelihood))
        self.history["lr"].append((number, float(rate)))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuses a gradient that is not finite before it ruins the weights; DeepSpeed has its gradients to itself."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients and not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            norm = float(torch.stack(torch._foreach_norm(gradients)).norm())
            if not math.isfinite(norm):
                number = self.trainer.global_step + 1
                self._fail(f"gradient of optimizer step {number} has the norm {norm}", number)

    def _fail(self, what: str, step: int) -> NoReturn:
        """Leaves the micro-batches of a step in the run directory and ends the run."""
        directory, rank = Path(self.trainer.default_root_dir), self.trainer.global_rank
        self._step.save(directory, step, rank)
        raise FloatingPointError(
            f"The {what}. Its micro-batches are in {directory / self._step.file_name(step, rank)}, with the loss of "
            "each; no weight was changed by it. Try a lower model.learning_rate, or trainer.precision: bf16-true "
            "instead of 16 bit."
        )

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        """Tells the speed; ends the run after the optimizer step in which one of the processes was asked to stop."""
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        now = time.perf_counter()
        self.log("train/tokens_per_s", batch["step_tokens"] / (now - self._step_began), prog_bar=True)
        self._step_began = now
        if self._stopping:
            cast("Trainer", self.trainer).stop_with_checkpoint()

    def on_validation_epoch_start(self) -> None:
        """Nothing was counted yet."""
        self._validated = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss on the response tokens of held-out rows, each token counting the same."""
        likelihood, _ = self(batch)
        self._validated += torch.tensor([float(likelihood), float((batch["labels"] >= 0).sum())])

    def on_validation_epoch_end(self) -> None:
        """Logs the mean over all labels of all processes."""
        sums = cast(Tensor, self.trainer.strategy.reduce(self._validated.float().to(self.device), reduce_op="sum"))
        loss = float(sums[0] / sums[1])
        self.log("val/loss", loss, prog_bar=True)
        self._step_began = time.perf_counter()  # the time of validation is not that of training
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.history["val/loss"].append((self.trainer.global_step, loss))
            self.draw_history()

    def on_train_end(self) -> None:
        """Draws the last steps, too."""
        self.draw_history()

    def draw_history(self) -> None:
        """Writes ``learning_curves.png`` into the run directory."""
        if self.trainer.is_global_zero:
            self.figures[CURVES] = learning_curves(self.history)
            files.write_bytes(Path(self.trainer.default_root_dir) / CURVES, self.figures[CURVES])

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
        adam = sharding.adamw(self.trainer.strategy)
        optimizer = adam(trainable, lr=self.learning_rate, weight_decay=self.weight_decay)
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
        checkpoint["history"] = self.history
        checkpoint["stopped"] = self.trainer.should_stop

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
                "--model.lora and --model.last_layers of the run that wrote it, and in Python use "
                "slm_pl.trainer.Trainer."
            )
        if checkpoint["stopped"] and self.trainer.state.fn == TrainerFn.FITTING:
            self.trainer.should_stop = True  # a callback had ended the training; there may be an export to be made
        self.history = {name: [tuple(point) for point in points] for name, points in checkpoint["history"].items()}

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


def may_overwrite(trainer: pl.Trainer) -> bool:
    """Whether the user passed ``--overwrite``; a trainer made in Python has it as an attribute, or not at all."""
    return bool(getattr(trainer, "overwrite", False))


def results_file(trainer: pl.Trainer) -> Path:
    """Where ``test`` writes its figures."""
    return Path(trainer.default_root_dir) / "results.json"
