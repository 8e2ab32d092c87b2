"""Cost of consolidation by least squares: ``python -m tests.benchmarks.least_squares``.

Six of SmolLM2-135M's thirty layers are removed (the order of Shortened LLaMA's perplexity: 14, 12, 5, 13, 17, 26) and
the four that are left below the gaps refitted on 32k tokens.

* *Seconds*: of all fits, against one forward pass of the dense model over the same tokens in the same chunks, measured
  before and after (the mean counts). At most three times as long.
* *Layer forwards* of a sample, against the thirty of that pass and what the head weighs beside them.
* *Memory*: the most bytes of tensors alive above the weights, seen by a ``TorchDispatchMode`` while 8k and 16k tokens
  are fitted: it must not grow with the tokens, nor be more than such a fit has to hold: two hidden states of one chunk,
  what one layer makes of a chunk (the three products of its MLP), G and its factor, and the weights that it results in.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from callbacks import LayerRemoval
from slm_pl.compression.architecture import decoder_layers
from slm_pl.compression.least_squares import CHUNK, LeastSquares, fit_outputs
from slm_pl.data import CalibrationSet, CalibrationText, load_calibration
from slm_pl.loading import load_model, load_tokenizer, resolve
from slm_pl.memory import TensorBytes
from tests.benchmarks.search import MB, MODEL, Check, console, finish

MOST_PASSES = 3.0
MOST_GROWTH = 1.01
LAYERS = [14, 12, 5, 13, 17, 26]


@torch.inference_mode()
def dense_pass(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds of one forward pass over all tokens."""
    start = time.perf_counter()
    for chunk in ids.split(CHUNK // ids.shape[1]):
        model(input_ids=chunk, use_cache=False)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and fails if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="embedded", help="as data.calibration.source; at least 32k tokens")
    parser.add_argument("--documents", type=int, default=36, help="of the text, that are joined")
    parser.add_argument("--output", type=Path, help="write all figures to this .json file")
    options = parser.parse_args(arguments)
    source = resolve(MODEL)
    text = CalibrationText(options.text, samples=options.documents, sampling="stream")
    ids = torch.cat(load_calibration(text, load_tokenizer(source)).batches)[:256]
    model = load_model(source, dtype="float32")
    nothing = CalibrationSet.from_ids([], text)
    with torch.no_grad():
        plan = LayerRemoval(LAYERS).plan(model, nothing)
        dense_pass(model, ids[:16])  # weights are read, threads started
        passes = [dense_pass(model, ids)]
        start = time.perf_counter()
        fitted = fit_outputs(model, plan, [ids], LeastSquares())
        seconds = time.perf_counter() - start
        passes.append(dense_pass(model, ids))
        peaks = []
        for samples in (64, 128):
            with TensorBytes(model) as tensors:
                fit_outputs(model, plan, [ids[:samples]], LeastSquares())
            peaks.append(tensors.peak)
    told = fitted.outcome["least_squares"]
    assert isinstance(told, dict)
    forwards, mean = told["layer_forwards"], sum(passes) / 2
    assert isinstance(forwards, float)
    layers = decoder_layers(model)
    hidden, inputs = model.config.hidden_size, model.config.intermediate_size
    head = model.get_output_embeddings().weight.numel() / sum(p.numel() for p in layers[0].parameters())
    state = CHUNK * hidden * 4
    fits = told["fits"]
    assert isinstance(fits, list)
    limit = 2 * state + 3 * CHUNK * inputs * 4 + 2 * inputs**2 * 8 + len(fits) * hidden * inputs * 4
    table = Table(
        "", "value", title=f"Least squares over {ids.numel():,} tokens, SmolLM2-135M, {len(LAYERS)} layers less"
    )
    table.add_row("seconds of the fits", f"{seconds:.1f}")
    table.add_row("seconds of a dense forward pass, before and after", " and ".join(f"{p:.1f}" for p in passes))
    table.add_row(
        "layer forwards of a sample", f"{forwards:.1f} (the pass: {len(layers)} and a head as heavy as {head:.1f})"
    )
    for name, peak in zip(("8k", "16k"), peaks, strict=True):
        table.add_row(f"peak memory above the weights, {name} tokens", f"{peak / MB:.1f} MB")
    table.add_row("two states, one MLP's products, G and its factor, the result", f"{limit / MB:.1f} MB")
    table.add_row("the weights", f"{sum(p.numel() * 4 for p in model.parameters()) / MB:.1f} MB")
    console.print(table)
    checks = [
        Check("time of dense passes", f"{seconds / mean:.2f} x", f"<= {MOST_PASSES} x", seconds <= MOST_PASSES * mean),
        Check(
            "memory with twice the tokens",
            f"{peaks[1] / peaks[0]:.3f} x",
            f"<= {MOST_GROWTH} x",
            peaks[1] <= MOST_GROWTH * peaks[0],
        ),
        Check("memory", f"{peaks[1] / MB:.1f} MB", f"<= {limit / MB:.1f} MB", peaks[1] <= limit),
    ]
    figures = {"seconds": seconds, "passes": passes, "layer_forwards": forwards, "peak_bytes": peaks, "needed": limit}
    return finish(checks, figures, options.output)


if __name__ == "__main__":
    sys.exit(main())
