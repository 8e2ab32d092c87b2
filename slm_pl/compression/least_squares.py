"""Consolidation by least squares: the layer that stands for others is refitted to do what they did.

Layers that a plan removes or merges leave a *span* ``low..high`` of the dense model to one layer that stays. With x the
hidden state that reaches it in the compressed model, f(x) what it makes of x, A the inputs of the map W with which it
writes (``down_proj``), and H the dense model's hidden state behind layer ``high``, its map becomes W + Δ with::

    Δ = argmin  Σ_t w_t ‖H_t − f(x)_t − Δ A_t‖² + λ · mean(diag G) · ‖Δ‖²,    w_t = 1 / ‖H_t‖²

of which G, the sum of w_t times the outer product of A_t with itself, and C, that of A_t with H_t − f(x)_t, are all
that has to be kept: Δ is the transpose of what solves (G + λ · mean(diag G) · I) X = C.

Every token's error counts relative to its hidden state, so that the first token of a sample, a sink of attention with a
state a hundred times as long as others, neither decides everything nor is left free to move. Spans go from the bottom
up, each on what the fitted ones below make of the text, so that a fit also takes back what they left. λ is the one of
least error on samples that G and C have not seen; if that is not less than the error of W itself, W stays.

A removed block that is replaced by a linear map toward the dense model's states, folded into weights that are there, is
the idea of ReplaceMe (https://arxiv.org/abs/2505.02819) and, for a patch at the gap, of LinearPatch
(https://arxiv.org/abs/2505.24680). Ours are the ridge toward the layer's own weights with λ chosen on samples held out,
the weights w, the way through a norm behind the map, and that it is one consolidation for every method that removes or
merges layers.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from slm_pl.compression.architecture import (
    Group,
    Output,
    architecture_of,
    decoder_layers,
    hidden_size,
)
from slm_pl.compression.calibration import (
    Arguments,
    Layer,
    batched,
    capture,
    first_input,
    first_of,
    run_layers,
    sample_number,
)
from slm_pl.compression.normal_equations import SLICE, NormalEquations, fitted_outputs, sum_over_ranks, token_weights
from slm_pl.compression.plan import JSONValue, Plan, RefitOutput, Step
from slm_pl.compression.spans import Span, spans
from slm_pl.compression.spool import Spool
from slm_pl.compression.surgery import MergedLayer, merge
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 1024
"""Tokens that go through a layer together."""


DropConsolidation = Literal["drop", "least_squares"]
"""What becomes of the layers below the gaps: nothing, or they are refitted."""


def check_drop_consolidation(consolidation: str) -> None:
    """Holds the argument of the methods that drop layers to its values.

    Raises:
        UsageError: If it is another one.
    """
    if consolidation not in get_args(DropConsolidation):
        raise UsageError(f"consolidation is {consolidation!r}; allowed are drop and least_squares.")


@dataclass(frozen=True)
class LeastSquares:
    """How layers are refitted.

    Args:
        outputs: ``mlp``: what the MLP of the layer writes (``down_proj``); ``both``: first what its attention writes
            (``o_proj``), then that. A layer whose MLP is of experts has only the first.
        later_layers: Also refit every layer above the first span, toward the dense state at its own depth.
        ridge: The λ to choose from, each relative to the mean of the diagonal of G.
        held_out: Share of the samples that λ is chosen on, in (0, 0.5]: of every so many samples the last.

    Raises:
        UsageError: A number is out of range.
    """

    outputs: Literal["mlp", "both"] = "mlp"
    later_layers: bool = False
    ridge: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    held_out: float = 0.125

    def __post_init__(self) -> None:
        if self.outputs not in ("mlp", "both"):
            raise UsageError(f"least_squares.outputs is {self.outputs!r}; allowed are mlp and both.")
        if not self.ridge or not all(0 < value < math.inf for value in self.ridge):
            raise UsageError(f"least_squares.ridge is {list(self.ridge)}; give one or more positive numbers.")
        if not 0 < self.held_out <= 0.5:
            raise UsageError(f"least_squares.held_out is {self.held_out}; it is a share of the samples, in (0, 0.5].")

    @property
    def middle_ridge(self) -> float:
        """The λ for what is fitted without samples held out: that in the middle of those to choose from."""
        return sorted(self.ridge)[len(self.ridge) // 2]

    def to_json(self) -> dict[str, JSONValue]:
        """For the plan."""
        return asdict(self) | {"ridge": list(self.ridge)}


@dataclass(frozen=True)
class _Chunk:
    """Samples that go through the layers together.

    Attributes:
        shape: How many samples, and how many tokens each has.
        arguments: Keyword arguments of each layer.
        held_out: Whether λ is chosen on them; else G and C are made of them.
    """

    shape: torch.Size
    arguments: Sequence[Arguments]
    held_out: bool


@torch.no_grad()
def fit_outputs(
    model: "PreTrainedModel",
    plan: Plan,
    batches: Iterable[Tensor],
    settings: LeastSquares,
    advance: Callable[[str], None] = lambda note: None,
) -> Plan:
    """Adds to a plan that removes or merges layers what refits the ones that stay.

    It takes one pass of the dense model's layers, one of the compressed model's, and for each fit the layer once for G
    and C, and once for each λ on the samples held out; and one pass over a chunk for every length of sample. Memory
    above the weights, whatever the number of tokens: two hidden states of one chunk, the activations of one layer, G
    and its factor, C and Δ, and masks and position embeddings for each length of sample. The hidden states of all
    samples are in two temporary files, and what was fitted in main memory.

    Args:
        model: The model that the plan was computed on; it is only read.
        plan: What is to be done to it.
        batches: Token ids to fit on, each ``[batch, tokens]``; under several processes, this rank's share.
        settings: How.
        advance: Called after each fit.

    Returns:
        The plan with :class:`RefitOutput` steps and their tensors, and with ``outcome.least_squares``: for each fit the
        error on the samples held out, the mean of w_t ‖H_t − f(x)_t‖², without it and with it, and its λ, or null where
        the layer keeps its weights.

    Raises:
        UsageError: If there are fewer than two samples.
        FloatingPointError: If a hidden state is not finite.
    """
    samples = [sample for batch in batches for sample in batch]
    with contextlib.closing(_Walk(model, samples, settings)) as walk:
        steps: list[Step] = []
        tensors: dict[str, Tensor] = dict(plan.tensors)
        rows: list[JSONValue] = []
        above_a_gap = False
        for span in spans(plan):
            above_a_gap = above_a_gap or not span.alone
            if span.alone and not (above_a_gap and settings.later_layers):
                walk.keep(span)
                continue
            for fit in walk.fit(span):
                advance(f"layer {fit.step.layer}: {fit.before:.3f} -> {fit.after:.3f}")
                rows.append(fit.to_json(span))
                if fit.tensors:
                    steps.append(fit.step)
                    tensors |= fit.tensors
        outcome: JSONValue = {
            "samples": walk.samples,
            "tokens": walk.tokens,
            "layer_forwards": walk.layer_forwards(),
            "fits": rows,
        }
    fitted = replace(plan, steps=(*plan.steps, *steps), outcome={**plan.outcome, "least_squares": outcome})
    return fitted.with_tensors(tensors)


def count_fits(plan: Plan, settings: LeastSquares) -> int:
    """How many fits :func:`fit_outputs` makes at most."""
    stay = spans(plan)
    first = next((place for place, span in enumerate(stay) if not span.alone), len(stay))
    fitted = stay[first:] if settings.later_layers else [span for span in stay if not span.alone]
    return len(fitted) * (2 if settings.outputs == "both" else 1)


@dataclass(frozen=True)
class Fit:
    """One fit.

    Attributes:
        step: What the plan does with it.
        tensors: The new weights by the names that the step says; empty if the layer keeps its own.
        ridge: The λ that was chosen.
        before: Error on the samples held out with the layer's own weights.
        after: The same with the ones that it gets.
    """

    step: RefitOutput
    tensors: dict[str, Tensor]
    ridge: float | None
    before: float
    after: float

    def to_json(self, span: Span) -> dict[str, JSONValue]:
        """For the plan."""
        return {
            "layer": self.step.layer,
            "group": self.step.group,
            "low": span.low,
            "high": span.high,
            "ridge": self.ridge,
            "error_before": self.before,
            "error_after": self.after,
        }


class _Walk:
    """The dense and the compressed model side by side, from the bottom up.

    Of either, the hidden states of all samples at one depth are on disk, and those of one chunk in memory.
    """

    def __init__(self, model: "PreTrainedModel", samples: Sequence[Tensor], settings: LeastSquares) -> None:
        self.model, self.settings = model, settings
        self.architecture = architecture_of(model)
        self.layers: list[nn.Module] = list(decoder_layers(model))
        self.device = next(model.parameters()).device
        self.samples, self.tokens = (int(n) for n in self._total([len(samples), sum(map(len, samples))]))
        if self.samples < 2:
            raise UsageError(
                f"Least squares got {self.samples} sample of text; it fits on some and holds others out, so it needs "
                "at least two. Raise data.calibration.samples, or name more text in data.fitting."
            )
        self._own_samples = len(samples)
        self._runs = 0  # layers that samples of this rank went through
        period = max(2, min(self.samples, round(1 / settings.held_out)))
        portions = list(_portions(samples, period))
        shapes = [torch.Size((*ids.shape, hidden_size(model))) for ids, _ in portions]
        # Embeddings may be in another dtype than most weights.
        dtype = first_input(model, portions[0][0][:1]).dtype if portions else model.dtype
        self._dense, self._own = (Spool(shapes, dtype, self.device) for _ in range(2))
        self.chunks: list[_Chunk] = []
        known: dict[torch.Size, Sequence[Arguments]] = {}
        for number, (ids, held_out) in enumerate(portions):
            if ids.shape not in known:  # without padding, they depend on nothing else
                known[ids.shape] = capture(model, ids, only_first=True).arguments
                self._runs += len(self.layers) * len(ids)
            self.chunks.append(_Chunk(ids.shape, known[ids.shape], held_out))
            self._dense.write(number, first_input(model, ids))
        self._depth = 0  # of the dense states
        self._waiting: list[tuple[int, Layer]] = []  # layers of the compressed model that its states have not seen
        self._apart = False  # until the first span, both models are one

    def close(self) -> None:
        """Gives the disk space back."""
        self._dense.close()
        self._own.close()

    def layer_forwards(self) -> float:
        """Decoder-layer forwards of a sample so far, on average over the samples of all ranks."""
        (runs,) = self._total([self._runs])
        return round(runs / self.samples, 2)

    def keep(self, span: Span) -> None:
        """Passes a layer that stays as it is."""
        if self._apart:
            self._waiting.append((span.layer, self.layers[span.layer]))

    def fit(self, span: Span) -> Iterator[Fit]:
        """Refits the layer of a span, and goes on with what it has become."""
        self._go_to(span)
        if span.merge is None:
            layer = MergedLayer(self.layers[span.layer], {})
        else:
            window = self.layers[span.merge.low : span.merge.high + 1]
            layer = merge(window, span.merge.consolidation, span.merge.other_parameters, self.architecture)
        for group, output in fitted_outputs(self.model, span.layer, self.settings.outputs):
            layer, fit = self._fit_one(span, layer, group, output)
            yield fit
        self._waiting = [(span.layer, layer)]

    def _go_to(self, span: Span) -> None:
        """Moves the dense states behind the span, and those of the compressed model before its layer."""
        for number, chunk in enumerate(self.chunks):
            dense = self._dense.read(number)
            depth = self._depth
            if self._apart:
                own = self._own.read(number)
                for index, layer in self._waiting:
                    own = first_of(layer(own, **chunk.arguments[index]))
            else:
                own = dense = run_layers(self.layers, range(depth, span.low), dense, chunk.arguments)
                depth = span.low
            self._own.write(number, own)
            self._dense.write(number, run_layers(self.layers, range(depth, span.high + 1), dense, chunk.arguments))
        self._runs += self._own_samples * (span.high + 1 - self._depth + len(self._waiting))
        self._depth, self._waiting, self._apart = span.high + 1, [], True

    def _fit_one(self, span: Span, layer: MergedLayer, group: Group, output: Output) -> tuple[MergedLayer, Fit]:
        equations = NormalEquations(output)
        squares, tokens = 0.0, 0.0
        for number, chunk in enumerate(self.chunks):
            hidden, target = self._own.read(number), self._dense.read(number)
            result = equations.observe(layer, hidden, chunk.arguments[span.layer], target, learn=not chunk.held_out)
            if chunk.held_out:
                squares += _squares(target, result)
                tokens += target.shape[0] * target.shape[1]
            del hidden, target, result  # before those of the next chunk are there
        self._runs += self._own_samples
        equations.over_ranks()
        squares, tokens = self._total([squares, tokens])
        if not (math.isfinite(squares) and bool(torch.isfinite(equations.cross).all())):
            raise FloatingPointError(
                f"Hidden states of layer {span.layer} or of the dense model's layer {span.high} are not finite, so "
                "nothing can be fitted. float16 overflows above 65,504: load the model with --model.dtype bfloat16 or "
                "float32."
            )
        best, ridge, least = layer, None, squares
        found: dict[str, Tensor] = {}
        step = RefitOutput(span.layer, group, f"layers.{span.layer}.{group}.weight")
        if output.map.bias is not None:
            step = replace(step, bias=f"layers.{span.layer}.{group}.bias")
        for tried in self.settings.ridge:
            candidate, new = equations.refitted(layer, tried)
            error = self._error(span, candidate)
            if error < least:
                best, ridge, least = candidate, tried, error
                found = dict(zip([step.weight, str(step.bias)], new.values(), strict=False))
        before, after = squares / tokens, least / tokens
        return best, Fit(step, {name: value.cpu() for name, value in found.items()}, ridge, before, after)

    def _error(self, span: Span, layer: MergedLayer) -> float:
        """Σ w_t ‖H_t − f(x)_t‖² over the samples held out, of all ranks."""
        squares = 0.0
        for number, chunk in enumerate(self.chunks):
            if chunk.held_out:
                result = first_of(layer(self._own.read(number), **chunk.arguments[span.layer]))
                target = self._dense.read(number)
                squares += _squares(target, result)
                self._runs += chunk.shape[0]
                del target, result
        (total,) = self._total([squares])
        return total if math.isfinite(total) else math.inf

    def _total(self, values: list[float]) -> list[float]:
        """Sums over the ranks."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        sum_over_ranks(totals)
        return totals.tolist()


def _portions(samples: Sequence[Tensor], period: int) -> Iterator[tuple[Tensor, bool]]:
    """Cuts samples into chunks of about :data:`CHUNK` tokens; every so-many-th sample of all ranks is held out."""
    for held_out in (False, True):
        own = [s for index, s in enumerate(samples) if (sample_number(index) % period == period - 1) == held_out]
        size = max(1, CHUNK // max(map(len, own), default=1))
        for ids in batched(own, size):
            yield ids, held_out


def _squares(target: Tensor, result: Tensor) -> float:
    """Σ w_t ‖H_t − f(x)_t‖² of a chunk."""
    pairs = zip(target.flatten(0, 1).split(SLICE), result.flatten(0, 1).split(SLICE), strict=True)
    sums = [((goal - made).double().square() * token_weights(goal)).sum() for goal, made in pairs]
    return float(torch.stack(sums).sum())
