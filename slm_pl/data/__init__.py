"""Data: instructions and text for recovery, text for calibration and perplexity."""

from slm_pl.data.alpaca import AlpacaDataModule
from slm_pl.data.corpora import CalibrationSet, CalibrationText, load_calibration
from slm_pl.data.evaluation_text import EvaluationText, load_evaluation
from slm_pl.data.named_corpora import CORPORA, Corpus, hub_rows
from slm_pl.data.text import TextDataModule
from slm_pl.data.training import TrainingData

__all__ = [
    "CORPORA",
    "AlpacaDataModule",
    "CalibrationSet",
    "CalibrationText",
    "Corpus",
    "EvaluationText",
    "TextDataModule",
    "TrainingData",
    "hub_rows",
    "load_calibration",
    "load_evaluation",
]
