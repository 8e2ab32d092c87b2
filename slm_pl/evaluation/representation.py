"""How alike the layers of a model are to each other: centered kernel alignment of their hidden states."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slm_pl.compression.architecture import backbone
from slm_pl.compression.scores import Kernel, aligned, centered_gram
from slm_pl.console import progress
from slm_pl.evaluation._model import device_of, evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def representation_similarity(
    model: "PreTrainedModel", samples: Iterable[Tensor], kernel: Kernel = "linear"
) -> list[list[float]]:
    """CKA of the hidden states after every pair of decoder layers, with the minibatch estimator.

    A minibatch is the tokens of one sample. The unbiased HSIC of each is averaged over the samples before the ratio is
    formed (Nguyen et al. 2021, arXiv 2010.15327), so that neither the batch size nor the number of samples biases the
    matrix. Works for every Hugging Face causal language model; it takes twice ``layers × tokens²`` float64
    numbers of memory for the longest sample.

    Args:
        model: The model, on whatever device it is.
        samples: Token ids, int64, each ``[tokens]`` or ``[batch, tokens]``, at least four tokens; no padding.
        kernel: ``linear``, or ``rbf`` with the median distance as bandwidth.

    Returns:
        A symmetric matrix, ``[layers][layers]``, in [-1, 1]; row i is the state after layer i, for the last layer after
        the final norm.

    Raises:
        UsageError: If a sample has fewer than four tokens.
        FloatingPointError: If a hidden state is not finite.
    """
    rows = [row for sample in samples for row in (sample if sample.ndim == 2 else sample[None])]
    device = device_of(model)
    total: Tensor | None = None
    with (
        evaluation_mode(model),
        torch.inference_mode(),
        progress("Comparing layers", total=len(rows)) as advance,
    ):
        for number, ids in enumerate(rows):
            states = backbone(model)(input_ids=ids[None].to(device), output_hidden_states=True, use_cache=False)
            finite = torch.stack([torch.isfinite(state).all() for state in states.hidden_states]).tolist()
            if not all(finite):
                first = finite.index(False)
                where = f"layer {first - 1} gives" if first else "the embeddings give"
                raise FloatingPointError(
                    f"On sample {number}, {where} hidden states that are not finite, so the layers cannot be compared. "
                    "Load the model with --model.dtype bfloat16 or float32."
                )
            grams = torch.stack([centered_gram(state, kernel).flatten() for state in states.hidden_states[1:]])
            hsic = grams @ grams.T
            total = hsic if total is None else total + hsic
            advance("")
    assert total is not None, "no sample"
    values = total.tolist()
    count = len(values)
    # The product may differ from its transpose in the last digit: take one half of it for both.
    upper = {(i, j): aligned(values[i][j], values[i][i], values[j][j]) for i in range(count) for j in range(i, count)}
    return [[upper[min(i, j), max(i, j)] for j in range(count)] for i in range(count)]
