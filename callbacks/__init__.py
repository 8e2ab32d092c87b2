"""Lightning callbacks: compression methods and test hooks."""

from callbacks.base import CompressionCallback
from callbacks.block_influence import BlockInfluence
from callbacks.drift import Drift
from callbacks.efficiency import Efficiency
from callbacks.examples import GenerationExamples
from callbacks.export import ExportCheckpoint
from callbacks.flap import FLAP
from callbacks.layer_removal import LayerRemoval
from callbacks.llm_pruner import LLMPruner
from callbacks.perplexity import Perplexity
from callbacks.representation import RepresentationSimilarity
from callbacks.shortened_llama import ShortenedLLaMA
from callbacks.sleb import SLEB
from callbacks.sliding_window_merging import SlidingWindowMerging
from callbacks.wanda_structured import WandaStructured
from callbacks.zero_shot import ZeroShot

__all__ = [
    "FLAP",
    "SLEB",
    "BlockInfluence",
    "CompressionCallback",
    "Drift",
    "Efficiency",
    "ExportCheckpoint",
    "GenerationExamples",
    "LLMPruner",
    "LayerRemoval",
    "Perplexity",
    "RepresentationSimilarity",
    "ShortenedLLaMA",
    "SlidingWindowMerging",
    "WandaStructured",
    "ZeroShot",
]
