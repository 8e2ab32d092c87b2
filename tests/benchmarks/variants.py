"""What sums, means and the layer comparison cost in time: ``python -m tests.benchmarks.variants``.

On SmolLM2-135M in float32, two claims are checked:

* **A search with** ``sum`` **or** ``mean`` **takes at most 1.3 times as long as with** ``keep_top``. Left alone, each
  consolidation would find other windows. To be compared, all do the tries of the ``keep_top`` search: at the published
  threshold (several windows; settled ones are merged again at every try); with a threshold that accepts everything (one
  window that grows through all layers, so that a merged layer is updated at every try and each try runs only two
  layers: the worst case for merging); and with one that rejects everything (every try is a window of its own). The
  memory of the merged layers is counted, too: the one that grows, a settled one while it is run, and one tensor while
  it is added.
* **The CKA matrix of all layers on 32 × 128 tokens takes at most twice the time of the forward passes alone**, which is
  its lower limit.

Every figure is the median of several runs, the things compared taking turns.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from slm_pl.compression.calibration import LayerReplay
from slm_pl.compression.candidates import Candidates
from slm_pl.compression.plan import Consolidation, OtherParameters
from slm_pl.compression.scores import FlattenedCosine
from slm_pl.compression.windows import Window, search_windows
from slm_pl.data import CalibrationSet, CalibrationText, load_calibration
from slm_pl.evaluation.representation import representation_similarity
from slm_pl.loading import load_model, load_tokenizer, resolve
from slm_pl.memory import TensorBytes
from tests.benchmarks.search import MODEL, Check, console, environment, finish

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_MERGING = 1.3
MOST_COMPARING = 2.0
MOST_LAYERS = 2.3
CONSOLIDATIONS: tuple[Consolidation, ...] = ("keep_top", "sum", "mean")
THRESHOLDS = {"published, 0.72": 0.72, "accepts all": -0.99999, "rejects all": 1.0}
Asked = tuple[tuple[Window, ...], int, int]
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


def peak_bytes(run: Callable[[], object], model: "PreTrainedModel") -> int:
    """Most bytes of live tensors beside the weights."""
    with torch.no_grad(), TensorBytes(model) as tensors:
        run()
    return tensors.peak


def searches(repeats: int) -> tuple[list[Check], dict[str, object]]:
    """Times the searches."""
    source = resolve(MODEL)
    model = load_model(source, dtype="float32")
    calibration = load_calibration(CalibrationText(), load_tokenizer(source))
    layer_bytes = sum(p.numel() * p.element_size() for p in model.base_model.layers[0].parameters())
    checks, figures = [], {}
    table = Table("Threshold", "Consolidation", "Tries", "Seconds", "× keep_top", "Memory, layers", title="Searches")
    for name, threshold in THRESHOLDS.items():
        tries = tries_of(model, calibration, threshold)

        def search(consolidation: Consolidation, tries: list[Asked] = tries) -> None:
            other: OtherParameters = "top" if consolidation == "keep_top" else "mean"
            replay = LayerReplay(model, calibration)
            candidates = Candidates(replay, consolidation, other, FlattenedCosine(), lambda _: None)
            for asked in tries:
                candidates.score(*asked)

        with torch.no_grad():
            seconds = in_turn({c: lambda c=c: search(c) for c in CONSOLIDATIONS}, repeats)  # type: ignore[misc]
            peaks = {c: peak_bytes(lambda c=c: search(c), model) for c in CONSOLIDATIONS}  # type: ignore[misc]
        layers = {c: (peaks[c] - peaks["keep_top"]) / layer_bytes for c in CONSOLIDATIONS}
        for c in CONSOLIDATIONS:
            ratio = f"{seconds[c] / seconds['keep_top']:.2f}"
            table.add_row(name, c, str(len(tries)), f"{seconds[c]:.1f}", ratio, f"{layers[c]:.2f}")
        slowest, largest = max(seconds.values()) / seconds["keep_top"], max(layers.values())
        checks += [
            Check(
                f"search with sum or mean / with keep_top: {name}",
                f"{slowest:.2f} x",
                f"<= {MOST_MERGING:g} x",
                slowest <= MOST_MERGING,
            ),
            Check(
                f"memory of merged layers: {name}",
                f"{largest:.2f} layers",
                f"<= {MOST_LAYERS:g} layers",
                largest <= MOST_LAYERS,
            ),
        ]
        figures[name] = {"seconds": seconds, "peak_bytes": peaks, "tries": len(tries), "layer_bytes": layer_bytes}
        table.add_section()
    console.print(table)
    return checks, figures


def tries_of(model: "PreTrainedModel", calibration: CalibrationSet, threshold: float) -> list[Asked]:
    """What the search with ``keep_top`` asks to be scored, in order."""
    with torch.no_grad():
        replay = LayerReplay(model, calibration)
        candidates = Candidates(replay, "keep_top", "top", FlattenedCosine(), lambda _: None)
        search_windows(candidates.score, len(replay.layers), threshold)
    return list(candidates.scores)


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
    figures = {"environment": environment(), "searches": searched_figures, "comparison": compared_figures}
    return finish(checks, figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
