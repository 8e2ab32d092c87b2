"""One fit of :mod:`slm_pl.compression.least_squares`: what is kept of the tokens, and the solution."""

from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from slm_pl.compression.architecture import GROUPS, Group, Output, output_of
from slm_pl.compression.calibration import Arguments, distributed, first_of
from slm_pl.compression.surgery import MergedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLICE = 256
"""Tokens that are in float64 at a time."""


class NormalEquations:
    """G and C of one fit, in float64: all that is kept of the tokens.

    Args:
        output: How the layer that is refitted writes.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._biased = output.map.bias is not None
        hidden, self._inputs = output.map.weight.shape
        size, device = self._inputs + int(self._biased), output.map.weight.device
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.cross = torch.zeros(size, hidden, dtype=torch.float64, device=device)
        # What each channel is multiplied by on its way to the hidden state, a norm's division left out: the root mean
        # square of ones is one.
        ones = torch.ones(hidden, device=device, dtype=output.map.weight.dtype)
        self._gain = output.factor * (ones if output.norm is None else output.norm(ones)).float()

    def observe(
        self, layer: MergedLayer, hidden: Tensor, arguments: Arguments, target: Tensor, learn: bool = True
    ) -> Tensor:
        """Runs the layer, and takes in what its map read and what it lacks.

        Args:
            layer: The layer as it is before the fit.
            hidden: Its input in the compressed model, ``[batch, tokens, hidden]``.
            arguments: Its keyword arguments.
            target: The dense model's hidden state that its result is to be.
            learn: Only run it, if false.

        Returns:
            Its result.
        """
        inputs: list[Tensor] = []
        written: list[Tensor] = []
        hooks = [
            self._output.map.register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
            self._output.map.register_forward_hook(lambda *call: written.append(call[-1])),
        ]
        try:
            result = first_of(layer(hidden, **arguments))
        finally:
            for hook in hooks:
                hook.remove()
        if learn:
            seen, wrote = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (inputs[0], written[0]))
            if self._biased:
                seen = torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1)
            if self._output.norm is not None:
                seen = seen / wrote.float().square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
            weights = token_weights(target).flatten(0, 1)
            silent = self._gain.abs() <= 1e-6 * self._gain.abs().max()
            missing = ((target - result) / self._gain).masked_fill(silent, 0)
            tokens = zip(seen.split(SLICE), missing.flatten(0, 1).split(SLICE), weights.split(SLICE), strict=True)
            for inputs_of, missing_of, weights_of in tokens:
                wide = inputs_of.double()
                weighted = (wide * weights_of).T
                self.gram.addmm_(weighted, wide)
                self.cross.addmm_(weighted, missing_of.double())
        return result

    def over_ranks(self) -> None:
        """Adds up what all ranks took in."""
        for total in (self.gram, self.cross):
            sum_over_ranks(total)

    def solve(self, ridge: float) -> Tensor:
        """The ridge solution Δ, ``[hidden, inputs]``; of a biased map the last input is the bias, free of the ridge.

        Args:
            ridge: λ, relative to the mean of the diagonal of G.
        """
        diagonal = self.gram.diagonal()
        own = diagonal.clone()
        diagonal[: self._inputs] += ridge * own[: self._inputs].mean()  # in place: it saves a copy of G
        try:
            factor, failed = torch.linalg.cholesky_ex(self.gram)
        finally:
            diagonal.copy_(own)
        change = self.cross.T.contiguous()
        if failed:  # without any input that moves, G has no factor
            change.zero_()
        else:
            # Both in place, column after column: cholesky_solve would copy the factor, which is as large as G.
            columns = change.T
            torch.linalg.solve_triangular(factor, columns, upper=False, out=columns)
            torch.linalg.solve_triangular(factor.mT, columns, upper=True, out=columns)
        if distributed():
            dist.broadcast(change, 0)
        return change

    def refitted(self, layer: MergedLayer, ridge: float) -> tuple[MergedLayer, dict[str, Tensor]]:
        """The layer with the solution added to its map, and the new parameters: the weight, then a bias if any."""
        change = self.solve(ridge)
        parts = {"weight": change[:, : self._inputs]} | ({"bias": change[:, self._inputs]} if self._biased else {})
        own = {**dict(layer.host.named_parameters()), **layer.parameters}
        names = [f"{self._output.path}.{name}" for name in parts]
        new = {name: (own[name] + part).to(own[name].dtype) for name, part in zip(names, parts.values(), strict=True)}
        return MergedLayer(layer.host, {**layer.parameters, **new}), new


def fitted_outputs(model: "PreTrainedModel", layer: int, outputs: Literal["mlp", "both"]) -> list[tuple[Group, Output]]:
    """Which maps of a layer are refitted, in order; where its MLP is of experts, that of its attention."""
    found = [(group, output_of(model, layer, group)) for group in GROUPS]
    there = [(group, output) for group, output in found if output is not None]
    return there if outputs == "both" else there[-1:]


def token_weights(target: Tensor) -> Tensor:
    """w_t, ``[batch, tokens, 1]``."""
    return 1 / target.double().square().sum(-1, keepdim=True).clamp_min(1e-12)


def sum_over_ranks(total: Tensor) -> None:
    """Adds up, in place, what all processes have."""
    if distributed():
        dist.all_reduce(total)
