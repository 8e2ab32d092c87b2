"""What recovery minimises: the negative log-likelihood of the labels, computed where there are labels only."""

import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slm_pl.compression.architecture import backbone, logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slm_pl.data.batching import Batch

LOGITS_BUDGET = 1 << 30
"""Bytes of float32 logits that are kept for the backward pass; beyond, slices of them are computed again there."""


def model_inputs(model: "PreTrainedModel", batch: "Batch") -> dict[str, Tensor]:
    """What the backbone reads of a micro-batch.

    No attention mask: position ids that start again tell transformers where one example ends and the next begins, and
    the padding, which comes last, is nothing that a causal model attends to.
    """
    inputs = {"input_ids": batch["input_ids"]}
    takes_positions = "position_ids" in inspect.signature(backbone(model).forward).parameters
    return {**inputs, "position_ids": batch["position_ids"]} if takes_positions else inputs


def final_states(
    model: "PreTrainedModel", inputs: dict[str, Tensor], every_layer: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The final hidden state, ``[rows, length, hidden]``, and if asked for that of every layer.

    Args:
        model: A causal language model, adapters in it or not.
        inputs: See :func:`model_inputs`.
        every_layer: Also return the embeddings and the state after each layer.
    """
    # Without use_cache=False, transformers would fill a cache, and not look for packed examples.
    output = backbone(model)(**inputs, use_cache=False, output_hidden_states=every_layer)
    return output.last_hidden_state, output.hidden_states if every_layer else ()


def predicting(labels: Tensor) -> Tensor:
    """Which positions predict a label: the ones before it, bool ``[rows, length]``."""
    return nn.functional.pad(labels[:, 1:] >= 0, (0, 1))


def negative_log_likelihood(model: "PreTrainedModel", states: Tensor, targets: Tensor, most: int) -> Tensor:
    """Sum over positions of -log p(target), in float32.

    The head, which for small models is as heavy as several layers, runs on these positions only.

    Args:
        model: For its head.
        states: Final hidden states of the positions that predict a label, ``[positions, hidden]``.
        targets: The labels, ``[positions]``.
        most: Labels of the micro-batch that has the most, over all processes. It decides in how many slices the head
            runs: where weights are spread over the processes, they have to run it equally often.
    """

    def of(part: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(model, part).float(), wanted, reduction="sum")

    vocabulary = model.get_output_embeddings().out_features
    slices = -(-4 * vocabulary * most // LOGITS_BUDGET)
    if slices <= 1:
        return of(states, targets)
    parts = zip(states.tensor_split(slices), targets.tensor_split(slices), strict=True)
    return torch.stack([checkpoint(of, part, wanted, use_reentrant=False) for part, wanted in parts]).sum()
