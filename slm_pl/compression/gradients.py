"""Gradients of the calibration loss with respect to every weight, seen one tensor at a time and never kept.

Backward goes layer by layer from the top, for all batches before the next layer: only the inputs of the layers are
kept from the forward pass, and a layer is run again when its turn comes (gradient checkpointing at every layer). A hook
takes each gradient as soon as it is there. So memory above the weights is the layers' inputs, the activations of one
layer on one batch, and the largest tensor's gradient; with several batches or processes, one layer's gradients, which
are added up in float32. The embeddings and the head, which no one removes, get no gradient at all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slm_pl.compression.architecture import decoder_layers
from slm_pl.compression.calibration import Arguments, capture, distributed, first_of, run_layers, token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Visit = Callable[[int, str, Tensor, Tensor], None]
"""Gets a layer's number, the parameter's name in it, the parameter, and its gradient to do with as it likes."""

_LOGITS_BYTES = 8 * 2**20  # of one slice of tokens; its gradient and the softmax take as much again


def layer_gradients(
    model: "PreTrainedModel",
    batches: Iterable[Tensor],
    visit: Visit,
    kept: Sequence[int] | None = None,
    over_ranks: bool = True,
    visit_squares: Visit | None = None,
) -> int:
    """Differentiates the sum of the cross-entropy over all predicted tokens of all batches.

    Args:
        model: A Hugging Face causal language model of a known architecture; it is only read.
        batches: Token ids, each ``[batch, tokens]``.
        visit: Called for every parameter of every kept layer once, from the top layer down. On several ranks all of
            them call it in the same order.
        kept: The layers that the model consists of, in order; None for all.
        over_ranks: The sum goes over the batches of all ranks; else over this rank's alone.
        visit_squares: Called before ``visit`` with the sum, over the batches, of the squared gradient of each batch's
            mean loss.

    Returns:
        The number of predicted tokens of this rank's batches.
    """
    layers = list(decoder_layers(model))
    kept = list(range(len(layers))) if kept is None else list(kept)
    with torch.no_grad():
        runs = [_forward(model, ids, layers, kept) for ids in batches]
    with _own_gradients(model), torch.enable_grad():
        upstream = [_head_gradient(model, states.pop(), ids) for ids, states, _ in runs]
        for index in reversed(kept):
            _layer_gradient(layers[index], index, runs, upstream, visit, over_ranks and distributed(), visit_squares)
    return sum(ids.numel() - len(ids) for ids, _, _ in runs)


_Run = tuple[Tensor, list[Tensor], list[Arguments]]
"""Token ids, hidden states in order, and the keyword arguments of every layer."""


def _forward(model: "PreTrainedModel", ids: Tensor, layers: list[nn.Module], kept: list[int]) -> _Run:
    """The input of every kept layer, and the output of the last one."""
    dense = capture(model, ids)
    states = [*dense.inputs, dense.output]
    # Up to the first layer that is missing, the states are those of the dense model.
    same = next((place for place, layer in enumerate(kept) if place != layer), len(kept))
    states = states[: same + 1]
    for index in kept[same:]:
        states.append(run_layers(layers, [index], states[-1], dense.arguments))
    return dense.ids, states, dense.arguments


def _head_gradient(model: "PreTrainedModel", output: Tensor, ids: Tensor) -> Tensor:
    """The gradient of a batch's loss at the output of the last layer; the logits of few tokens at a time."""
    gradient = torch.zeros_like(output)
    vocabulary = model.config.get_text_config().vocab_size
    size = max(1, _LOGITS_BYTES // (4 * vocabulary * len(ids)))
    for start in range(0, ids.shape[1] - 1, size):
        end = min(start + size, ids.shape[1] - 1)
        # A slice of its own, so that its gradient is not as long as the whole batch.
        part = output[:, start : end + 1].detach().requires_grad_()
        token_losses(model, part, ids[:, start : end + 1]).sum().backward()
        assert part.grad is not None
        gradient[:, start:end] = part.grad[:, :-1]
    return gradient


def _layer_gradient(
    layer: nn.Module,
    index: int,
    runs: list[_Run],
    upstream: list[Tensor],
    visit: Visit,
    over_ranks: bool,
    visit_squares: Visit | None,
) -> None:
    """Takes the gradient of one layer's parameters over all batches; turns ``upstream`` into that of its input."""
    own = dict(layer.named_parameters())
    names = {id(parameter): name for name, parameter in own.items()}
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    at_once = len(runs) == 1 and not over_ranks and visit_squares is None
    seen: set[str] = set()
    tokens = 1

    def take(parameter: Tensor) -> None:
        name, gradient = names[id(parameter)], parameter.grad
        parameter.grad = None
        assert gradient is not None
        seen.add(name)
        if visit_squares is not None:
            square = (gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / tokens).square_()
            squares[name] = squares[name].add_(square) if name in squares else square
        if at_once:
            visit(index, name, parameter.detach(), gradient)
        elif name in sums:
            sums[name] += gradient
        else:
            sums[name] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))

    handles = []
    try:
        for parameter in own.values():
            handles.append(parameter.requires_grad_().register_post_accumulate_grad_hook(take))
        for number, (ids, states, arguments) in enumerate(runs):
            tokens = ids.numel() - len(ids)
            hidden = states.pop().detach().requires_grad_()
            torch.autograd.backward(first_of(layer(hidden, **arguments[index])), upstream[number])
            assert hidden.grad is not None
            upstream[number] = hidden.grad
    finally:
        for handle in handles:
            handle.remove()
        for parameter in own.values():
            parameter.requires_grad_(False)
    with torch.no_grad():
        for name, parameter in own.items():
            if at_once and name in seen:
                continue
            if visit_squares is not None:
                visit_squares(
                    index, name, parameter.detach(), _over_ranks(squares.pop(name, None), parameter, over_ranks)
                )
            visit(index, name, parameter.detach(), _over_ranks(sums.pop(name, None), parameter, over_ranks))


def _over_ranks(total: Tensor | None, parameter: Tensor, over_ranks: bool) -> Tensor:
    """Adds up what the ranks have. One without samples has nothing; nor has a parameter that no token used."""
    if total is None:
        total = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
    if over_ranks:
        dist.all_reduce(total)
    return total


@contextmanager
def _own_gradients(model: nn.Module) -> Iterator[None]:
    """Turns gradients of all parameters off for the block, then gives each its own flag and gradient back."""
    found = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in found:
        parameter.requires_grad_(False)
        parameter.grad = None  # a new one would be added to it
    try:
        yield
    finally:
        for parameter, flag, gradient in found:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
