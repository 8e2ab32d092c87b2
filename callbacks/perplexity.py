"""Perplexity on held-out text, as a test hook."""

import lightning.pytorch as pl

from slm_pl.data import EvaluationText, load_evaluation
from slm_pl.errors import UsageError
from slm_pl.evaluation.perplexity import perplexity
from slm_pl.module import CausalLM


class Perplexity(pl.Callback):
    """Measures perplexity in ``test`` and adds it to ``results.json``, once for each text.

    Args:
        texts: What to measure on; the default is the embedded held-out text::

            - class_path: callbacks.Perplexity
              init_args:
                texts:
                  - {source: embedded, sequence_length: 128, max_tokens: 8192}
        batch_size: Windows in one forward pass.
    """

    def __init__(self, texts: list[EvaluationText] | None = None, batch_size: int = 4) -> None:
        if batch_size < 1:
            raise UsageError(f"Perplexity got batch_size {batch_size}; give at least 1.")
        self.texts = [EvaluationText()] if texts is None else texts
        self.batch_size = batch_size

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures."""
        assert isinstance(pl_module, CausalLM)
        model, results = pl_module.measured()
        for text in self.texts:
            windows = load_evaluation(text, pl_module.tokenizer)
            corpus = "/".join(filter(None, (text.source, text.name)))
            try:
                results.perplexity.append(perplexity(model, windows, corpus, text.bos, self.batch_size))
            except FloatingPointError as error:
                results.missing[f"perplexity {corpus} @ {text.sequence_length}"] = str(error)
