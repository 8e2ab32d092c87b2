"""``prune`` of a model that is larger than the memory it gets: ``python -m tests.benchmarks.streaming``.

A Llama of 3.1 billion parameters with random weights is written to ``--work`` in bfloat16 (6.2 GB; it stays there for
the next time). Then ``main.py prune`` merges four of its 28 layers, best-first on 4 x 128 tokens, and exports it:

* *in memory*, as it is without any option: the kernel keeps every page of the weights that was read;
* *streamed*, with ``--model.streaming true`` in a control group that may use ``--cap`` GB of memory, pages of files
  included. The kernel ends what needs more. Where no control group can be made (that takes root), the most memory that
  the process had stands for itself.

Both have to end with the same plan and the same export, byte for byte. Seconds of a layer are those from the start of
the command to the plan, for each layer that the search ran on all samples: starting and reading are in it.
"""

import argparse
import contextlib
import filecmp
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from slm_pl.loading import load_tokenizer, resolve
from tests.benchmarks.search import MODEL, Check, console, finish

GB = 1e9
ROOT = Path(__file__).parents[2]
GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # version 1 and 2
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def write_model(directory: Path) -> int:
    """Writes the model, one shard for each layer, unless it is there; returns the number of its parameters."""
    config = AutoConfig.for_model("llama", **SHAPE)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    parameters = sum(shape.numel() for shape in shapes.values())
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return parameters
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        shards.setdefault(parts[2] if "layers" in parts else "rest", []).append(name)
    places = {}
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) == 1
            else torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02)
            for name in names
        }
        save_file(tensors, directory / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    load_tokenizer(resolve(MODEL)).save_pretrained(directory)
    index.write_text(json.dumps({"metadata": {"total_size": 2 * parameters}, "weight_map": places}))
    return parameters


@dataclass(frozen=True)
class Run:
    """What a run took.

    Attributes:
        seconds: Of the whole command.
        layer: From the start to the plan, for each layer that was run.
        resident: Most bytes in memory, files that are mapped included.
        own: Most bytes that are in no file.
        counted: Most bytes that the control group counted, pages of files that were read or written included.
    """

    seconds: float
    layer: float
    resident: int
    own: int
    counted: int | None


@contextlib.contextmanager
def control_group(cap: float) -> Iterator[Path | None]:
    """A control group with so many bytes of memory, or None where none can be made."""
    name = f"slm_pl-{os.getpid()}"
    group = next(
        (root / name for root in GROUPS if (root / "cgroup.procs").is_file() and os.access(root, os.W_OK)), None
    )
    limit = None
    if group is not None:
        try:
            group.mkdir()
            limit = next((group / f for f in ("memory.limit_in_bytes", "memory.max") if (group / f).is_file()), None)
        except OSError:
            limit = None
    if group is None or limit is None:
        if group is not None and group.is_dir():
            group.rmdir()
        yield None
        return
    try:
        limit.write_text(str(int(cap)))
        yield group
    finally:
        time.sleep(1)
        group.rmdir()


def forget(directory: Path) -> None:
    """Takes files out of the kernel's cache, so that a run has to read them and their pages count as its own."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prune(model: Path, run: Path, group: Path | None, streaming: bool) -> Run:
    """Runs the command, and looks at its memory twenty times a second."""
    method = {
        "class_path": "callbacks.SlidingWindowMerging",
        "init_args": {"remove_layers": 4, "search": "best_first", "similarity": "token_cosine", "lazy": True},
    }
    calibration = {"source": "embedded", "samples": 4, "sequence_length": 128, "batch_size": 4}
    config = {
        "model": {"pretrained": str(model), "streaming": streaming},
        "data": {"path": "embedded", "calibration": calibration},
        "trainer": {
            "default_root_dir": str(run),
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "callbacks": [
                method,
                {"class_path": "callbacks.ExportCheckpoint", "init_args": {"output_dir": "{run}/export"}},
            ],
        },
    }
    run.mkdir(parents=True, exist_ok=True)
    forget(model)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "main.py", "prune", "--config", str(run / "config.yaml"), "--overwrite"]
    start, begun = time.perf_counter(), time.time()
    most = {"VmRSS": 0, "RssAnon": 0}
    with (run / "output.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        if group is not None:
            (group / "cgroup.procs").write_text(str(process.pid))
        while process.poll() is None:
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    key, _, value = line.partition(":")
                    if key in most:
                        most[key] = max(most[key], 1024 * int(value.split()[0]))
            time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {process.returncode}:\n{(run / 'output.txt').read_text()[-3000:]}"
        )
    outcome = json.loads((run / "export" / "plan.json").read_text())["outcome"]
    counted = None
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if group is not None and (group / name).is_file():
            counted = int((group / name).read_text())
    searched = (run / "plan.json").stat().st_mtime - begun
    return Run(seconds, searched / outcome["layer_forwards"], most["VmRSS"], most["RssAnon"], counted)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and fails if the exports differ or the cap was not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/streaming"), help="for the model and the runs; 18 GB")
    parser.add_argument(
        "--cap", type=float, default=3.0, metavar="GB", help="of memory for the streamed run (%(default)g)"
    )
    parser.add_argument("--output", type=Path, help="write all figures to this .json file")
    options = parser.parse_args(arguments)
    work, cap = options.work.resolve(), options.cap * GB
    parameters = write_model(work / "model")
    with control_group(cap) as group:
        streamed = prune(work / "model", work / "streamed", group, streaming=True)
        capped = group is not None
    whole = prune(work / "model", work / "whole", None, streaming=False)
    table = Table("", "streamed", "in memory", title=f"prune of {parameters / GB:.2f} billion parameters in bfloat16")
    rows: dict[str, Callable[[Run], str]] = {
        "seconds of the whole command": lambda run: f"{run.seconds:.0f}",
        "seconds of a layer, on 4 x 128 tokens": lambda run: f"{run.layer:.2f}",
        "most memory, files that are mapped included": lambda run: f"{run.resident / GB:.2f} GB",
        "most memory that is in no file": lambda run: f"{run.own / GB:.2f} GB",
        "most memory of the control group": lambda run: "-" if run.counted is None else f"{run.counted / GB:.2f} GB",
    }
    for name, value in rows.items():
        table.add_row(name, value(streamed), value(whole))
    table.add_row("the weights", *[f"{2 * parameters / GB:.2f} GB"] * 2)
    console.print(table)
    differing = _differing(work / "streamed" / "export", work / "whole" / "export")
    kept = (streamed.counted or 0) if capped else streamed.resident
    checks = [
        Check("files of the export that differ", str(differing), "0", not differing),
        Check("memory" if capped else "resident memory", f"{kept / GB:.2f} GB", f"<= {options.cap:g} GB", kept <= cap),
    ]
    figures = {"parameters": parameters, "streamed": asdict(streamed), "in_memory": asdict(whole)}
    return finish(checks, figures, options.output)


def _differing(one: Path, other: Path) -> int:
    """How many files of two directories are not in both, or not the same."""
    names = {path.name for directory in (one, other) for path in directory.iterdir()}
    _, changed, missing = filecmp.cmpfiles(one, other, names, shallow=False)
    return len(changed) + len(missing)


if __name__ == "__main__":
    sys.exit(main())
