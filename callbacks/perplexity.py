"""Perplexity on held-out text, as a test hook."""

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.base import EarlyCheck
from slm_pl.data import EvaluationText, load_evaluation
from slm_pl.errors import UsageError
from slm_pl.evaluation.perplexity import PerplexityResult, perplexity
from slm_pl.evaluation.windows import Windows
from slm_pl.module import CausalLM


class Perplexity(EarlyCheck):
    """Measures perplexity in ``test`` and adds it to ``results.json``, once for each text.

    Under several processes each measures its share of the windows.

    Args:
        texts: What to measure on; the default is the embedded held-out text. The second and third are what Shortened
            LLaMA and SLEB report::

                - class_path: callbacks.Perplexity
                  init_args:
                    texts:
                      - {source: embedded, sequence_length: 128, max_tokens: 8192}
                      - {preset: shortened_llama}
                      - {preset: sleb, source: c4}
                      - {source: wikitext2, sequence_length: 1024, stride: 512}
        batch_size: Windows in one forward pass.
        local_data: A directory with ``<name>/<split>.jsonl`` (or ``.parquet``, or ``.txt`` with a row in each line);
            ``wikitext2``, ``ptb`` and ``c4`` are then read from there, offline.

    Raises:
        UsageError: If ``batch_size`` is below 1.
    """

    def __init__(
        self, texts: list[EvaluationText] | None = None, batch_size: int = 4, local_data: str | None = None
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"Perplexity got batch_size {batch_size}; give at least 1.")
        self.texts = [EvaluationText()] if texts is None else texts
        self.batch_size = batch_size
        self.local_data = local_data
        self._windows: list[Windows] | None = None

    def check(self, trainer: pl.Trainer) -> None:
        """Reads the texts, so that a missing file is not found after a search."""
        if trainer.state.fn == TrainerFn.TESTING and self._windows is None:
            module = trainer.lightning_module
            assert isinstance(module, CausalLM)
            self._windows = [load_evaluation(text, module.tokenizer, self.local_data) for text in self.texts]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reads the texts before any work."""
        self.check(trainer)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures."""
        assert isinstance(pl_module, CausalLM)
        assert self._windows is not None  # `setup` comes before
        model, results = pl_module.measured()
        for text, windows in zip(self.texts, self._windows, strict=True):
            corpus = text.protocol().label
            asked = [corpus, windows.sha256, windows.protocol, self.batch_size]

            def measure(windows: Windows = windows, corpus: str = corpus) -> PerplexityResult:
                return perplexity(model, windows, corpus, batch_size=self.batch_size)

            try:
                results.perplexity.append(pl_module.once(asked, PerplexityResult, measure))
            except FloatingPointError as error:
                results.missing[f"perplexity {corpus} @ {windows.sequence_length}"] = str(error)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the texts."""
        self._windows = None
