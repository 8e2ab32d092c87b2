"""What one process saw in one optimizer step."""

from pathlib import Path

import torch
from torch import Tensor

from slm_pl import files
from slm_pl.data.batching import Batch


class StepRecord:
    """Adds up the micro-batches of an optimizer step, and keeps them in case its loss is not finite."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.likelihoods: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.tokens, self.positions, self.rows, self.examples = 0, 0, 0, 0

    def add(self, batch: Batch, likelihood: Tensor, loss: Tensor) -> None:
        """Counts a micro-batch.

        Args:
            batch: The micro-batch.
            likelihood: Its sum of -log p.
            loss: Its share in the loss of the step.
        """
        self.batches.append(batch)
        self.likelihoods.append(likelihood.detach())
        self.losses.append(loss.detach())
        self.tokens += batch["tokens"]
        self.positions += batch["input_ids"].numel()
        self.rows += len(batch["input_ids"])
        self.examples += batch["examples"]

    @property
    def likelihood(self) -> Tensor:
        """Sum of -log p over the labels of this process."""
        return torch.stack(self.likelihoods).sum()

    @property
    def loss(self) -> Tensor:
        """This process's share in the loss of the step."""
        return torch.stack(self.losses).sum()

    @staticmethod
    def file_name(step: int, rank: int) -> str:
        """Where :meth:`save` writes."""
        return f"nonfinite_step{step}_rank{rank}.safetensors"

    def save(self, directory: Path, step: int, rank: int) -> None:
        """Writes the micro-batches and their losses, as ``0.input_ids``, …, ``0.loss``, ``1.input_ids``, …."""
        from safetensors.torch import save

        tensors = {}
        for number, (batch, loss) in enumerate(zip(self.batches, self.losses, strict=True)):
            found = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
            for name, value in {**found, "loss": loss}.items():
                tensors[f"{number}.{name}"] = value.cpu().contiguous()
        files.write_bytes(directory / self.file_name(step, rank), save(tensors))
