"""How much work a method does, counted while it decides on a stand-in that is narrow but has as many layers."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from slm_pl.compression import surgery
from slm_pl.compression.architecture import decoder_layers, idle_expert_bytes, narrow_llama, query_width
from slm_pl.compression.least_squares import LeastSquares, fit_outputs
from slm_pl.compression.plan import Plan
from slm_pl.data import CalibrationSet, CalibrationText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH, HEADS, VOCABULARY = 32, 8, 251  # a prime, so that a product with this side is the head's
SAMPLES, TOKENS = 4, 8  # a search that refits needs four samples
FITTED, FITTED_TOKENS = 160, 64  # so many that the one chunk which is captured first is a small part


def _product(left: Tensor, right: Tensor, *others: object, out_val: Tensor) -> int:
    """Operations of ``linear`` and ``matmul``, which come as they are in inference mode."""
    return 2 * out_val.numel() * left.shape[-1]


PRODUCTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.linear: _product,
    torch.ops.aten.matmul: _product,
}


class Method(Protocol):
    """What a compression callback offers."""

    refit: LeastSquares | None

    @property
    def uses_calibration(self) -> bool:
        """Whether it looks at text."""

    def plan(self, model: "PreTrainedModel", calibration: CalibrationSet) -> Plan:
        """Decides."""


@dataclass(frozen=True)
class Work:
    """What was done, in units that do not depend on the widths of the model nor on the number of its tokens.

    Args:
        layers: Forward passes of all tokens through one decoder layer of the dense model; what goes back through a
            layer counts as the forward passes of as many operations.
        heads: The same of the language-model head.
        products: Operations in float64, of one token and one output of a layer, in units of m (m + h) for its m inputs
            and h outputs: the normal equations.
        solutions: Normal equations factored.
        columns: Triangular systems solved, each for all h outputs.
        differentiates: Whether gradients were taken.
    """

    layers: float
    heads: float
    products: float = 0.0
    solutions: int = 0
    columns: int = 0
    differentiates: bool = False


class Tally(TorchDispatchMode):
    """Adds up the operations of matrix products: the head's, those in float64, and all others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.heads, self.products = 0, 0, 0
        self.solutions, self.columns = 0, 0
        self.differentiates = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        result = func(*args, **kwargs)
        if packet in PRODUCTS:
            self._add(PRODUCTS[packet](*args, **kwargs, out_val=result), [a for a in args if isinstance(a, Tensor)])
            self.differentiates |= torch._C._current_autograd_node() is not None
        elif packet is torch.ops.aten.linalg_cholesky_ex:
            self.solutions += 1
        elif packet is torch.ops.aten.linalg_solve_triangular:
            self.columns += 1
        return result

    def _add(self, operations: int, operands: list[Tensor]) -> None:
        if operands[0].dtype == torch.float64:
            self.products += operations
        elif any(VOCABULARY in operand.shape for operand in operands):
            self.heads += operations
        else:
            self.layers += operations


def stand_in(layers: int, shape: float) -> "PreTrainedModel":
    """A Llama with random weights.

    Args:
        layers: Decoder layers.
        shape: Width of the MLP by that of the hidden state.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return narrow_llama(layers, WIDTH, round(WIDTH * shape), HEADS, VOCABULARY)


class Rehearsal:
    """Lets methods decide one after the other, each on what the ones before left of a stand-in.

    What a search does may depend on what it finds: a search with a threshold, or a lazy one, will do more or less on
    the real model. Every other method does as much.

    Args:
        layers: Decoder layers of the real model.
        shape: As for :func:`stand_in`.
    """

    def __init__(self, layers: int, shape: float) -> None:
        self._model = stand_in(layers, shape)
        self._inputs = round(WIDTH * shape)
        self._layer = {length: layer_operations(self._model, 1, length) for length in (TOKENS, FITTED_TOKENS)}
        self._generator = torch.Generator().manual_seed(0)
        self._calibration, self._fitting = self._drawn(SAMPLES, TOKENS), self._drawn(FITTED, FITTED_TOKENS)

    def _drawn(self, samples: int, tokens: int) -> CalibrationSet:
        ids = torch.randint(3, VOCABULARY, (samples, tokens), generator=self._generator).tolist()
        text = CalibrationText(samples=samples, sequence_length=tokens, batch_size=min(samples, 16))
        return CalibrationSet.from_ids(ids, text)

    def perform(self, method: Method, apply: bool = True) -> tuple[Work, Work | None]:
        """Lets a method decide.

        Args:
            method: Its size is a number of layers, or a share that does not depend on the widths.
            apply: The next method gets what this one leaves.

        Returns:
            What its decision takes, over the calibration text, and what its refits take, over the text for fitting, or
            None.

        Raises:
            UsageError: If it refuses the stand-in.
        """
        seen = self._calibration if method.uses_calibration else CalibrationSet.from_ids([], self._calibration.text)
        plan, search = self._counted(functools.partial(method.plan, self._model, seen), self._calibration)
        fit, settings = None, method.refit
        if settings is not None and plan.steps:
            work = functools.partial(fit_outputs, self._model, plan, self._fitting, settings)
            plan, fit = self._counted(work, self._fitting)
        if apply:
            surgery.apply(self._model, plan)
        return search, fit

    def _counted(self, work: Callable[[], Plan], samples: CalibrationSet) -> tuple[Plan, Work]:
        tokens = samples.samples * samples.shortest
        with Tally() as tally, torch.no_grad():
            plan = work()
        return plan, Work(
            tally.layers / (tokens * self._layer[samples.shortest]),
            tally.heads / (2 * tokens * WIDTH * VOCABULARY),
            tally.products / (2 * tokens * self._inputs * (self._inputs + WIDTH)),
            tally.solutions,
            tally.columns,
            tally.differentiates,
        )


def layer_operations(model: "PreTrainedModel", tokens: int, length: int) -> float:
    """Operations of a forward pass through one decoder layer, the mean of a model's.

    Each token takes two for each weight that it is multiplied with, and 4 q for each token of its sample, where q is
    the width of all query heads: queries by keys, and values; masked ones are computed, too.

    Args:
        model: A Hugging Face causal language model of a known architecture, with or without weights.
        tokens: So many.
        length: Of a sample.
    """
    layers = decoder_layers(model)
    weights = (
        sum(p.numel() for p in layers.parameters() if p.ndim > 1) - idle_expert_bytes(model) // model.dtype.itemsize
    )
    return tokens * (2 * weights / len(layers) + 4 * query_width(model) * length)
