"""Records of models that nobody measured."""

import dataclasses

from slm_pl.evaluation import EfficiencyResult, PeakMemory, PerplexityResult, Spread, TaskResult, ZeroShotResult
from slm_pl.evaluation.efficiency.record import (
    Energy,
    Limit,
    MachinePeak,
    Memory,
    Paired,
    Promise,
    Ratio,
    Runtime,
    Utilisation,
    Work,
)
from slm_pl.results import Environment, ModelIdentity, Results

ENVIRONMENT = Environment(
    packages={"torch": "2.13.0", "python": "3.11.7"},
    device="cpu",
    device_name="a processor",
    threads=2,
    dtype="float32",
    date="2026-11-22T00:00:00+00:00",
    git=None,
    platform="Linux",
)


def spread(value):
    return Spread(median=value, mean=value, stdev=0.1, min=value, max=value)


def record_of(label, plan=None, perplexity=20.0, accuracy=0.6, latency=4.0, base="models/dense", **environment):
    return Results(
        model=ModelIdentity(label, f"models/{label}", base, 24 if plan else 30, 80 if plan else 100, plan),
        environment=dataclasses.replace(ENVIRONMENT, **environment),
        perplexity=[PerplexityResult("embedded", 128, "none", 4064, perplexity, 0.5)],
        zero_shot=ZeroShotResult(
            "lm_eval 0.4.13", {"boolq": TaskResult("acc", accuracy, 0.02, 25, {"acc": accuracy})}, accuracy, 0.02
        ),
        efficiency=[
            EfficiencyResult(
                protocol="shortened_llama",
                batch_size=1,
                prompt_tokens=12,
                new_tokens=128,
                warmup=10,
                repeats=20,
                latency_s=spread(latency),
                time_to_first_token_s=spread(latency / 20),
                output_tokens_per_s=spread(128 / latency),
                peak_memory_bytes=PeakMemory(2**30, "process peak resident set (VmHWM)"),
            )
        ],
    )


def rich_point(latency=4.0, batch_size=1, prompt_tokens=12, new_tokens=128, gpu=False, baseline=None, **changes):
    """A point of which everything was measured: a tenth of the time is the prefill, half of it is the least."""
    made, first = batch_size * new_tokens, latency / 10 if new_tokens else latency
    cache = batch_size * new_tokens * 2**20
    weights, activations, other = 512 * 2**20, 64 * 2**20, 256 * 2**20
    step = (latency - first) / (new_tokens - 1) if new_tokens > 1 else None
    whole = EfficiencyResult(
        protocol="shortened_llama",
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        warmup=10,
        repeats=20,
        latency_s=dataclasses.replace(spread(latency), p90=1.1 * latency, p95=1.2 * latency, p99=1.3 * latency, n=20),
        time_to_first_token_s=spread(first),
        output_tokens_per_s=spread(made / latency) if new_tokens else None,
        peak_memory_bytes=PeakMemory(
            weights + activations + cache + other,
            "torch.cuda.max_memory_allocated" if gpu else "process peak resident set (VmHWM)",
            2**30 if gpu else None,
        ),
        time_per_output_token_s=spread(step) if step else None,
        inter_token_s=dataclasses.replace(spread(step), p99=2 * step, n=20 * 127) if step else None,
        total_tokens_per_s=spread((made + batch_size * prompt_tokens) / latency),
        memory=Memory(weights, activations, cache if new_tokens else None, cache if new_tokens else None, other),
        utilisation=Utilisation(80.0, 800, spread(97.0), spread(40.0), spread(250.0)) if gpu else None,
        energy=Energy(1000.0, 0.39, "the GPU's energy counter") if gpu else None,
        work=Work(1_356_000_000, 14_351_000_000, 113e6, 113.5e6 if new_tokens else None, 23040, 540_000_000),
        machine_peak=MachinePeak(1e11, 2e10, "float32", "2048 x 2048 x 2048", 2**28),
        limit=Limit(first / 4, step and step / 2, latency / 2, 0.25, 0.6 if step else None, 0.5),
        runtime=Runtime("float32", "sdpa", sampling="sampled" if new_tokens else None),
        paired=None if baseline is None else _paired(baseline, new_tokens),
    )
    return dataclasses.replace(whole, **changes)


def lost_point(**setting):
    """A point that did not fit into the memory."""
    reason = "out of memory: the key/value cache alone takes 9.9 GB"
    absent = ("latency_s", "time_to_first_token_s", "output_tokens_per_s", "peak_memory_bytes")
    found = rich_point(**setting)
    return dataclasses.replace(
        EfficiencyResult(found.protocol, found.batch_size, found.prompt_tokens, found.new_tokens, 10, 20, *4 * [None]),
        runtime=found.runtime,
        missing=dict.fromkeys(absent, reason),
    )


def _paired(baseline, new_tokens):
    ratio = Ratio(1.19, 1.17, 1.21, 0.959, 20)
    promise = Promise(1.25, 1.2, 1.18 if new_tokens else None, 1.22, 1.15 if new_tokens else None)
    return Paired(baseline, 30, 100, ratio, ratio, ratio if new_tokens else None, spread(4.8), spread(4.0), promise)


def save(folder, **records):
    paths = []
    for name, record in records.items():
        record.save(folder / name / "results.json")
        paths.append(str(folder / name / "results.json"))
    return paths


def row_of(comparison, start):
    (found,) = [one for one in comparison.rows if one.name.startswith(start)]
    return found


def values_of(comparison, start):
    return [cell.value for cell in row_of(comparison, start).cells]


def marks_of(comparison, start):
    return [cell.mark for cell in row_of(comparison, start).cells]


def reasons_of(comparison, start):
    return [cell.reason for cell in row_of(comparison, start).cells]
