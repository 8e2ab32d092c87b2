"""Speed of SLEB and memory of Shortened LLaMA's Taylor criterion: ``python -m tests.benchmarks.depth``.

On SmolLM2-135M in float32, against straightforward programs that are written here on their own:

* **SLEB removing 6 of 30 layers** against a loop that, for every candidate of every phase, takes the layer out and
  runs the whole model, one window at a time, as the published program does. Both must decide the same. The same loop
  with all windows in one pass is timed, too: how much of the gain is batching, and how much is work that is not done.
  Checked are the decisions, the decoder-layer forwards (counted with hooks) and the time over the published loop. The
  limit is in the work: the language-model head, which weighs as much as eight layers of this model, runs just as often.
* **Taylor scores of all layers**: the peak memory above the weights against that of one backward pass through the whole
  model with w · ∂L/∂w kept for every weight, as the published program does; each in a process of its own, measured as
  in ``tests.benchmarks.search``. Both must give the same order.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import Tensor, nn

from callbacks import SLEB, ShortenedLLaMA
from slm_pl.console import progress
from slm_pl.data import CalibrationSet, CalibrationText, load_calibration
from slm_pl.loading import load_model, load_tokenizer, resolve
from tests.benchmarks.search import (
    MB,
    MODEL,
    QUIET,
    Check,
    Memory,
    Stopwatch,
    console,
    memory_of,
    percent,
    run_parts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_FEWER_FORWARDS = 1.8
LEAST_SPEED_UP = 1.6
MOST_MEMORY = 0.4
TOLERANCE = 1e-5
REMOVED = 6


def load(calibration: str, samples: int) -> tuple["PreTrainedModel", CalibrationSet]:
    """SmolLM2 in float32 and the calibration set."""
    source = resolve(MODEL)
    text = CalibrationText(calibration, samples=samples)
    return load_model(source, dtype="float32"), load_calibration(text, load_tokenizer(source))


# The straightforward programs. Nothing of slm_pl's sweep, replay, gradients or surgery is used here.

Phases = list[dict[int, float]]


@torch.inference_mode()
def straightforward_sleb(model: "PreTrainedModel", batches: Sequence[Tensor], advance: Callable[[str], None]) -> Phases:
    """Greedy removal by full passes; the losses of every phase, nats per token."""
    layers = list(model.model.layers)
    alive = list(range(len(layers)))
    phases: Phases = []
    try:
        for _ in range(REMOVED):
            losses: dict[int, float] = {}
            for candidate in alive[1:-1]:
                model.model.layers = nn.ModuleList(layers[index] for index in alive if index != candidate)
                model.config.num_hidden_layers = len(alive) - 1
                total, tokens = 0.0, 0
                for ids in batches:
                    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
                    targets = ids[:, 1:].flatten()
                    total += nn.functional.cross_entropy(logits, targets).item() * len(targets)
                    tokens += len(targets)
                losses[candidate] = total / tokens
                advance(f"without layer {candidate}")
            phases.append(losses)
            alive.remove(min(losses, key=losses.__getitem__))
    finally:
        model.model.layers = nn.ModuleList(layers)
        model.config.num_hidden_layers = len(layers)
    return phases


def straightforward_taylor(model: "PreTrainedModel", calibration: CalibrationSet) -> list[float]:
    """The score of every layer after one backward pass over the whole batch."""
    ids = torch.cat(list(calibration))
    for parameter in model.parameters():
        parameter.requires_grad_()
    logits = model(input_ids=ids, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    salience = {p: (p * p.grad).detach() for p in model.parameters() if p.grad is not None}
    scores = [sum(salience[p].abs().sum().item() for p in layer.parameters()) for layer in model.model.layers]
    for parameter in model.parameters():
        parameter.grad = None
    return scores


def probe_taylor(calibration: str, samples: int, straightforward: bool) -> tuple[Memory, float, list[float], int]:
    """Peak memory, seconds of a second run, scores and bytes of the weights; to be called in a fresh process."""
    model, text = load(calibration, samples)
    seconds: list[float] = []
    scores: list[float] = []

    def work() -> None:
        with Stopwatch() as watch:
            if straightforward:
                scores[:] = straightforward_taylor(model, text)
            else:
                plan = ShortenedLLaMA("taylor", REMOVED).plan(model, text)
                scores[:] = [float(row["score"]) for row in plan.trace]  # type: ignore[arg-type]
        seconds.append(watch.seconds)

    with torch.set_grad_enabled(straightforward):
        memory = memory_of(model, work)
    return memory, seconds[-1], scores, sum(p.numel() * p.element_size() for p in model.parameters())


# The comparison.


def sleb(options: argparse.Namespace) -> tuple[list[Check], dict[str, object]]:
    """SLEB against the loops."""
    model, calibration = load(options.calibration, options.samples)
    windows = [sample[None] for batch in calibration for sample in batch]
    layers = list(model.model.layers)
    calls = [0]
    handles = [layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1)) for layer in layers]

    with torch.inference_mode():
        for ids in (windows[0], torch.cat(windows)):
            model(input_ids=ids, use_cache=False)  # warm-up
    found: dict[str, Phases] = {}
    forwards: dict[str, float] = {}
    watches: dict[str, Stopwatch] = {}

    def loop(name: str, batches: list[Tensor]) -> None:
        steps = sum(len(layers) - 2 - phase for phase in range(REMOVED))
        before = calls[0]
        with progress(f"Straightforward, {name}", steps) as advance, Stopwatch() as watches[name]:
            found[name] = straightforward_sleb(model, batches, advance)
        forwards[name] = (calls[0] - before) / len(batches)

    published, batched = "one window a pass", "all windows a pass"
    loop(published, windows)
    # Between the two, so that a machine that becomes slower or faster is no advantage.
    before = calls[0]
    with torch.no_grad(), Stopwatch() as watches["SLEB"]:
        plan = SLEB(REMOVED).plan(model, calibration)
    chunked = calls[0] - before
    loop(batched, [torch.cat(windows)])
    for handle in handles:
        handle.remove()
    rows = [(int(row["phase"]), int(row["layer"]), float(row["score"])) for row in plan.trace]  # type: ignore[arg-type]
    found["SLEB"] = [{layer: score for number, layer, score in rows if number == phase} for phase in range(REMOVED)]
    forwards["SLEB"] = float(plan.outcome["layer_forwards"])  # type: ignore[arg-type]

    orders = {name: [min(phase, key=phase.__getitem__) for phase in phases] for name, phases in found.items()}
    difference = max(
        abs(one[layer] / other[layer] - 1)
        for name in (published, batched)
        for one, other in zip(found["SLEB"], found[name], strict=True)
        for layer in other
    )
    seconds = {name: watch.seconds for name, watch in watches.items()}
    # The hooks also see the pass over one sample that measures its memory.
    consistent = chunked - len(layers) == forwards["SLEB"]  # one chunk
    fewer = forwards[published] / forwards["SLEB"]
    table = Table("", "SLEB", f"loop, {published}", f"loop, {batched}", title=f"Removing {REMOVED} of {len(layers)}")
    order = ("SLEB", published, batched)
    table.add_row("seconds", *(f"{seconds[name]:.1f}" for name in order))
    table.add_row("layer forwards of a window", *(f"{forwards[name]:,.0f}" for name in order))
    heads = int(plan.outcome["head_forwards"])  # type: ignore[call-overload]
    table.add_row("head forwards of a window", f"{heads}", f"{heads - 1}", f"{heads - 1}")
    table.add_row("other load meanwhile", *(percent(watches[name].other_load) for name in order))
    table.add_row("order", *(" ".join(map(str, orders[name])) for name in order))
    console.print(table)
    checks = [
        Check(
            "SLEB: same decisions, largest relative difference of losses",
            f"{'same' if len({*map(tuple, orders.values())}) == 1 else 'DIFFERENT'} order, {difference:.1e}",
            f"same, <= {TOLERANCE:.0e}",
            len({*map(tuple, orders.values())}) == 1 and difference <= TOLERANCE,
        ),
        Check(
            "SLEB: layer forwards, straightforward / sweep (hooks agree with the plan)",
            f"{fewer:.2f} x ({'yes' if consistent else 'NO'})",
            f">= {LEAST_FEWER_FORWARDS:g} x",
            fewer >= LEAST_FEWER_FORWARDS and consistent,
        ),
        Check(
            "SLEB: speed-up over the published loop",
            f"{seconds[published] / seconds['SLEB']:.2f} x "
            f"({seconds[batched] / seconds['SLEB']:.2f} x over the loop with all windows in a pass)",
            f">= {LEAST_SPEED_UP:g} x",
            seconds[published] / seconds["SLEB"] >= LEAST_SPEED_UP,
        ),
    ]
    golden = expected_order(options.calibration)
    if golden is not None:
        checks.append(Check("SLEB: recorded order", str(orders["SLEB"]), str(golden), orders["SLEB"] == golden))
    if max(watch.other_load or 0.0 for watch in watches.values()) > QUIET:
        console.print("[yellow]Other programs kept the machine busy: do not trust the wall times, run again.[/]")
    figures = {"seconds": seconds, "layer_forwards": forwards, "head_forwards": heads, "orders": orders}
    return checks, {**figures, "windows": len(windows), "largest_difference": difference}


def expected_order(calibration: str) -> list[int] | None:
    """The removal order in a recorded result, where the calibration file is one."""
    if not calibration.endswith(".json"):
        return None
    content = json.loads(Path(calibration).read_text(encoding="utf-8"))
    return content.get("removal_order") if isinstance(content, dict) else None


def taylor(options: argparse.Namespace) -> tuple[list[Check], dict[str, object]]:
    """Memory of the Taylor scores."""
    results = {}
    for name, straightforward in (("layer by layer", False), ("straightforward", True)):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            # The published calibration: ten samples of 128 tokens.
            results[name] = pool.submit(probe_taylor, "embedded", 10, straightforward).result()
    weights = results["straightforward"][3]
    table = Table("", *results, title="Taylor scores of all layers, 10 x 128 tokens")
    table.add_row("peak memory above the weights", *(f"{r[0].peak / MB:,.0f} MB" for r in results.values()))
    table.add_row("in shares of the weights", *(f"{r[0].peak / weights:.2f}" for r in results.values()))
    table.add_row("of it live tensors", *(f"{r[0].tensors / MB:,.0f} MB" for r in results.values()))
    table.add_row("seconds", *(f"{r[1]:.1f}" for r in results.values()))
    console.print(table)
    memory, _, scores, _ = results["layer by layer"]
    other = results["straightforward"][2]
    ranked, expected = (sorted(range(len(s)), key=s.__getitem__) for s in (scores, other))
    difference = max(abs(a / b - 1) for a, b in zip(scores, other, strict=True))
    gap = min(b / a - 1 for a, b in itertools.pairwise(sorted(other)))
    checks = [
        Check(
            "Taylor: same order, largest relative difference of scores",
            f"{'same' if ranked == expected else 'DIFFERENT'}, {difference:.1e} (smallest gap {gap:.1e})",
            "same, <= 1e-03",
            ranked == expected and difference <= 1e-3,
        ),
        Check(
            "Taylor: peak memory above the weights / weights",
            f"{memory.peak / weights:.2f}",
            f"<= {MOST_MEMORY:g}",
            memory.peak <= MOST_MEMORY * weights,
        ),
    ]
    figures = {
        name: {"memory": asdict(r[0]), "seconds": r[1], "scores": r[2], "weights_bytes": r[3]}
        for name, r in results.items()
    }
    return checks, {**figures, "median_score": statistics.median(scores)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark from the command line; exit code 1 if a check failed, 2 if it could not run."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.depth", description="Speed of SLEB and memory of the Taylor criterion."
    )
    parser.add_argument("--calibration", default="embedded", metavar="FILE", help="of SLEB: a .json of token ids")
    parser.add_argument("--samples", type=int, default=4, help="of SLEB: windows of 128 tokens (%(default)s)")
    parser.add_argument("--only", choices=("sleb", "taylor"), help="run this part alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    return run_parts({"taylor": lambda: taylor(options), "sleb": lambda: sleb(options)}, options.only, options.json)


if __name__ == "__main__":
    sys.exit(main())
