"""What is left of SmolLM2-135M after every method, at equal size: ``python -m tests.benchmarks.quality --data DIR``.

Each method makes the model 3, 6 and 9 of its 30 layers smaller; methods that make layers narrower remove the same share
of the parameters. One row is

* *perplexity* on the first 4,096 tokens of WikiText-2 (``--wikitext``: token ids; else the raw test set of ``DIR``) and
  of C4 documents that nothing was calibrated on, in windows of 128;
* *KL* from the dense model's distribution of the next token, in nats, on the first 2,048 of these C4 tokens;
* *zero-shot*, the mean accuracy over the seven tasks, ``--limit`` questions each, of the weights in bfloat16;
* *search*: seconds of deciding everything, search and fits, and the peak of the process' memory above what it had with
  the weights read; loading and measuring are in neither;
* *recovered*, with ``--recover STEPS``: the same figures once more after so many steps of ``main.py fit`` on 128
  tokens of the calibration documents each, LoRA and distillation in bfloat16, the same for all methods.

``DIR`` holds ``c4/train.jsonl``, ``gutenberg/gutenberg_paragraphs.jsonl`` and ``lm_eval/<task>/<split>.jsonl``. Of the
C4 documents the first 200 are for calibration, the rest for evaluation. All methods calibrate on the same 10 x 128
tokens; the search that refits its candidates scores on as many and fits on 30 x 128; least squares fits on some 30k
others. ``--output`` holds a file for each row, and what is in it is not made again, so that the command may be
interrupted, and all but the seconds may be measured by several at a time (``--methods``); figures of other options are
made anew. ``--decide`` ends with the searches, ``--only-recovered`` leaves out the figures before the recovery and what
a search takes. Recovery takes some three minutes a row; ``--rows tests/benchmarks/quality_rows.json`` are those of
README, and what is in there is not made again either.
"""

import argparse
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from rich.table import Table

from callbacks import (
    FLAP,
    SLEB,
    BlockInfluence,
    CompressionCallback,
    LayerRemoval,
    LLMPruner,
    ShortenedLLaMA,
    SlidingWindowMerging,
    WandaStructured,
)
from slm_pl import files
from slm_pl.compression import surgery
from slm_pl.compression.least_squares import LeastSquares
from slm_pl.compression.plan import Plan, count_parameters
from slm_pl.compression.target import layers_share
from slm_pl.data import CalibrationSet, CalibrationText, EvaluationText, load_calibration, load_evaluation
from slm_pl.data.corpora import joined
from slm_pl.evaluation import SEVEN_TASKS
from slm_pl.evaluation.drift import Reference, drift, reference_states
from slm_pl.evaluation.efficiency.memory import PeakMeter
from slm_pl.evaluation.perplexity import perplexity
from slm_pl.evaluation.windows import Windows
from slm_pl.evaluation.zero_shot import zero_shot
from slm_pl.export import save_compressed
from slm_pl.loading import load_model, load_tokenizer, resolve
from tests.benchmarks.search import MB, MODEL, console
from tests.benchmarks.zero_shot import timed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = (3, 6, 9)
CALIBRATION_DOCUMENTS = 200
Make = Callable[[int, float], CompressionCallback]
"""From the number of layers, and the share of the parameters that is in them."""


def _refit(**options: object) -> dict[str, object]:
    return {"consolidation": "least_squares", "least_squares": LeastSquares(**options)}


METHODS: dict[str, Make] = {
    "SLM as published": lambda n, _: SlidingWindowMerging(remove_layers=n, other_parameters="bottom"),
    "SLM": lambda n, _: SlidingWindowMerging(remove_layers=n),
    "angular distance": lambda n, _: BlockInfluence("angular", remove_layers=n),
    "block influence": lambda n, _: BlockInfluence(remove_layers=n),
    "magnitude": lambda n, _: ShortenedLLaMA("magnitude", remove_layers=n),
    "Taylor": lambda n, _: ShortenedLLaMA("taylor", remove_layers=n),
    "perplexity": lambda n, _: ShortenedLLaMA(remove_layers=n),
    "SLEB": lambda n, _: SLEB(n),
    "LLM-Pruner": lambda n, share: LLMPruner(share),
    "Wanda-sp": lambda n, share: WandaStructured(share),
    "FLAP": lambda n, share: FLAP(share),
    "SLM best-first": lambda n, _: SlidingWindowMerging(
        remove_layers=n, search="best_first", similarity="token_cosine"
    ),
    "deepest layers + least squares": lambda n, _: LayerRemoval(order="reverse", remove_layers=n, **_refit()),
    "perplexity + least squares": lambda n, _: ShortenedLLaMA(remove_layers=n, **_refit()),
    "SLEB + least squares": lambda n, _: SLEB(n, **_refit()),
    "SLM best-first + least squares": lambda n, _: SlidingWindowMerging(
        remove_layers=n, search="best_first", similarity="token_cosine", lazy=True, **_refit()
    ),
    "SLM best-first, refitted + least squares": lambda n, _: SlidingWindowMerging(
        remove_layers=n, search="best_first", similarity="kl", refit_candidates=True, lazy=True, **_refit()
    ),
}


@dataclass(frozen=True)
class Texts:
    """What is calibrated, fitted and measured on."""

    calibration: CalibrationSet
    more_calibration: CalibrationSet
    fitting: CalibrationSet
    wikitext: Windows
    c4: Windows
    compared: Windows


def read_texts(data: Path, wikitext: str | None, work: Path) -> Texts:
    """Cuts the C4 documents into two files first, so that none is in both."""
    tokenizer = load_tokenizer(resolve(MODEL))
    lines = (data / "c4" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    parts = {"calibration": lines[:CALIBRATION_DOCUMENTS], "evaluation": lines[CALIBRATION_DOCUMENTS:]}
    paths = {name: work / f"c4_{name}.jsonl" for name in parts}
    for name, part in parts.items():
        files.write_text(paths[name], "".join(part))
    books = str(data / "gutenberg" / "gutenberg_paragraphs.jsonl")
    novels = CalibrationText(books, samples=60, sampling="stream")
    manual = CalibrationText(samples=14, sampling="stream")
    own = CalibrationText(str(paths["calibration"]), samples=150)
    source = wikitext or str(data / "wikitext2" / "test.txt")
    c4 = EvaluationText(str(paths["evaluation"]), max_tokens=4096)

    def mixed(*texts: CalibrationText) -> CalibrationSet:
        """In an order in which every fourth sample is of each text as often as the others."""
        whole = joined([load_calibration(text, tokenizer) for text in texts])
        ids = [sample.tolist() for batch in whole for sample in batch]
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
        return CalibrationSet.from_ids([ids[number] for number in order], replace(whole.text, batch_size=10))

    return Texts(
        load_calibration(replace(own, samples=10, batch_size=10), tokenizer),
        mixed(replace(own, samples=40), replace(novels, samples=20), replace(manual, samples=5)),
        mixed(own, novels, manual),
        load_evaluation(EvaluationText(source, max_tokens=4096), tokenizer),
        load_evaluation(c4, tokenizer),
        load_evaluation(EvaluationText(str(paths["evaluation"]), max_tokens=2048), tokenizer),
    )


def measure(model: "PreTrainedModel", texts: Texts, reference: Reference, data: Path, limit: int) -> dict[str, float]:
    """All but the search; leaves the weights of ``model`` in bfloat16, in which the questions are asked."""
    quiet = {"show_progress": False}
    row = {
        "wikitext": perplexity(model, texts.wikitext, "wikitext2", **quiet).value,
        "c4": perplexity(model, texts.c4, "c4", **quiet).value,
        "kl": drift(model, texts.compared, reference, "c4", **quiet).kl,
    }
    if limit:
        for parameter in model.parameters():  # not the buffers: positions of rotary embeddings are no bfloat16
            parameter.data = parameter.data.to(torch.bfloat16)
        found = zero_shot(model, load_tokenizer(resolve(MODEL)), SEVEN_TASKS, str(data / "lm_eval"), limit)
        row |= {"zero_shot": found.mean, "zero_shot_stderr": found.mean_stderr}
    return row


def decided(method: str, layers: int, texts: Texts, path: Path) -> dict[str, float]:
    """Searches and fits, on a model of its own; writes the plan."""
    model = load_model(resolve(MODEL), dtype="float32")
    total = count_parameters(model)
    for parameter in model.parameters():
        float(parameter.detach().sum())  # read from the file, else the search would seem to take their memory
    callback = METHODS[method](layers, layers_share(model, layers))
    meter = PeakMeter(torch.device("cpu"))
    meter.clear()
    meter.reset()
    before, _ = meter.read()
    start = time.perf_counter()
    with torch.no_grad():
        more = getattr(callback, "refit_candidates", False)
        plan = callback.decide(model, texts.more_calibration if more else texts.calibration, texts.fitting)
    seconds = time.perf_counter() - start
    after, _ = meter.read()
    plan.save(path)
    surgery.apply(model, plan)
    row = {"parameters": count_parameters(model) / total, "seconds": seconds}
    if before is not None and after is not None:
        row["peak_bytes"] = after.max - before.max
    return row


def pruned(plan: Plan) -> "PreTrainedModel":
    """The model that a plan makes."""
    model = load_model(resolve(MODEL), dtype="float32")
    surgery.apply(model, plan)
    return model


def recover(plan: Plan, folder: Path, work: Path, steps: int) -> "PreTrainedModel":
    """Carries out a plan and trains with the program's own command; its last weights, in float32. Leaves the log."""
    model = pruned(plan)
    save_compressed(model, load_tokenizer(resolve(MODEL)), folder / "pruned", [plan], recovered=False, overwrite=True)
    export = {"output_dir": str((folder / "recovered").resolve()), "weights": "last"}
    config = {
        "model": {
            "pretrained": str((folder / "pruned").resolve()),
            "dtype": "bfloat16",
            "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
            "learning_rate": 1e-3,
            "warmup_steps": 20,
            "distillation": {"weight": 1.0},
        },
        "data": {
            "class_path": "slm_pl.data.TextDataModule",
            "init_args": {
                "source": str((work / "c4_calibration.jsonl").resolve()),
                "sequence_length": 128,
                "batch_size": 1,
                "val_size": 0,
            },
        },
        "trainer": {
            "default_root_dir": str((folder / "run").resolve()),
            "accelerator": "cpu",
            "devices": 1,
            "precision": "bf16-true",
            "logger": False,
            "max_steps": steps,
            "gradient_clip_val": 1.0,
            "enable_checkpointing": False,
            "callbacks": [{"class_path": "callbacks.ExportCheckpoint", "init_args": export}],
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "main.py", "fit", "--config", str((folder / "config.yaml").resolve()), "--overwrite"]
    timed(command, folder / "output.txt")
    trained = load_model(resolve(str(folder / "recovered")), dtype="float32")
    for made in ("pruned", "recovered", "run"):
        shutil.rmtree(folder / made)
    return trained


HEADERS = ("WikiText-2", "C4", "KL", "zero-shot")
FIGURES = ("wikitext", "c4", "kl", "zero_shot")


def table(rows: dict[str, dict[str, float]], dense: dict[str, float]) -> Table:
    """One row for each method and size; the best of each size is bold."""
    shown = Table(title="SmolLM2-135M in float32")
    again = [f"{name}, recovered" for name in HEADERS] if any("recovered_c4" in row for row in rows.values()) else []
    for name in ("layers less", "method", "parameters", *HEADERS, "search", "peak", *again):
        shown.add_column(name, justify="left" if name == "method" else "right")
    shown.add_row("–", "dense", "100 %", *_figures(dense, []), "–", "–")
    for size in SIZES:
        names = {method: f"{method} {size}" for method in METHODS}
        made = {method: rows.get(name, {}) for method, name in names.items()}
        own = {method: row for method, row in made.items() if "wikitext" in row or "recovered_wikitext" in row}
        shown.add_section()
        for method, row in sorted(own.items(), key=lambda item: item[1].get("wikitext", math.inf)):
            peak = f"{row['peak_bytes'] / MB:,.0f} MB" if "peak_bytes" in row else "–"
            shown.add_row(
                str(size),
                method,
                f"{row['parameters']:.1%}",
                *_figures(row, list(own.values())),
                f"{row['seconds']:.0f} s" if "seconds" in row else "–",
                peak,
                *(_figures(row, list(own.values()), "recovered_") if again else []),
            )
    return shown


def _figures(row: dict[str, float], others: Sequence[dict[str, float]], when: str = "") -> list[str]:
    cells = []
    for figure, best in (("wikitext", min), ("c4", min), ("kl", min), ("zero_shot", max)):
        name = when + figure
        if name not in row:
            cells.append("–")
            continue
        value = row[name]
        text = _shown(figure, value)
        first = bool(others) and value == best(other[name] for other in others if name in other)
        cells.append(f"[bold]{text}[/bold]" if first else text)
    return cells


def markdown(rows: dict[str, dict[str, float]], when: str = "") -> str:
    """One row for each method, its figures at each size beside each other; the best of a column is bold.

    Of KL, seconds and memory, only those at the middle size.

    Args:
        rows: By method and size, and ``dense``.
        when: Nothing, or ``recovered_``.
    """
    cells = {(m, size): rows[f"{m} {size}"] for m in METHODS for size in SIZES if f"{m} {size}" in rows}
    cells = {key: row for key, row in cells.items() if when + "c4" in row}
    if not cells:
        return ""
    sizes = sorted({size for _, size in cells})
    middle = sizes[len(sizes) // 2]
    named = dict(zip(HEADERS, FIGURES, strict=True)) | ({} if when else {"search": "seconds", "peak": "peak_bytes"})
    columns = [
        (name, figure, size)
        for name, figure in named.items()
        for size in ([middle] if figure in ("kl", "seconds", "peak_bytes") else sizes)
        if any(when + figure in row for row in cells.values())
    ]
    lines = [["method", *(f"{name} −{size}" for name, _, size in columns)], ["---", *["---:"] * len(columns)]]
    lines.append(["dense", *(_shown(f, rows["dense"][f]) if f in rows["dense"] else "–" for _, f, _ in columns)])

    def place(method: str) -> float:
        own = {size: row[when + "c4"] for (name, size), row in cells.items() if name == method}
        return own.get(middle, math.inf)

    for method in sorted({method for method, _ in cells}, key=place):
        line = [method]
        for _, figure, size in columns:
            value = cells.get((method, size), {}).get(when + figure)
            others = [row[when + figure] for (_, other), row in cells.items() if other == size and when + figure in row]
            best = figure in FIGURES and value == (max if figure == "zero_shot" else min)(others)
            text = "–" if value is None else _shown(figure, value)
            line.append(f"**{text}**" if best else text)
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(figure: str, value: float) -> str:
    if figure == "zero_shot":
        return f"{value:.1%}"
    if figure == "kl":
        return f"{value:.2f}"
    if figure == "seconds":
        return f"{value:.0f} s"
    if figure == "peak_bytes":
        return f"{value / MB:,.0f} MB"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e5 else f"{value:.0e}".replace("e+0", "e")


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the rows that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the directory with the texts and the tasks")
    parser.add_argument("--wikitext", help="token ids of WikiText-2, .json; else the raw test set of --data")
    parser.add_argument("--limit", type=int, default=25, help="questions of each task; 0 asks none")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--layers", nargs="*", type=int, choices=SIZES, default=list(SIZES))
    parser.add_argument("--recover", type=int, default=0, metavar="STEPS", help="also train so many steps; 0 for none")
    parser.add_argument("--decide", action="store_true", help="search and fit, and measure another time")
    parser.add_argument("--only-recovered", action="store_true", help="with --recover: nothing of the models before it")
    parser.add_argument("--rows", type=Path, help="rows that were made elsewhere, .json")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    options = parser.parse_args(arguments)
    if options.only_recovered and not options.recover:
        parser.error("--only-recovered leaves nothing to do without --recover STEPS")
    options.output.mkdir(parents=True, exist_ok=True)
    texts = read_texts(options.data, options.wikitext, options.output)
    asked = {"limit": options.limit, "wikitext": texts.wikitext.sha256, "c4": texts.c4.sha256}
    asked |= {"calibration": texts.more_calibration.sha256, "fitting": texts.fitting.sha256}
    rows: dict[str, dict[str, float]] = {}
    given = json.loads(options.rows.read_text()) if options.rows else {}
    if given and given["asked"] != asked:
        parser.error(f"{options.rows} holds figures of {given['asked']}; asked are those of {asked}")
    elsewhere = given.get("rows", {})

    def known(name: str) -> dict[str, float]:
        if name not in rows:
            path = options.output / f"{name}.row.json"
            record = json.loads(path.read_text()) if path.is_file() else {}
            rows[name] = elsewhere.get(name, {}) | (record["row"] if record.get("asked") == asked else {})
        return rows[name]

    def wanted(name: str) -> tuple[bool, bool]:
        """Whether figures before and after the recovery are to be made."""
        before = not options.only_recovered and "wikitext" not in known(name)
        return before, options.recover > 0 and known(name).get("recovered_steps") != options.recover

    def keep(name: str, row: dict[str, float]) -> None:
        rows[name] = known(name) | row
        files.write_text(options.output / f"{name}.row.json", json.dumps({"asked": asked, "row": rows[name]}, indent=1))

    def plan_of(name: str) -> Plan:
        return Plan.load(options.output / f"{name}.json")

    cells = [(method, size, f"{method} {size}") for size, method in itertools.product(options.layers, options.methods)]
    for method, size, name in cells:
        before, after = wanted(name)
        there = (options.output / f"{name}.json").is_file() and "parameters" in known(name)
        if after and not there or before and not (there and "seconds" in known(name)):
            made = decided(method, size, texts, options.output / f"{name}.json")
            # Several may search at a time, and then the seconds are nobody's.
            keep(name, {"parameters": made["parameters"]} if options.only_recovered else made)
            console.print(f"{name}: {made['seconds']:.0f} s")
    if options.decide:
        return 0
    if not known("dense") or any(any(wanted(name)) for _, _, name in cells):
        dense = load_model(resolve(MODEL), dtype="float32")
        reference = reference_states(dense, texts.compared, "dense", show_progress=False)
        if not known("dense"):
            keep("dense", measure(dense, texts, reference, options.data, options.limit))
        del dense
    for _, _, name in cells:
        before, after = wanted(name)
        if before:
            keep(name, measure(pruned(plan_of(name)), texts, reference, options.data, options.limit))
            console.print(f"{name}: {rows[name]['wikitext']:.1f} on WikiText-2, {rows[name]['c4']:.1f} on C4")
        if after:
            trained = recover(plan_of(name), options.output / name.replace(" ", "_"), options.output, options.recover)
            found = measure(trained, texts, reference, options.data, options.limit)
            again = {f"recovered_{figure}": value for figure, value in found.items()}
            keep(name, again | {"recovered_steps": options.recover})
            console.print(f"{name}: {found['wikitext']:.1f} and {found['c4']:.1f} after {options.recover} steps")
    for name in [*elsewhere, *(path.name.removesuffix(".row.json") for path in options.output.glob("*.row.json"))]:
        known(name)
    console.print(table(rows, rows["dense"]))
    shown = [markdown(rows, when) for when in ("", "recovered_")]
    files.write_text(options.output / "quality.md", "\n".join(filter(None, shown)))
    console.print(f"As one table: {options.output / 'quality.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
