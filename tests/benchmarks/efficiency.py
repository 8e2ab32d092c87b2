"""Whether a smaller SmolLM2-135M is as much faster as it should be: ``python -m tests.benchmarks.efficiency``.

The dense model and a smaller one run in turn in one process, as ``main.py test --baseline`` does, batch 1, Shortened
LLaMA's prompt (10 tokens here):

* **depth**: 30 -> 24 decoder layers. A decode step must be at least 0.9 times as many times as fast as
  ``(30 t + h) / (24 t + h)``, t and h being the dense model's own median times of a layer and of the head in a decode
  step. Everything else of a step (sampling, the loop of ``generate``, the cache) counts against it.
* **width**: ``LLMPruner(ratio=0.2, uniform=True)``, beside the ratio of the bytes that a step reads.
* **same**: the dense model against itself; the interval must hold 1 (or the ratio be within 2 %), or the measurement
  favours a side.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress
from rich.table import Table

from callbacks import LayerRemoval, LLMPruner
from slm_pl.compression import surgery
from slm_pl.compression.plan import Plan
from slm_pl.data import CalibrationSet
from slm_pl.evaluation.efficiency.measuring import Settings, compare_point, measure_point
from slm_pl.evaluation.efficiency.prompts import Prompts
from slm_pl.evaluation.efficiency.protocols import PISA, grid, with_lengths
from slm_pl.evaluation.efficiency.record import EfficiencyResult, Paired, Ratio
from slm_pl.evaluation.efficiency.work import machine_peak
from slm_pl.loading import load_model, load_tokenizer, resolve
from tests.benchmarks.depth import load
from tests.benchmarks.search import MODEL, QUIET, Check, Stopwatch, console, percent, run_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Planner = Callable[[PreTrainedModel, CalibrationSet], Plan]

LEAST_OF_PROMISE = 0.9
REMOVED = [18, 19, 20, 21, 22, 23]
RATIO = 0.2


def pair(
    name: str, planner: "Planner | None", options: argparse.Namespace
) -> tuple[EfficiencyResult, Paired, float | None]:
    """Measures a smaller model alone, then in turn with the dense one."""
    source = resolve(MODEL)
    tokenizer, dense = load_tokenizer(source), load_model(source, dtype="float32")
    model, text = load("embedded", 10)
    if planner is not None:
        with torch.no_grad():
            plan = planner(model, text)
        surgery.apply(model, plan)
    rules, points = grid(None, [1], None, [options.new_tokens], options.repeats)
    prompts = Prompts(tokenizer, [PISA])
    (point,) = with_lengths(points, prompts.text_tokens)
    settings = Settings(rules, prompts, warmup=2)
    peak = machine_peak(torch.device("cpu"), torch.float32)
    with Progress(console=console, transient=True) as bar, Stopwatch() as watch:
        task = bar.add_task(name, total=2 * (2 + options.repeats) + 1)
        alone, _ = measure_point(model, tokenizer, point, settings, peak, lambda _: bar.advance(task))
        found = compare_point(dense, "dense", model, tokenizer, point, settings, lambda _: bar.advance(task))
    assert isinstance(found, Paired), found
    return alone, found, watch.other_load


def show(name: str, alone: EfficiencyResult, found: Paired, load: float | None) -> None:
    """Prints the figures beside what there is to expect."""
    promise, limit = found.promise, alone.limit
    assert promise is not None
    assert found.time_per_output_token is not None
    assert limit is not None
    table = Table(
        "", "measured", "by layer and head times", "by work",
        title=f"{name}: dense over smaller, batch 1, {alone.prompt_tokens} + {alone.new_tokens} tokens, "
        f"{found.latency.pairs} pairs",
    )  # fmt: skip
    macs, decoded = f"{promise.prefill_macs:.2f} x (operations)", f"{promise.decode_bytes:.2f} x (bytes)"
    table.add_row(
        "time to first token", text_of(found.time_to_first_token), times_text(promise.prefill_layer_times), macs
    )
    table.add_row("decode step", text_of(found.time_per_output_token), times_text(promise.decode_layer_times), decoded)
    table.add_row("whole run", text_of(found.latency), "", "")
    table.add_row("layers", f"{found.num_layers} dense", f"{promise.layers:.2f} x", "")
    console.print(table)
    console.print(
        f"Alone, it takes {latency(alone):.3f} s, and its work {limit.latency_s:.3f} s at the least "
        f"({limit.latency_share:.0%}); a decode step moves {limit.decode_bandwidth_share:.0%} of the bytes per second "
        f"of a copy. Other load meanwhile: {percent(load)}"
    )
    if (load or 0.0) > QUIET:
        console.print("[yellow]Other programs kept the machine busy: run again.[/]")


def latency(alone: EfficiencyResult) -> float:
    """Median seconds of a run."""
    assert alone.latency_s is not None
    return alone.latency_s.median


def times_text(ratio: float | None) -> str:
    """What the times of the layers promise; nothing of layers that differ."""
    return "–" if ratio is None else f"{ratio:.2f} x"


def text_of(ratio: Ratio) -> str:
    """A ratio with its interval."""
    return f"{ratio.value:.3f} x [{ratio.low:.3f}, {ratio.high:.3f}]"


def depth(options: argparse.Namespace) -> tuple[list[Check], dict[str, object]]:
    """30 -> 24 layers."""
    alone, found, load = pair("depth", LayerRemoval(layers=REMOVED).plan, options)
    show("30 -> 24 layers", alone, found, load)
    assert found.time_per_output_token is not None
    assert found.promise is not None
    assert found.promise.decode_layer_times is not None
    share = found.time_per_output_token.value / found.promise.decode_layer_times
    name = "Decode speed-up, share of what the layer and head times predict"
    check = Check(name, f"{share:.3f}", f">= {LEAST_OF_PROMISE:g}", share >= LEAST_OF_PROMISE)
    return [check], {"alone": plain(alone), "paired": plain(found), "share_of_promise": share, "other_load": load}


def width(options: argparse.Namespace) -> tuple[list[Check], dict[str, object]]:
    """A fifth of the parameters less in all layers."""
    planner = LLMPruner(RATIO, uniform=True, importance="magnitude").plan
    alone, found, load = pair("width", planner, options)
    show("20 % narrower", alone, found, load)
    step = found.time_per_output_token
    assert step is not None
    check = Check("A narrower model's decode steps are faster", text_of(step), "interval above 1", step.low > 1)
    return [check], {"alone": plain(alone), "paired": plain(found), "other_load": load}


def same(options: argparse.Namespace) -> tuple[list[Check], dict[str, object]]:
    """The dense model against itself."""
    alone, found, load = pair("same", None, options)
    show("the same model", alone, found, load)
    ratio = found.latency
    fair = ratio.low <= 1 <= ratio.high or abs(ratio.value - 1) < 0.02  # an interval misses one time in twenty
    check = Check("The dense model against itself", text_of(ratio), "1 is inside, or less than 2 % away", fair)
    return [check], {"alone": plain(alone), "paired": plain(found), "other_load": load}


def plain(record: EfficiencyResult | Paired) -> dict[str, object]:
    """A record as JSON."""
    return dataclasses.asdict(record)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark from the command line; exit code 1 if a check failed, 2 if it could not run."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.efficiency",
        description="Speed of smaller models against what their layers and bytes promise.",
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="of a run (%(default)s)")
    parser.add_argument("--repeats", type=int, default=12, help="pairs of runs (%(default)s)")
    parser.add_argument("--only", choices=("depth", "width", "same"), help="run this part alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    parts = {"depth": depth, "width": width, "same": same}
    return run_parts(
        {name: lambda part=part: part(options) for name, part in parts.items()},  # type: ignore[misc]
        options.only,
        options.json,
    )


if __name__ == "__main__":
    sys.exit(main())
