"""Lightning callbacks: compression methods and test hooks."""

from callbacks.base import CompressionCallback
from callbacks.efficiency import Efficiency
from callbacks.export import ExportCheckpoint
from callbacks.perplexity import Perplexity
from callbacks.representation import RepresentationSimilarity
from callbacks.sliding_window_merging import SlidingWindowMerging
from callbacks.zero_shot import ZeroShot

__all__ = [
    "CompressionCallback",
    "Efficiency",
    "ExportCheckpoint",
    "Perplexity",
    "RepresentationSimilarity",
    "SlidingWindowMerging",
    "ZeroShot",
]
