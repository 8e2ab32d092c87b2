import math
import random
import statistics
from dataclasses import replace

import pytest
from scipy.stats import binom

from slm_pl.evaluation.efficiency.paired import (
    Parts,
    in_turn,
    paired_of,
    promise_of,
    ratio_of,
    same_layers,
    sides_of,
    time_parts,
)
from slm_pl.evaluation.efficiency.record import EfficiencyResult, Runtime, Spread, Work
from slm_pl.evaluation.efficiency.runs import Runner, Times
from tests.helpers.pico import pico_model
from tests.slm_pl.evaluation.efficiency.helpers import make_runner, set_clock

pytestmark = pytest.mark.usefixtures("one_thread")


# --- The ratio and its interval ---


@pytest.mark.parametrize("pairs", range(2, 61))
def test_interval_is_the_narrowest_that_reaches_the_confidence(pairs):
    # Ratios 1, 2, 3, …: the ends of the interval tell which of them they are.
    found = ratio_of([float(place) for place in range(1, pairs + 1)], [1.0] * pairs)
    place = int(found.low)
    assert found.high == pairs + 1 - place
    # The true median lies between them if at least `place` ratios fall below it, and at least `place` above.
    coins = binom(pairs, 0.5)
    assert found.confidence == pytest.approx(coins.cdf(pairs - place) - coins.cdf(place - 1))
    if pairs >= 6:
        assert found.confidence >= 0.95
        assert coins.cdf(pairs - place - 1) - coins.cdf(place) < 0.95  # the next narrower one does not reach it
    else:
        assert (place, found.confidence < 0.95) == (1, True)
    assert (found.value, found.pairs) == ((pairs + 1) / 2, pairs)


def test_ratio_is_of_pairs_and_baseline_over_model():
    found = ratio_of([6.0, 20.0, 3.0], [2.0, 5.0, 3.0])
    assert (found.value, found.low, found.high) == (3.0, 1.0, 4.0)
    assert found.confidence == 0.75
    with pytest.raises(ValueError, match="argument"):
        ratio_of([1.0, 2.0], [1.0])


@pytest.mark.parametrize("pairs", [3, 6, 10, 20])
def test_coverage_of_a_skewed_distribution(pairs):
    """Stalls hit one run or the other: the ratios are far from normal, and the interval covers their median still."""
    rng = random.Random(pairs)
    median, trials = 1 + math.log(2) ** 3, 3000
    covered, confidences = 0, set()
    for _ in range(trials):
        ratios = [1 + rng.expovariate(1.0) ** 3 for _ in range(pairs)]
        found = ratio_of(ratios, [1.0] * pairs)
        covered += found.low <= median <= found.high
        confidences.add(found.confidence)
    (confidence,) = confidences
    error = math.sqrt(confidence * (1 - confidence) / trials)
    assert abs(covered / trials - confidence) < 4 * error
    assert (confidence >= 0.95) == (pairs >= 6)


def test_smaller_confidence_gives_a_narrower_interval():
    seconds = [float(place) for place in range(1, 21)]
    usual, half = ratio_of(seconds, [1.0] * 20), ratio_of(seconds, [1.0] * 20, confidence=0.5)
    assert usual.low < half.low < half.high < usual.high
    assert 0.5 <= half.confidence < usual.confidence


# --- In turn ---


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_models_alternate_and_begin_in_turn(warmup, monkeypatch):
    order, progress = [], []

    def timed(self, seed):
        order.append((self.model, seed))
        return Times(float(len(order)), [])

    monkeypatch.setattr(Runner, "timed", timed)
    baseline, ours = (make_runner(pico_model(num_hidden_layers=1), new_tokens=0) for _ in range(2))
    slower, faster = in_turn(baseline, ours, warmup, 3, 100, progress.append)
    assert len(progress) == warmup + 3
    first, second = (baseline.model, ours.model) if warmup % 2 == 0 else (ours.model, baseline.model)
    expected = []
    for pair in range(warmup + 3):  # both get the same seed, each pair another one
        expected += [(first, 100 + pair), (second, 100 + pair)]
        first, second = second, first
    assert order == expected
    begin = 2 * warmup  # warm-up does not count
    assert [one.total for one in slower] == [begin + 1, begin + 4, begin + 5]
    assert [one.total for one in faster] == [begin + 2, begin + 3, begin + 6]


def test_models_run_in_turn_for_real(monkeypatch):
    # Each run of two tokens takes four stamps; the baseline's takes 3 s, the model's 2 s, and warm-up much longer.
    lengths = [90.0, 80.0, 3.0, 2.0, 2.0, 3.0]  # of the pairs -1 (model first), 0 (baseline first), 1
    stamps = [start + share * length for start, length in enumerate(lengths) for share in (0.0, 0.25, 0.75, 1.0)]
    set_clock(monkeypatch, stamps)
    baseline, ours = (make_runner(pico_model(num_hidden_layers=layers), new_tokens=2) for layers in (2, 1))
    slower, faster = in_turn(baseline, ours, 1, 2, 0, lambda _: None)
    assert [one.total for one in slower] == pytest.approx([3.0, 3.0])
    assert [one.total for one in faster] == pytest.approx([2.0, 2.0])
    assert [one.first for one in faster] == pytest.approx([0.5, 0.5])


# --- Parts of a model ---


def stamps_of(seconds):
    """Begin and end of modules that run one after another."""
    at, stamps = 1000.0, []
    for one in seconds:
        stamps += [at, at + one]
        at += one + 7.0  # what lies between counts for none of them
    return stamps


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_and_head_are_timed_apart(layers, monkeypatch):
    model = pico_model("llama", num_hidden_layers=layers)
    rng = random.Random(layers)
    # runs x steps x (layers and head): 2 runs of 3 tokens, so a prefill and two steps
    seconds = [[[rng.uniform(1, 2) for _ in range(layers + 1)] for _ in range(3)] for _ in range(2)]
    flat = [one for run in seconds for step in run for one in step]
    left = set_clock(monkeypatch, [*stamps_of(flat), "one too many"])
    parts = time_parts(make_runner(model, new_tokens=3), 0, runs=2)
    assert next(left) == "one too many"
    prefills = [run[0] for run in seconds]
    steps = [step for run in seconds for step in run[1:]]
    for found, own in ((parts.prefill_layer, prefills), (parts.decode_layer, steps)):
        assert found == pytest.approx(statistics.median(sum(step[:-1]) / layers for step in own))
    assert parts.prefill_head == pytest.approx(statistics.median(step[-1] for step in prefills))
    assert parts.decode_head == pytest.approx(statistics.median(step[-1] for step in steps))


def test_parts_of_a_forward_pass(monkeypatch):
    set_clock(monkeypatch, stamps_of([1.0, 3.0, 0.5, 2.0, 8.0, 0.75, 1.0, 2.0, 4.0]))
    parts = time_parts(make_runner(pico_model("llama", num_hidden_layers=2), new_tokens=0), 0)
    assert parts == Parts(pytest.approx(2.0), pytest.approx(0.75), None, None)


def test_timing_parts_leaves_no_hooks():
    model = pico_model("opt", num_hidden_layers=2)
    time_parts(make_runner(model, new_tokens=2), 0, runs=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def fail(*_):
        raise MemoryError

    model.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        time_parts(make_runner(model, new_tokens=2), 0)
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert hooks == [fail]


# --- What there is to expect ---


@pytest.fixture(scope="module")
def models():
    return [pico_model("llama", num_hidden_layers=layers) for layers in (30, 24)]


THEIRS = Work(9_000, 6_000, 1.0, 1.0, 1, step_bytes=500)
OURS = Work(6_000, 4_000, 1.0, 1.0, 1, step_bytes=400)


def test_promise_by_hand(models):
    # A head that takes as long as ten layers in the prefill, and as six in a step.
    found = promise_of(*models, Parts(0.1, 1.0, 0.5, 3.0), THEIRS, OURS)
    assert found.layers == 30 / 24
    assert found.prefill_layer_times == pytest.approx((3.0 + 1.0) / (2.4 + 1.0))
    assert found.decode_layer_times == pytest.approx((15.0 + 3.0) / (12.0 + 3.0))
    assert found.prefill_macs == 1.5
    assert found.decode_bytes == 1.25


def test_promise_of_a_forward_pass(models):
    found = promise_of(
        *models, Parts(0.1, 1.0, None, None), replace(THEIRS, decode_macs=0), replace(OURS, decode_macs=0)
    )
    assert (found.decode_layer_times, found.decode_bytes) == (None, None)
    assert found.prefill_layer_times == pytest.approx(4.0 / 3.4)


def test_no_promise_by_layer_times_of_layers_that_differ(models):
    found = promise_of(*models, None, THEIRS, OURS)
    assert (found.prefill_layer_times, found.decode_layer_times) == (None, None)
    assert (found.layers, found.prefill_macs, found.decode_bytes) == (30 / 24, 1.5, 1.25)
    narrow = pico_model("llama", num_hidden_layers=2, intermediate_size=40)
    assert same_layers(*models)
    assert not same_layers(models[0], narrow)
    assert not same_layers(models[0], pico_model("llama", num_hidden_layers=2).bfloat16())


# --- What is written down ---

SLOWER = [Times(total, [total / 4, total / 2, total]) for total in (4.0, 6.0, 10.0)]
FASTER = [Times(total, [total / 2, total / 2 + 1, total]) for total in (2.0, 4.0, 4.0)]


def test_pairs_put_together(models):
    promise = promise_of(*models, Parts(0.1, 1.0, 0.5, 3.0), THEIRS, OURS)
    found = paired_of("models/dense", models[0], SLOWER, FASTER, 12, promise)
    assert (found.baseline, found.num_layers, found.promise) == ("models/dense", 30, promise)
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    assert found.num_parameters == 2 * 512 * 32 + 32 + 30 * layer
    assert (found.latency.low, found.latency.value, found.latency.high) == (1.5, 2.0, 2.5)
    assert (found.time_to_first_token.low, found.time_to_first_token.high) == (0.75, 1.25)
    # (4 - 1) / (2 - 1), (6 - 1.5) / (4 - 2), (10 - 2.5) / (4 - 2)
    step = found.time_per_output_token
    assert (step.low, step.value, step.high) == (2.25, 3.0, 3.75)
    assert found.baseline_latency_s == Spread.of([4.0, 6.0, 10.0])
    assert found.latency_s == Spread.of([2.0, 4.0, 4.0])
    assert found.baseline_time_to_first_token_s == Spread.of([1.0, 1.5, 2.5])
    assert found.time_to_first_token_s == Spread.of([1.0, 2.0, 2.0])
    assert found.output_tokens_per_s == Spread.of([12 / 2, 12 / 4, 12 / 4])
    assert found.baseline_output_tokens_per_s == Spread.of([12 / 4, 12 / 6, 12 / 10])


def test_pairs_of_forward_passes(models):
    promise = promise_of(*models, Parts(0.1, 1.0, None, None), THEIRS, replace(OURS, decode_macs=0))
    found = paired_of("dense", models[0], [Times(2.0, []), Times(3.0, [])], [Times(1.0, [])] * 2, 0, promise)
    assert (found.output_tokens_per_s, found.baseline_output_tokens_per_s) == (None, None)
    assert found.time_per_output_token is None
    assert found.latency == found.time_to_first_token
    assert found.latency.value == 2.5


@pytest.mark.parametrize("new_tokens", [3, 0])
def test_figures_of_the_baseline(new_tokens, models):
    promise = promise_of(*models, Parts(0.1, 1.0, 0.5, 3.0), THEIRS, OURS)
    paired = paired_of("dense", models[0], SLOWER, FASTER, 8 * new_tokens, promise)
    alone = Spread.of([1.0, 1.0, 1.0])
    runtime = Runtime("float32", "sdpa", quantization="int8")
    own = EfficiencyResult(
        "sleb", 8, 12, new_tokens, 1, 3, alone, alone, alone, None, alone, paired=paired, runtime=runtime
    )
    found, ours = sides_of(own)
    # Both sides are of the runs in turn: what ran alone, ran at another time.
    assert ours.latency_s == Spread.of([2.0, 4.0, 4.0])
    assert ours.time_to_first_token_s == Spread.of([1.0, 2.0, 2.0])
    assert (ours.time_per_output_token_s, ours.runtime) == (alone, runtime)
    runtime = replace(runtime, quantization=None)
    assert (found.protocol, found.batch_size, found.prompt_tokens, found.new_tokens) == ("sleb", 8, 12, new_tokens)
    assert (found.warmup, found.repeats, found.runtime) == (1, 3, runtime)
    assert found.latency_s == Spread.of([4.0, 6.0, 10.0])
    assert found.time_to_first_token_s == Spread.of([1.0, 1.5, 2.5])
    assert (found.peak_memory_bytes, found.memory, found.paired, found.time_per_output_token_s) == (None,) * 4
    rates = found.output_tokens_per_s
    if not new_tokens:
        assert rates is None
    else:
        assert rates == Spread.of([24 / seconds for seconds in (4.0, 6.0, 10.0)])
        assert ours.output_tokens_per_s == Spread.of([24 / seconds for seconds in (2.0, 4.0, 4.0)])
