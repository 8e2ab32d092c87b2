"""Lightning callbacks: compression methods and test hooks."""

from callbacks.base import CompressionCallback
from callbacks.block_influence import BlockInfluence
from callbacks.efficiency import Efficiency
from callbacks.export import ExportCheckpoint
from callbacks.layer_removal import LayerRemoval
from callbacks.perplexity import Perplexity
from callbacks.representation import RepresentationSimilarity
from callbacks.shortened_llama import ShortenedLLaMA
from callbacks.sleb import SLEB
from callbacks.sliding_window_merging import SlidingWindowMerging
from callbacks.zero_shot import ZeroShot

__all__ = [
    "SLEB",
    "BlockInfluence",
    "CompressionCallback",
    "Efficiency",
    "ExportCheckpoint",
    "LayerRemoval",
    "Perplexity",
    "RepresentationSimilarity",
    "ShortenedLLaMA",
    "SlidingWindowMerging",
    "ZeroShot",
]
