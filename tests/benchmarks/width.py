"""Memory and work of the width methods, speed of what they make: ``python -m tests.benchmarks.width``.

On SmolLM2-135M in float32:

* **LLM-Pruner's Taylor importance**: the peak memory above the weights against that of one backward pass through the
  whole model with w · ∂L/∂w kept for every weight, as the published program does; each in a process of its own,
  measured as in ``tests.benchmarks.search``. Both must keep the same units.
* **FLAP's statistics**: decoder-layer and head forwards, counted with hooks, against the fewest that are possible (each
  layer once); the memory above the weights; and the same metrics as from all inputs of the output maps kept and
  reduced at the end.
* **Prefill after** ``LLMPruner(ratio=0.2, uniform=True)``: 8 prompts of 128 tokens, the time to the first logits
  against that of the dense model, in turn. The limit is in the work: floating-point operations as PyTorch counts them.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from callbacks import FLAP, LLMPruner
from slm_pl.compression import surgery
from slm_pl.compression.plan import KeepChannels, Plan, count_parameters
from slm_pl.data import CalibrationSet
from slm_pl.loading import load_model, resolve
from tests.benchmarks.depth import load
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

MOST_MEMORY = 0.4
LEAST_SPEED_UP = 1.1
RATIO = 0.2
SAMPLES = 10
BATCH, TOKENS = 8, 128
Kept = dict[str, list[int]]


def kept_of(plan: Plan) -> Kept:
    """The units that stay, by layer and group."""
    return {f"{s.layer} {s.group}": list(s.indices) for s in plan.steps if isinstance(s, KeepChannels)}


# The straightforward programs. Nothing of slm_pl's structures, gradients, statistics or surgery is used here.


def straightforward_taylor(model: "PreTrainedModel", calibration: CalibrationSet, plan: Plan) -> Kept:
    """Unit importance after one backward pass over the whole batch; as many units of each layer as the plan keeps."""
    ids = torch.cat(list(calibration))
    for parameter in model.parameters():
        parameter.requires_grad_()
    logits = model(input_ids=ids, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    salience = {id(p): (p * p.grad).detach().abs() for p in model.parameters() if p.grad is not None}
    groups = model.config.num_key_value_heads
    kept: Kept = {}
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        rows = [salience[id(m.weight)].sum(1) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
        rows.append(salience[id(attention.o_proj.weight)].sum(0))
        scores = {"attention": sum((r.view(groups, -1).sum(1) for r in rows), torch.zeros(groups))}
        reading = sum(salience[id(m.weight)].sum(1) for m in (mlp.gate_proj, mlp.up_proj))
        scores["mlp"] = reading + salience[id(mlp.down_proj.weight)].sum(0)
        for group, values in scores.items():
            name = f"{index} {group}"
            if name in kept_of(plan):
                kept[name] = sorted(values.topk(len(kept_of(plan)[name])).indices.tolist())
    for parameter in model.parameters():
        parameter.grad = None
    return kept


@torch.inference_mode()
def straightforward_flap(model: "PreTrainedModel", calibration: CalibrationSet) -> dict[str, Tensor]:
    """The standardised metric of every unit, from all inputs of all output maps kept in memory."""
    inputs: dict[str, list[Tensor]] = {}
    maps = {f"{i} attention": layer.self_attn.o_proj for i, layer in enumerate(model.model.layers)}
    maps |= {f"{i} mlp": layer.mlp.down_proj for i, layer in enumerate(model.model.layers)}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, module in maps.items()
    ]
    for ids in calibration:
        model.model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    metrics = {}
    for name, module in maps.items():
        values = torch.cat([part.flatten(0, 1) for part in inputs[name]]).double()
        metric = values.var(0) * module.weight.double().square().sum(0)
        metric = (metric - metric.mean()) / metric.std()
        units = model.config.num_key_value_heads if "attention" in name else len(metric)
        metrics[name] = metric.view(units, -1).mean(1)
    return metrics


# The comparison.


def probe(method: str, straightforward: bool, plan: Plan | None) -> tuple[Memory, float, object, int]:
    """Peak memory, seconds of a second run, what was found, bytes of the weights; called in a fresh process."""
    model, text = load("embedded", SAMPLES)
    seconds: list[float] = []
    found: list[object] = []

    def work() -> None:
        with Stopwatch() as watch:
            if not straightforward:
                found[:] = [(LLMPruner(RATIO) if method == "taylor" else FLAP(RATIO)).plan(model, text)]
            elif method == "taylor":
                assert plan is not None
                found[:] = [straightforward_taylor(model, text, plan)]
            else:
                found[:] = [straightforward_flap(model, text)]
        seconds.append(watch.seconds)

    with torch.set_grad_enabled(straightforward):
        memory = memory_of(model, work)
    return memory, seconds[-1], found[0], sum(p.numel() * p.element_size() for p in model.parameters())


def in_fresh_process(method: str, straightforward: bool, plan: Plan | None = None) -> tuple[Memory, float, object, int]:
    """Runs :func:`probe` where nothing ran before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(probe, method, straightforward, plan).result()


def show(title: str, results: dict[str, tuple[Memory, float, object, int]]) -> None:
    """A table of memory and time."""
    weights = next(iter(results.values()))[3]
    table = Table("", *results, title=title)
    table.add_row("peak memory above the weights", *(f"{r[0].peak / MB:,.0f} MB" for r in results.values()))
    table.add_row("in shares of the weights", *(f"{r[0].peak / weights:.2f}" for r in results.values()))
    table.add_row("of it live tensors", *(f"{r[0].tensors / MB:,.0f} MB" for r in results.values()))
    table.add_row("seconds", *(f"{r[1]:.1f}" for r in results.values()))
    console.print(table)


def figures_of(results: dict[str, tuple[Memory, float, object, int]]) -> dict[str, object]:
    """The same for a file."""
    return {name: {"memory": asdict(r[0]), "seconds": r[1], "weights_bytes": r[3]} for name, r in results.items()}


def taylor() -> tuple[list[Check], dict[str, object]]:
    """LLM-Pruner's importance."""
    ours = in_fresh_process("taylor", False)
    assert isinstance(ours[2], Plan)
    results = {"layer by layer": ours, "straightforward": in_fresh_process("taylor", True, ours[2])}
    show(f"LLM-Pruner's Taylor importance, {SAMPLES} x {TOKENS} tokens", results)
    found, expected = kept_of(ours[2]), results["straightforward"][2]
    assert isinstance(expected, dict)
    differing = sum(len(set(found[name]) ^ set(expected[name])) // 2 for name in found)
    units = sum(len(left) for left in found.values())
    peak, weights = ours[0].peak, ours[3]
    return [
        Check(
            "LLM-Pruner: units kept that straightforward importance would not keep",
            f"{differing} of {units:,} in {len(found)} structures",
            "<= 1 in 10,000 (ties within rounding)",
            differing <= units / 10_000 and found.keys() == expected.keys(),
        ),
        Check(
            "LLM-Pruner: peak memory above the weights / weights",
            f"{peak / weights:.2f}",
            f"<= {MOST_MEMORY:g}",
            peak <= MOST_MEMORY * weights,
        ),
    ], figures_of(results)


def flap() -> tuple[list[Check], dict[str, object]]:
    """FLAP's statistics."""
    results = {"one pass": in_fresh_process("flap", False), "all inputs kept": in_fresh_process("flap", True)}
    show(f"FLAP, {SAMPLES} x {TOKENS} tokens", results)
    plan, metrics = results["one pass"][2], results["all inputs kept"][2]
    assert isinstance(plan, Plan)
    assert isinstance(metrics, dict)
    rows = {f"{row['layer']} {row['group']}": torch.tensor(row["scores"], dtype=torch.float64) for row in plan.trace}
    difference = max((rows[name] - metrics[name]).abs().max().item() for name in metrics)
    model, text = load("embedded", SAMPLES)
    calls = {"layers": 0, "head": 0}

    def count(name: str) -> None:
        calls[name] += 1

    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: count("layers"))
    model.lm_head.register_forward_hook(lambda *_: count("head"))
    with torch.no_grad():
        FLAP(RATIO).plan(model, text)
    fewest = len(model.model.layers) * len(list(text))
    return [
        Check(
            "FLAP: largest difference of a standardised metric",
            f"{difference:.1e}",
            "<= 1e-04",
            difference <= 1e-4 and rows.keys() == metrics.keys(),
        ),
        Check(
            "FLAP: layer forwards, head forwards",
            f"{calls['layers']}, {calls['head']}",
            f"{fewest} (each layer once a batch), 0",
            calls == {"layers": fewest, "head": 0},
        ),
    ], {**figures_of(results), "forwards": calls, "largest_difference": difference}


@torch.inference_mode()
def prefill(repeats: int) -> tuple[list[Check], dict[str, object]]:
    """Speed after uniform pruning."""
    dense, (pruned, text) = load_model(resolve(MODEL), dtype="float32"), load("embedded", SAMPLES)
    with torch.no_grad():
        plan = LLMPruner(RATIO, uniform=True, importance="magnitude").plan(pruned, text)
    before = count_parameters(pruned)
    surgery.apply(pruned, plan)
    removed = 1 - count_parameters(pruned) / before
    ids = torch.randint(0, dense.config.vocab_size, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    models = {"dense": dense, "uniform": pruned}
    work: dict[str, float] = {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, logits_to_keep=1)
        work[name] = float(counter.get_total_flops())
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with Stopwatch() as watch:
        for turn in range(repeats + 1):
            for name, model in models.items() if turn % 2 else reversed(models.items()):
                start = time.perf_counter()
                model(input_ids=ids, logits_to_keep=1)
                if turn:  # the first is the warm-up
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    table = Table("", *models, title=f"Prefill, {BATCH} x {TOKENS} tokens, {repeats} turns")
    table.add_row("seconds, median", *(f"{value:.3f}" for value in medians.values()))
    table.add_row("fastest to slowest", *(f"{min(v):.3f} to {max(v):.3f}" for v in seconds.values()))
    table.add_row("GFLOPs", *(f"{value / 1e9:,.0f}" for value in work.values()))
    table.add_row("parameters", *(f"{count_parameters(model) / 1e6:,.1f} M" for model in models.values()))
    config = pruned.config
    table.add_row("heads, KV heads, intermediate", "9, 3, 1536", f"{config.num_attention_heads}, "
                  f"{config.num_key_value_heads}, {config.intermediate_size}")  # fmt: skip
    table.add_row("other load meanwhile", percent(watch.other_load), "")
    console.print(table)
    if (watch.other_load or 0.0) > QUIET:
        console.print("[yellow]Other programs kept the machine busy: do not trust the wall times, run again.[/]")
    speed_up = medians["dense"] / medians["uniform"]
    return [
        Check(
            f"Prefill with {removed:.2%} of the parameters removed, speed-up",
            f"{speed_up:.2f} x ({work['dense'] / work['uniform']:.2f} x fewer operations)",
            f">= {LEAST_SPEED_UP:g} x",
            speed_up >= LEAST_SPEED_UP,
        )
    ], {"seconds": seconds, "flops": work, "removed": removed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark from the command line; exit code 1 if a check failed, 2 if it could not run."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.width",
        description="Memory and work of the width methods, speed of what they make.",
    )
    parser.add_argument("--repeats", type=int, default=15, help="of the prefill (%(default)s)")
    parser.add_argument("--only", choices=("taylor", "flap", "prefill"), help="run this part alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    return run_parts(
        {"taylor": taylor, "flap": flap, "prefill": lambda: prefill(options.repeats)}, options.only, options.json
    )


if __name__ == "__main__":
    sys.exit(main())
