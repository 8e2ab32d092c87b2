"""Records of models that nobody measured."""

import dataclasses

from slm_pl.evaluation import EfficiencyResult, PeakMemory, PerplexityResult, Spread, TaskResult, ZeroShotResult
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
