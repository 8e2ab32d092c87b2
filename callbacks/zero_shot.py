"""Zero-shot accuracy, as a test hook."""

import json
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.base import EarlyCheck, on_first_rank
from slm_pl import files, identity
from slm_pl.evaluation.harness import SEVEN_TASKS, Shots, check_tasks, task_content
from slm_pl.evaluation.zero_shot import Samples, ZeroShotResult, check_arguments, zero_shot
from slm_pl.module import CausalLM


class ZeroShot(EarlyCheck):
    """Runs lm-evaluation-harness on the model in memory in ``test`` and adds the accuracies to ``results.json``.

    The figures are those of the ``lm_eval`` command line on the same export with the same batch size. Depth pruning
    hurts reasoning in several steps and knowledge most: GSM8K and MMLU fall long before these seven do, so look at them
    before you serve a pruned model::

        - class_path: callbacks.ZeroShot
          init_args: {tasks: [gsm8k, mmlu], num_fewshot: {mmlu: 5}, chat_template: true}

    Processes share the questions of every task (``trainer.devices``).

    Args:
        tasks: Harness task names; the default is the seven commonsense tasks of the literature (boolq, piqa,
            hellaswag, winogrande, arc_easy, arc_challenge, openbookqa). Also groups and tags such as ``mmlu``, paths of
            task files (YAML, whose Python functions are run), and ``embedded_docstrings``, which needs no download.
        local_data: A directory with ``<task>/<split>.jsonl`` in the columns of the Hub datasets; the stock tasks then
            read these files, with their stock prompts and metrics, offline. ``main.py data --tasks … --output DIR``
            makes it on a connected machine.
        limit: Only the first so many examples of each task.
        batch_size: Requests in one forward pass; ``auto`` lets the harness find the largest on a GPU; on a CPU it is 8.
        num_fewshot: Solved examples in the prompt, a number or one for each task; null is each task's own, mostly 0.
        chat_template: Put the questions into the tokenizer's chat template.
        log_samples: Write every question, answer and metric to ``samples_<task>.jsonl`` in the run directory.
        cache: Keep the figures in the cache directory and take them from there for the same weights and questions.
    """

    def __init__(
        self,
        tasks: list[str] | None = None,
        local_data: str | None = None,
        limit: int | None = None,
        batch_size: int | Literal["auto"] = "auto",
        num_fewshot: Shots = None,
        chat_template: bool = False,
        log_samples: bool = False,
        cache: bool = False,
    ) -> None:
        self.tasks = list(SEVEN_TASKS) if tasks is None else tasks
        check_arguments(self.tasks, limit, batch_size, num_fewshot)
        self.local_data = local_data
        self.limit = limit
        self.batch_size = batch_size
        self.num_fewshot = num_fewshot
        self.chat_template = chat_template
        self.log_samples = log_samples
        self.cache = cache

    def check(self, trainer: pl.Trainer) -> None:
        """Finds unknown tasks and missing files before any work."""
        on_first_rank(trainer, lambda: check_tasks(self.tasks, self.local_data, self.num_fewshot))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks before the model is measured."""
        if stage == "test":
            self.check(trainer)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures."""
        assert isinstance(pl_module, CausalLM)
        model, results = pl_module.measured()
        run = Path(trainer.default_root_dir)

        def measure() -> ZeroShotResult:
            return zero_shot(
                model,
                pl_module.tokenizer,
                self.tasks,
                local_data=self.local_data,
                limit=self.limit,
                batch_size=self.batch_size,
                num_fewshot=self.num_fewshot,
                chat_template=self.chat_template,
                on_samples=(lambda samples: _write(run, samples)) if self.log_samples else None,
                cache=self.cache,
            )

        asked = {
            "tasks": self.tasks,
            "files": [task_content(task) for task in self.tasks if task.endswith((".yaml", ".yml"))],
            "data": None if self.local_data is None else identity.content_of(self.local_data),
            "protocol": [self.limit, self.batch_size, self.num_fewshot, self.chat_template, self.log_samples],
        }
        results.zero_shot = pl_module.once(asked, ZeroShotResult, measure)
        if results.zero_shot.cached:
            rank_zero_info("ZeroShot: figures of an earlier run with the same weights and questions")


def _write(run: Path, samples: Samples) -> None:
    """As ``lm_eval --log_samples`` writes them, so that its tools read them."""
    from lm_eval.utils import handle_non_serializable

    for task, records in samples.items():
        lines = [json.dumps(record, default=handle_non_serializable, ensure_ascii=False) for record in records]
        files.write_text(run / f"samples_{task}.jsonl", "".join(line + "\n" for line in lines))
