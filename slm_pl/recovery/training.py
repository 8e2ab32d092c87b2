"""The training steps of recovery: what a micro-batch contributes, what is logged, what a checkpoint holds."""

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from slm_pl import files, sharding
from slm_pl.compression.architecture import logits
from slm_pl.compression.plan import Plan
from slm_pl.data.batching import Batch
from slm_pl.errors import UsageError
from slm_pl.recovery import objective
from slm_pl.recovery.distillation import Distillation
from slm_pl.recovery.learning_curves import learning_curves
from slm_pl.recovery.step_record import StepRecord
from slm_pl.recovery.teacher import Teacher

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
    from transformers import PreTrainedModel

CURVES = "learning_curves.png"


class RecoveryModule(pl.LightningModule):
    """Trains a causal language model on the labels of packed micro-batches; a subclass says which model.

    Args:
        distillation: Also learn from the dense model; null for the labels alone.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's.
        warmup_steps: Optimizer steps of linear warm-up.
    """

    def __init__(
        self, distillation: Distillation | None, learning_rate: float, weight_decay: float, warmup_steps: int
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold the trainable weights only
        self.distillation = distillation
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.plans: list[Plan] = []
        self.figures: dict[str, bytes] = {}
        """Files that go with an export and its model card, by name: what was seen of the model and of its training."""
        self.history: dict[str, list[tuple[int, float]]] = {"train/loss": [], "val/loss": [], "lr": []}
        """Losses and learning rate by optimizer step; a checkpoint holds them, so that a resumed run draws all."""
        self._teacher: Teacher | None = None
        self._merged = False
        self._stopping = False
        self._step_began = 0.0

    @property
    def plain(self) -> "PreTrainedModel":
        """The Hugging Face model itself, adapters among its modules or not."""
        raise NotImplementedError

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
            cast(Any, trainer).catch_up_validation({step for step, _ in self.history["val/loss"]})

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
            cast(Any, self.trainer).stop_with_checkpoint()

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
