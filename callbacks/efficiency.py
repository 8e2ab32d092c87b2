"""Latency, throughput and memory of generation, as a test hook."""

import lightning.pytorch as pl

from slm_pl.evaluation.efficiency.generation import check_protocol, measure_generation
from slm_pl.module import CausalLM


class Efficiency(pl.Callback):
    """Times generation in ``test`` and adds the figures to ``results.json``.

    The defaults are Shortened LLaMA's protocol (its ``gen_batch_eval_time.py``): the whole ``generate`` is timed, the
    end of text is suppressed so that all runs make equally many tokens, and 10 runs warm up before 20 are counted.

    Args:
        prompt: What the model continues.
        batch_size: Copies of the prompt in one batch.
        new_tokens: Tokens generated in each run.
        warmup: Runs before counting.
        repeats: Runs that count.

    Raises:
        UsageError: If a number is out of range.
    """

    def __init__(
        self,
        prompt: str = "The Leaning Tower of Pisa is known for",
        batch_size: int = 1,
        new_tokens: int = 128,
        warmup: int = 10,
        repeats: int = 20,
    ) -> None:
        check_protocol(batch_size, new_tokens, warmup, repeats)
        self.prompt = prompt
        self.batch_size = batch_size
        self.new_tokens = new_tokens
        self.warmup = warmup
        self.repeats = repeats

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures."""
        assert isinstance(pl_module, CausalLM)
        model, results = pl_module.measured()
        figures = measure_generation(
            model,
            pl_module.tokenizer,
            prompt=self.prompt,
            batch_size=self.batch_size,
            new_tokens=self.new_tokens,
            warmup=self.warmup,
            repeats=self.repeats,
        )
        results.efficiency.append(figures)
