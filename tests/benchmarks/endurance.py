"""Long runs and large inputs: ``python -m tests.benchmarks.endurance``.

* *Training*: thousands of optimizer steps of a pico model with LoRA, a validation and a checkpoint after every
  hundredth; *evaluation*: hundreds of times the hooks of ``test`` in one process. The memory of the process (resident,
  after the garbage was collected) is a straight line fitted to the second half: what it grows in a thousand steps or in
  a hundred evaluations.
* *Comparison*: ``compare`` of a thousand ``results.json``, in seconds.
* *Rows*: the most anonymous memory (without what is mapped from files) of a process that reads and tokenises Alpaca
  files of 10,000 and of 100,000 rows, looked at every five milliseconds, above that of one that reads ten.

It ends with 1 if training or evaluation grows by more than 1 MB for a thousand steps or 3 MB for a hundred evaluations,
if a thousand records take more than 10 s, or if the longest file of a kind takes 1.3 times the memory of the shortest.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy
from rich.console import Console
from rich.table import Table

from slm_pl.cli import main as command
from slm_pl.data import AlpacaDataModule
from slm_pl.loading import load_tokenizer, resolve
from tests.faults.processes import fit_config, measure_config, write, write_inputs
from tests.helpers.records import record_of

MB = 2**20
MOST_GROWN, MOST_S, MOST_TIMES = {1000: 1.0, 100: 3.0}, 0.01, 1.3
"""Megabytes by how many steps or evaluations, seconds of a record, and memory of long files by that of short ones."""
ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("spawn")


def settled() -> int:
    """Resident bytes without what the allocator only keeps for later."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def slope(points: list[tuple[int, int]]) -> float:
    """Bytes a count, of the second half of the points."""
    half = numpy.array(points[len(points) // 2 :], dtype=float)
    return float(numpy.polyfit(half[:, 0], half[:, 1], 1)[0])


class Watch(pl.Callback):
    """Notes the memory after every hundredth optimizer step."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % 100 == 0:
            with open(self.path, "a") as file:
                file.write(f"{trainer.global_step} {settled()}\n")


def training(place: Path, steps: int) -> list[tuple[int, int]]:
    """Memory by optimizer step."""
    model, rows = write_inputs(place / "inputs")
    config, log = fit_config(model, rows, place / "fit"), place / "steps.txt"
    callbacks = config["trainer"]["callbacks"]
    callbacks[2]["init_args"] |= {"every_n_train_steps": 100}
    callbacks.append({"class_path": "tests.benchmarks.endurance.Watch", "init_args": {"path": str(log)}})
    config["trainer"] |= {
        "max_steps": steps,
        "max_epochs": -1,
        "val_check_interval": 100,
        "check_val_every_n_epoch": None,
    }
    _run(["fit", "--config", write(config, place / "fit.yaml"), "--overwrite"])
    return [tuple(map(int, line.split())) for line in log.read_text().splitlines()]


def evaluations(place: Path, times: int) -> list[tuple[int, int]]:
    """Memory by number of evaluations, all in one process."""
    model, _ = write_inputs(place / "inputs")
    config = write(measure_config(model, place / "test"), place / "test.yaml")
    log = place / "evaluations.txt"
    process = CONTEXT.Process(target=_evaluate, args=(config, times, str(log)))
    process.start()
    process.join()
    assert process.exitcode == 0
    return [tuple(map(int, line.split())) for line in log.read_text().splitlines()]


def _evaluate(config: str, times: int, log: str) -> None:
    with open(os.devnull, "w") as nothing, open(log, "w", buffering=1) as file:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        for number in range(1, times + 1):
            command(["test", "--config", config, "--overwrite"])
            file.write(f"{number} {settled()}\n")


def comparison(place: Path, number: int) -> float:
    """Seconds of the whole command ``compare`` with so many records."""
    paths = []
    for index in range(number):
        record = record_of(f"model {index}", perplexity=15 + index % 37 + index / number, latency=1 + index % 11)
        path = place / "records" / str(index) / "results.json"
        path.parent.mkdir(parents=True)
        record.save(path)
        paths.append(str(path))
    began = time.perf_counter()
    whole = [sys.executable, str(ROOT / "main.py"), "compare", *paths, "--output_dir", str(place / "comparison")]
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def rows_memory(place: Path, number: int, suffix: str) -> tuple[float, float, int]:
    """Megabytes of the file, and the most memory of a process that reads it above that of one that reads ten rows."""
    model, _ = write_inputs(place / "inputs")
    text = "Explain in a few sentences what happens when water freezes, and why ice floats on a lake in winter. "
    found = []
    for count in (10, number):
        path = place / f"rows_{count}{suffix}"
        rows = [
            {"instruction": f"{text} ({index})", "input": "", "output": f"{index}: {text * (1 + index % 5)}"}
            for index in range(count)
        ]
        path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
        receive, send = CONTEXT.Pipe(duplex=False)
        cache = str(place / f"cache_{suffix}")  # of its own: what is found there is not tokenised
        process = CONTEXT.Process(target=_read_rows, args=(model, str(path), cache, send))
        process.start()
        send.close()  # else a process that fails would be waited for
        found.append((path.stat().st_size / MB, *receive.recv()))
        process.join()
    (_, base, _), (size, peak, learnt) = found
    return size, (peak - base) / MB, learnt


def _read_rows(model: str, path: str, cache: str, send) -> None:
    os.environ["SLM_PL_CACHE"] = cache
    data = AlpacaDataModule(path, val_size=2, batch_size=2, cutoff=256)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=load_tokenizer(resolve(model))))
    most, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.005):
            most = max(most, _status("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    examples = data.load_examples()
    ended.set()
    watching.join()
    send.send((most, len(examples.train)))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _run(arguments: list[str]) -> None:
    process = CONTEXT.Process(target=_quiet_command, args=(arguments,))
    process.start()
    process.join()
    assert process.exitcode == 0, arguments


def _quiet_command(arguments: list[str]) -> None:
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        command(arguments)


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000])
    options = parser.parse_args()
    table = Table("what", "how much", "found", title="Long and large")
    missed, rows = [], {}
    with tempfile.TemporaryDirectory(prefix="slm_pl_endurance_") as directory:
        place = Path(directory)

        def compared() -> tuple[str, bool]:
            seconds = comparison(place, options.records)
            return f"{seconds:.1f} s", seconds <= MOST_S * options.records

        def read(number: int, suffix: str) -> tuple[str, bool]:
            size, memory, learnt = rows_memory(place, number, suffix)
            shortest = rows.setdefault(suffix, memory)
            said = f"{memory:,.0f} MB above ten rows, {size:,.0f} MB of text, {learnt:,} learnt"
            return said, memory <= MOST_TIMES * shortest

        tried: list[tuple[str, int, Callable[[], tuple[str, bool]]]] = [
            ("optimizer steps", options.steps, lambda: _grown(training(place, options.steps), 1000)),
            ("evaluations", options.evaluations, lambda: _grown(evaluations(place, options.evaluations), 100)),
            ("records compared", options.records, compared),
            *(
                (f"rows of a {suffix} file", number, partial(read, number, suffix))
                for number in sorted(options.rows)
                for suffix in (".jsonl", ".json")
            ),
        ]
        for what, number, work in tried:
            if number:
                found, kept = work()
                missed += [] if kept else [what]
                print(f"{number:,} {what}: {found}{'' if kept else ': MORE THAN ALLOWED'}", flush=True)
                table.add_row(what, f"{number:,}", found)
    Console(width=120).print(table)
    if missed:
        sys.exit(1)


def _grown(points: list[tuple[int, int]], unit: int) -> tuple[str, bool]:
    first, last = points[len(points) // 2][1], points[-1][1]
    grown = slope(points) * unit / MB
    said = f"{first / MB:,.0f} MB half-way, {last / MB:,.0f} MB at the end ({grown:+.2f} MB for {unit:,})"
    return said, grown <= MOST_GROWN[unit]


if __name__ == "__main__":
    main()
