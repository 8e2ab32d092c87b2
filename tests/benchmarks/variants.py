"""What sums, means and the layer comparison cost in time: ``python -m tests.benchmarks.variants``.

On SmolLM2-135M in float32, two claims are checked:

* **A search with** ``sum`` **or** ``mean`` **takes at most 1.3 times as long as with** ``keep_top``. To be compared,
  all three must do the same tries: with a threshold that accepts everything (one window that grows through all layers,
  so that a merged layer is updated at every try and each try runs only two layers: the worst case for merging), and
  with one that rejects everything (every try is a window of its own). The published threshold leads each consolidation
  to other windows; there the seconds for each layer forward are compared.
* **The CKA matrix of all layers on 32 × 128 tokens takes at most twice the time of the forward passes alone**, which is
  its lower limit.

Every figure is the median of several runs, the things compared taking turns.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table

from callbacks import SlidingWindowMerging
from slm_pl.compression.plan import Consolidation
from slm_pl.data import CalibrationText, load_calibration
from slm_pl.evaluation.representation import representation_similarity
from slm_pl.loading import load_model, load_tokenizer, resolve
from tests.benchmarks.search import MODEL, Check, console, environment

MOST_MERGING = 1.3
MOST_COMPARING = 2.0
CONSOLIDATIONS: tuple[Consolidation, ...] = ("keep_top", "sum", "mean")
THRESHOLDS = {"accepts all": -0.99999, "rejects all": 1.0, "published, 0.72": 0.72}
SAMPLES = 32


def in_turn(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, after one uncounted run of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def searches(repeats: int) -> tuple[list[Check], dict[str, object]]:
    """Times the searches."""
    source = resolve(MODEL)
    model = load_model(source, dtype="float32")
    calibration = load_calibration(CalibrationText(), load_tokenizer(source))
    checks, figures = [], {}
    table = Table("Threshold", "Consolidation", "Tries", "Layer forwards", "Seconds", "× keep_top", title="Searches")
    for name, threshold in THRESHOLDS.items():
        plans = {}

        def search(consolidation: Consolidation, threshold: float = threshold, plans: dict = plans) -> None:
            other: Literal["top", "mean"] = "top" if consolidation == "keep_top" else "mean"
            method = SlidingWindowMerging(threshold, consolidation=consolidation, other_parameters=other)
            plans[consolidation] = method.plan(model, calibration)

        with torch.no_grad():
            seconds = in_turn({c: lambda c=c: search(c) for c in CONSOLIDATIONS}, repeats)  # type: ignore[misc]
        forwards = {c: plan.outcome["layer_forwards"] for c, plan in plans.items()}
        same = len({tuple((t["low"], t["high"]) for t in plan.trace) for plan in plans.values()}) == 1
        each = {c: seconds[c] / (1 if same else forwards[c]) for c in CONSOLIDATIONS}
        for c in CONSOLIDATIONS:
            ratio = f"{each[c] / each['keep_top']:.2f}" + ("" if same else " for each layer forward")
            table.add_row(name, c, str(len(plans[c].trace)), str(forwards[c]), f"{seconds[c]:.1f}", ratio)
        largest = max(each[c] / each["keep_top"] for c in CONSOLIDATIONS)
        what = "search with sum or mean / with keep_top" + ("" if same else ", for each layer forward")
        checks.append(Check(f"{what}: {name}", f"{largest:.2f} x", f"<= {MOST_MERGING:g} x", largest <= MOST_MERGING))
        figures[name] = {"seconds": seconds, "layer_forwards": forwards, "same_tries": same}
        table.add_section()
    console.print(table)
    return checks, figures


def comparison(repeats: int) -> tuple[list[Check], dict[str, object]]:
    """Times the CKA matrix against the forward passes it needs."""
    source = resolve(MODEL)
    model = load_model(source, dtype="float32")
    samples = torch.randint(1000, 20000, (SAMPLES, 128), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def forwards() -> None:
        for ids in samples:
            model.base_model(input_ids=ids[None], use_cache=False)

    seconds = in_turn(
        {
            "forward passes alone": forwards,
            "linear": lambda: representation_similarity(model, samples, "linear"),
            "rbf": lambda: representation_similarity(model, samples, "rbf"),
        },
        repeats,
    )
    alone = seconds["forward passes alone"]
    table = Table("What", "Seconds", "× forward passes", title=f"Comparing all layers, {SAMPLES} × 128 tokens")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.2f}", f"{value / alone:.2f}")
    console.print(table)
    checks = [
        Check(
            f"CKA matrix, {kernel} / forward passes",
            f"{seconds[kernel] / alone:.2f} x",
            f"<= {MOST_COMPARING:g} x",
            seconds[kernel] <= MOST_COMPARING * alone,
        )
        for kernel in ("linear", "rbf")
    ]
    return checks, {"seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark from the command line; exit code 1 if a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.variants", description="What sums, means and the layer comparison cost."
    )
    parser.add_argument("--repeats", type=int, default=1, help="counted runs of each (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; give at least 1")
    compared, compared_figures = comparison(max(options.repeats, 3))
    searched, searched_figures = searches(options.repeats)
    checks = [*searched, *compared]
    for check in checks:
        verdict = "[green]PASS[/]" if check.passed else "[red]FAIL[/]"
        console.print(f"{verdict} {check.name}: {check.value} (limit: {check.limit})", soft_wrap=True)
    if options.json is not None:
        figures = {"environment": environment(), "searches": searched_figures, "comparison": compared_figures}
        options.json.write_text(json.dumps({**figures, "checks": [asdict(c) for c in checks]}, indent=2) + "\n")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
