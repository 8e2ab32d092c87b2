"""Data: instructions and text for recovery, text for calibration and perplexity."""

from slm_pl.data.alpaca import AlpacaDataModule
from slm_pl.data.corpora import CalibrationSet, CalibrationText, EvaluationText, load_calibration, load_evaluation
from slm_pl.data.text import TextDataModule
from slm_pl.data.training import TrainingData

__all__ = [
    "AlpacaDataModule",
    "CalibrationSet",
    "CalibrationText",
    "EvaluationText",
    "TextDataModule",
    "TrainingData",
    "load_calibration",
    "load_evaluation",
]
