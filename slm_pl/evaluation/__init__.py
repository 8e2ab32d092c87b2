"""Measurements of a causal language model that is already in memory: pure functions, typed results.

None of them moves the model, changes its weights or leaves it in another mode than it came in. What is heavy
(transformers, datasets, lm-eval, torchmetrics) is imported when a measurement starts.
"""

from slm_pl.evaluation.drift import DriftResult, OutputHead, Reference, drift, reference_states
from slm_pl.evaluation.efficiency.record import EfficiencyResult, PeakMemory, Spread
from slm_pl.evaluation.generation import Examples, GenerationProtocol, ModelCompletions, complete
from slm_pl.evaluation.harness import EMBEDDED_TASK, SEVEN_TASKS, task_prompts
from slm_pl.evaluation.perplexity import PerplexityResult, perplexity
from slm_pl.evaluation.representation import representation_similarity
from slm_pl.evaluation.windows import Windows
from slm_pl.evaluation.zero_shot import TaskResult, ZeroShotResult, zero_shot

__all__ = [
    "EMBEDDED_TASK",
    "SEVEN_TASKS",
    "DriftResult",
    "EfficiencyResult",
    "Examples",
    "GenerationProtocol",
    "ModelCompletions",
    "OutputHead",
    "PeakMemory",
    "PerplexityResult",
    "Reference",
    "Spread",
    "TaskResult",
    "Windows",
    "ZeroShotResult",
    "complete",
    "drift",
    "perplexity",
    "reference_states",
    "representation_similarity",
    "task_prompts",
    "zero_shot",
]
