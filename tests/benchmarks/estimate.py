"""What ``main.py estimate`` says against the clock: ``python -m tests.benchmarks.estimate``.

SmolLM2-135M on this computer, in float32. The peaks of the computer are measured first; then every phase is estimated
at 40 % of them and run: searches of seven methods and the fits of least squares, training, perplexity, zero-shot
questions, generation. What is loaded or tokenised is not timed, as it is not estimated. Training is the difference
between a run of 15 steps and one of 5. Of searches and fits, the peak of the process' memory above the weights is
measured, too. The exit code is 1 if an estimate is off by more than ``--factor``, or more
memory was taken by more than ``--factor``.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from slm_pl.compression.least_squares import fit_outputs
from slm_pl.data import load_calibration, load_evaluation
from slm_pl.data.corpora import joined
from slm_pl.estimate.command import machine_of
from slm_pl.estimate.costs import Machine
from slm_pl.estimate.run import data_of, estimate, objects_of
from slm_pl.evaluation.efficiency.memory import PeakMeter
from slm_pl.evaluation.perplexity import perplexity
from slm_pl.evaluation.zero_shot import zero_shot
from slm_pl.loading import load_model, load_tokenizer, resolve
from slm_pl.trainer_cli import whole_config
from tests.benchmarks.search import MODEL
from tests.benchmarks.zero_shot import timed

UTILISATION = 0.4
SEARCHES = (
    "slm",
    "sleb",
    "shortened_perplexity",
    "shortened_taylor",
    "block_influence",
    "llm_pruner",
    "wanda_structured",
)
STEPS = (5, 15)


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def expected(name: str, run: dict[str, Any], machine: Machine) -> dict[str, float]:
    """Estimated seconds by phase."""
    return {phase.name: phase.seconds(machine, UTILISATION) for phase in estimate(name, run).phases}


def peak_of(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and bytes of memory that were not taken before."""
    meter = PeakMeter(torch.device("cpu"))
    meter.clear()
    meter.reset()
    before, reason = meter.read()
    took = seconds(work)
    after, _ = meter.read()
    if before is None or after is None:
        raise RuntimeError(reason)
    return took, after.max - before.max


def searched(path: str, machine: Machine) -> dict[str, tuple[float, float, float, float]]:
    """Of a config's search and fits: estimated and measured seconds, and the same of bytes above the weights."""
    run = whole_config("fit", path, names_data=False)
    phases = {phase.name: phase for phase in estimate(path, run).phases}
    method: Any = next(c for c in objects_of(run["trainer"]["callbacks"]) if hasattr(c, "decide"))
    data, tokenizer = data_of(run["data"]), load_tokenizer(resolve(MODEL))
    model = load_model(resolve(MODEL), dtype="float32")
    calibration = load_calibration(data.calibration, tokenizer)
    fitting = joined([load_calibration(text, tokenizer) for text in data.fitting or [data.calibration]])
    plans: list[Any] = []
    weights = sum(p.nbytes for p in model.parameters())
    for parameter in model.parameters():
        float(parameter.detach().sum())  # from the file, which would count as memory that the search takes
    with torch.no_grad():
        took = {"search": peak_of(lambda: plans.append(method.plan(model, calibration)))}
        if method.refit is not None:
            took["least squares"] = peak_of(lambda: fit_outputs(model, plans[0], fitting, method.refit))
    return {
        name: (phases[name].seconds(machine, UTILISATION), value, phases[name].memory - weights, most)
        for name, (value, most) in took.items()
    }


def trained(work: Path, machine: Machine) -> tuple[float, float]:
    """Estimated and measured seconds of ten steps of the quickstart's recovery, on all layers."""
    said, took = [], []
    for steps in STEPS:
        run = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
        run["data"]["val_size"] = 0
        run["trainer"] |= {"callbacks": [], "max_steps": steps, "val_check_interval": 1.0, "max_epochs": 9}
        run["trainer"] |= {"default_root_dir": str(work / str(steps)), "logger": False, "enable_checkpointing": False}
        path = work / f"{steps}.yaml"
        path.write_text(yaml.safe_dump(run))
        said.append(expected(path.stem, whole_config("fit", str(path), names_data=False), machine)["recovery"])
        command = [sys.executable, "main.py", "fit", "--config", str(path)]
        took.append(seconds(lambda command=command: timed(command, work / "output.txt")))  # type: ignore[misc]
    return said[1] - said[0], took[1] - took[0]


def evaluated(machine: Machine) -> dict[str, tuple[float, float]]:
    """Estimated and measured seconds of the quickstart's hooks on the dense model."""
    run = whole_config("test", "configs/quickstart_dense.yaml", names_data=False)
    said = expected("dense", run, machine)
    hooks: dict[str, Any] = {type(c).__name__: c for c in objects_of(run["trainer"]["callbacks"])}
    tokenizer, model = load_tokenizer(resolve(MODEL)), load_model(resolve(MODEL), dtype="float32")
    quiet = {"show_progress": False}
    windows = [load_evaluation(text, tokenizer) for text in hooks["Perplexity"].texts]
    ids = torch.arange(100, 112)[None]
    speed = hooks["Efficiency"]
    point = speed.points[0]
    runs = speed.warmup + point.repeats
    options = {"max_new_tokens": point.new_tokens, "min_new_tokens": point.new_tokens, "do_sample": False}
    with torch.inference_mode():
        model(input_ids=ids)
        reading = seconds(lambda: [perplexity(model, own, "text", **quiet) for own in windows])
        asking = seconds(lambda: zero_shot(model, tokenizer, hooks["ZeroShot"].tasks, limit=hooks["ZeroShot"].limit))
        one = min(seconds(lambda: model.generate(ids.expand(point.batch_size, -1), **options)) for _ in range(3))
    took = {"perplexity": reading, "zero-shot": asking, "speed": runs * one}
    return {name: (said[name], value) for name, value in took.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=3.0, help="most that an estimate may be off (%(default)g)")
    options = parser.parse_args(arguments)
    machine = machine_of("this", UTILISATION)
    rows: dict[str, tuple[float, ...]] = {}
    for name in SEARCHES:
        rows |= {f"{name}: {k}": v for k, v in searched(f"configs/quickstart_{name}.yaml", machine).items()}
    rows |= {f"quickstart: {k}": v for k, v in searched("configs/quickstart.yaml", machine).items()}
    with tempfile.TemporaryDirectory() as work:
        rows["quickstart: recovery, 10 steps"] = trained(Path(work), machine)
    rows |= {f"quickstart_dense: {k}": v for k, v in evaluated(machine).items()}
    title = f"{machine.name}: {machine.flops32 / 1e9:,.0f} GFLOP/s, {machine.bytes_per_s / 1e9:,.0f} GB/s"
    shown = Table(title=title, box=box.MARKDOWN)
    for column in ("phase", "estimated", "measured", "measured / estimated", "MB estimated", "MB measured"):
        shown.add_column(column, justify="left" if column == "phase" else "right")
    for name, (said, took, *memory) in rows.items():
        cells = [f"{value / 1e6:,.0f}" for value in memory] or ["–", "–"]
        shown.add_row(name, f"{said:.1f} s", f"{took:.1f} s", f"{took / said:.2f}", *cells)
    Console(width=120).print(shown)
    off = {name: max(took / said, said / took) for name, (said, took, *_) in rows.items()}
    worst = max(off, key=lambda name: off[name])
    print(f"Time is furthest off: {worst}, by a factor of {off[worst]:.2f} (at most {options.factor:g})")
    more = {name: most / said for name, (_, _, *memory) in rows.items() for said, most in [memory or (1, 0)]}
    largest = max(more, key=lambda name: more[name])
    print(f"Memory is most beyond its estimate: {largest}, {more[largest]:.2f} of it (at most {options.factor:g})")
    return 0 if max(off[worst], more[largest]) <= options.factor else 1


if __name__ == "__main__":
    sys.exit(main())
