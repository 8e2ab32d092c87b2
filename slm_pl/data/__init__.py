"""Data: Alpaca for recovery, text for calibration and perplexity."""

from slm_pl.data.alpaca import AlpacaDataModule
from slm_pl.data.corpora import CalibrationSet, CalibrationText, EvaluationText, load_calibration, load_evaluation

__all__ = [
    "AlpacaDataModule",
    "CalibrationSet",
    "CalibrationText",
    "EvaluationText",
    "load_calibration",
    "load_evaluation",
]
