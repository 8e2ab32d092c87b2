"""Two models in turn, so that what disturbs one disturbs the other, and what there is to expect of the ratio."""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from slm_pl.compression.architecture import decoder_layers, num_layers
from slm_pl.compression.plan import count_parameters
from slm_pl.evaluation._model import device_of
from slm_pl.evaluation.efficiency.clock import clock_of
from slm_pl.evaluation.efficiency.memory import tensor_bytes
from slm_pl.evaluation.efficiency.record import EfficiencyResult, Paired, Promise, Ratio, Spread, Work
from slm_pl.evaluation.efficiency.runs import Runner, Times

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def ratio_of(slower: Sequence[float], faster: Sequence[float], confidence: float = 0.95) -> Ratio:
    """How many times as fast: the median of the pairs' ratios, with a confidence interval from order statistics.

    Of n independent pairs, the number whose ratio lies below the true median is binomial with probability 1/2, whatever
    the distribution: the k-th smallest and the k-th largest ratio cover it with probability ``1 - 2 P(X < k)``. The
    interval is the narrowest of these that reaches the confidence; with fewer than 6 pairs, none reaches 0.95, and the
    interval is from the least to the greatest, with the confidence that it has.

    Args:
        slower: Seconds of the baseline.
        faster: Seconds of the other model in the same pairs.
        confidence: Probability asked for.
    """
    ratios = sorted(one / other for one, other in zip(slower, faster, strict=True))
    pairs = len(ratios)
    outside = [2 * sum(math.comb(pairs, below) for below in range(k + 1)) / 2**pairs for k in range((pairs + 1) // 2)]
    k = max((k for k, share in enumerate(outside) if 1 - share >= confidence), default=0)
    return Ratio(statistics.median(ratios), ratios[k], ratios[-1 - k], max(1 - outside[k], 0.0), pairs)


@dataclass(frozen=True)
class Parts:
    """Median seconds of a model's parts in one run.

    Args:
        prefill_layer: One decoder layer, on average over the layers, reading the prompts.
        prefill_head: The language-model head behind it.
        decode_layer: One decoder layer in a decode step; None of a forward pass.
        decode_head: The head in a decode step.
    """

    prefill_layer: float
    prefill_head: float
    decode_layer: float | None
    decode_head: float | None


def time_parts(runner: Runner, seed: int, runs: int = 3) -> Parts:
    """Times the decoder layers and the head of a model by hooks, in uncompiled runs that count for nothing else."""
    layers, head = list(decoder_layers(runner.model)), runner.model.get_output_embeddings()
    prefill: dict[str, list[float]] = {"layer": [], "head": []}
    decode: dict[str, list[float]] = {"layer": [], "head": []}
    for run in range(runs):
        with _timed_modules(runner, [*layers, head]) as seconds_of:
            runner.plain(seed + run, lambda: None)
        seconds = seconds_of()
        # Every module ran once in the prefill, and once in each step after it.
        steps = len(seconds[-1])
        for step in range(steps):
            times = [one[step] for one in seconds]
            kind = decode if step else prefill
            kind["layer"].append(statistics.fmean(times[:-1]))
            kind["head"].append(times[-1])
    return Parts(
        statistics.median(prefill["layer"]),
        statistics.median(prefill["head"]),
        statistics.median(decode["layer"]) if decode["layer"] else None,
        statistics.median(decode["head"]) if decode["head"] else None,
    )


@contextlib.contextmanager
def _timed_modules(runner: Runner, modules: Sequence[nn.Module]) -> Iterator[Callable[[], list[list[float]]]]:
    """Yields a function that tells, for each module, the seconds of each of its calls."""
    clock = clock_of(device_of(runner.model))
    marks: list[list[object]] = [[] for _ in modules]

    def note(own: list[object]) -> Callable[..., None]:
        return lambda *_: own.append(clock.mark())

    handles = []
    for module, own in zip(modules, marks, strict=True):
        handles += [module.register_forward_pre_hook(note(own)), module.register_forward_hook(note(own))]
    try:
        yield lambda: [[clock.seconds(own[at : at + 2])[0] for at in range(0, len(own), 2)] for own in marks]
    finally:
        for handle in handles:
            handle.remove()


def promise_of(
    baseline: "PreTrainedModel", model: "PreTrainedModel", parts: Parts | None, theirs: Work, ours: Work
) -> Promise:
    """What there is to expect of the ratio.

    Args:
        baseline: The slower model.
        model: The other.
        parts: Times of the baseline; None where they say nothing about the model.
        theirs: The baseline's work.
        ours: The model's.
    """
    before, after = num_layers(baseline), num_layers(model)

    def by_layers(layer: float | None, head: float | None) -> float | None:
        if layer is None or head is None:
            return None
        return (before * layer + head) / (after * layer + head)

    return Promise(
        layers=before / after,
        prefill_layer_times=by_layers(parts.prefill_layer, parts.prefill_head) if parts else None,
        decode_layer_times=by_layers(parts.decode_layer, parts.decode_head) if parts else None,
        prefill_macs=theirs.prefill_macs / ours.prefill_macs,
        decode_bytes=theirs.step_bytes / ours.step_bytes if ours.decode_macs else None,
    )


def same_layers(baseline: "PreTrainedModel", model: "PreTrainedModel") -> bool:
    """Whether a layer of one takes as long as a layer of the other: equally wide, and stored in the same bits."""
    sizes = [{tensor_bytes(layer.parameters()) for layer in decoder_layers(one)} for one in (baseline, model)]
    return sizes[0] >= sizes[1]


def in_turn(
    baseline: Runner, runner: Runner, warmup: int, repeats: int, seed: int, step: Callable[[str], None]
) -> tuple[list[Times], list[Times]]:
    """Runs both models alternately; in every second pair the other one begins.

    Returns:
        Times of the baseline and of the model, pair by pair; warm-up left out.
    """
    times: tuple[list[Times], list[Times]] = ([], [])
    for pair in range(-warmup, repeats):
        runners = [(baseline, 0), (runner, 1)]
        for one, place in runners if pair % 2 == 0 else reversed(runners):
            seconds = one.timed(seed + warmup + pair)
            if pair >= 0:
                times[place].append(seconds)
        step("")
    return times


def paired_of(
    name: str,
    baseline: "PreTrainedModel",
    slower: list[Times],
    faster: list[Times],
    new_tokens: int,
    promise: Promise | None,
) -> Paired:
    """Puts pairs of runs together.

    Args:
        name: What the baseline was loaded from.
        baseline: The baseline.
        slower: Its times.
        faster: The model's, pair by pair.
        new_tokens: That a run makes, of all rows together.
        promise: What there is to expect.
    """

    def steps(times: list[Times]) -> list[float]:
        return [one.per_token for one in times if one.per_token is not None]

    def rates(times: list[Times]) -> Spread | None:
        return Spread.of([new_tokens / one.total for one in times]) if new_tokens else None

    return Paired(
        baseline=name,
        num_layers=num_layers(baseline),
        num_parameters=count_parameters(baseline),
        latency=ratio_of([one.total for one in slower], [one.total for one in faster]),
        time_to_first_token=ratio_of([one.first for one in slower], [one.first for one in faster]),
        time_per_output_token=ratio_of(steps(slower), steps(faster)) if steps(slower) else None,
        baseline_latency_s=Spread.of([one.total for one in slower]),
        latency_s=Spread.of([one.total for one in faster]),
        promise=promise,
        time_to_first_token_s=Spread.of([one.first for one in faster]),
        baseline_time_to_first_token_s=Spread.of([one.first for one in slower]),
        output_tokens_per_s=rates(faster),
        baseline_output_tokens_per_s=rates(slower),
    )


def sides_of(figures: EfficiencyResult) -> tuple[EfficiencyResult, EfficiencyResult]:
    """What the runs in turn tell of the baseline, and of the model."""
    paired = figures.paired
    assert paired is not None
    baseline = EfficiencyResult(
        protocol=figures.protocol,
        batch_size=figures.batch_size,
        prompt_tokens=figures.prompt_tokens,
        new_tokens=figures.new_tokens,
        warmup=figures.warmup,
        repeats=paired.latency.pairs,
        latency_s=paired.baseline_latency_s,
        time_to_first_token_s=paired.baseline_time_to_first_token_s,
        output_tokens_per_s=paired.baseline_output_tokens_per_s,
        peak_memory_bytes=None,
        runtime=figures.runtime and replace(figures.runtime, quantization=None),
        prompt=figures.prompt,
    )
    own = replace(
        figures,
        latency_s=paired.latency_s,
        time_to_first_token_s=paired.time_to_first_token_s,
        output_tokens_per_s=paired.output_tokens_per_s,
    )
    return baseline, own
