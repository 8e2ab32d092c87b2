"""Results side by side: what compares in one row, how it is written, and the files and pictures of it."""

from slm_pl.report.writing import compare

__all__ = ["compare"]
