"""Zero-shot accuracy, as a test hook."""

from typing import Literal

import lightning.pytorch as pl

from slm_pl.evaluation.zero_shot import SEVEN_TASKS, zero_shot
from slm_pl.module import CausalLM


class ZeroShot(pl.Callback):
    """Runs lm-evaluation-harness on the model in memory in ``test`` and adds the accuracies to ``results.json``.

    Args:
        tasks: Harness task names; the default is the seven commonsense tasks of the literature (boolq, piqa,
            hellaswag, winogrande, arc_easy, arc_challenge, openbookqa). ``embedded_docstrings`` needs no download.
        local_data: A directory with ``<task>/<split>.jsonl`` in the columns of the Hub datasets; the stock tasks then
            read these files, with their stock prompts and metrics, offline.
        limit: Only the first so many examples of each task.
        batch_size: Requests in one forward pass; ``auto`` lets the harness find the largest on a GPU; on a CPU it is 8.
    """

    def __init__(
        self,
        tasks: list[str] | None = None,
        local_data: str | None = None,
        limit: int | None = None,
        batch_size: int | Literal["auto"] = "auto",
    ) -> None:
        self.tasks = list(SEVEN_TASKS) if tasks is None else tasks
        self.local_data = local_data
        self.limit = limit
        self.batch_size = batch_size

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures."""
        assert isinstance(pl_module, CausalLM)
        model, results = pl_module.measured()
        results.zero_shot = zero_shot(
            model,
            pl_module.tokenizer,
            self.tasks,
            local_data=self.local_data,
            limit=self.limit,
            batch_size=self.batch_size,
        )
