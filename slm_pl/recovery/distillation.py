"""What a compressed model learns from the dense one: its next-token distributions and its hidden states.

All sums run over tokens, so that they add up over micro-batches and ranks as the losses of the tokens do; the caller
divides once, by the number of tokens of an optimizer step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slm_pl.compression.architecture import backbone, hidden_size, logits
from slm_pl.compression.plan import Plan, layer_groups
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of one slice in float32; with the model's own logits and the work on them, up to four times as much is in memory.
_SLICE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Distillation:
    """Learning from the dense model (Hinton et al., arXiv 1503.02531; hidden states as in Minitron, arXiv 2407.14679).

    Attributes:
        weight: Of the KL divergence from the teacher's to the student's next-token distribution.
        hidden_weight: Of the distance between the hidden states after the layers that are left and those after the
            dense layers that they stand for. Needs a student whose hidden state is as wide as the teacher's.
        temperature: Divides the logits of both; the divergence is multiplied by its square.
        top_k: Only the teacher's k likeliest tokens are kept apart; all others together are one more class. Null for
            the whole vocabulary, which costs 4 bytes for each of its tokens at every position.
        teacher: A Hub id, a directory, a ``.gguf`` file, or ``package:NAME/FILE.gguf``; null for the dense model that
            the plans started from.
    """

    weight: float = 1.0
    hidden_weight: float = 0.0
    temperature: float = 1.0
    top_k: int | None = 64
    teacher: str | None = None

    def __post_init__(self) -> None:
        """Refuses values that nothing could be learned with."""
        for name in ("weight", "hidden_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UsageError(f"distillation.{name} is {value}; give a number of at least 0.")
        if self.weight == self.hidden_weight == 0:
            raise UsageError(
                "distillation.weight and distillation.hidden_weight are both 0, which teaches nothing; make one "
                "positive, or give distillation: null."
            )
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"distillation.temperature is {self.temperature}; give a number above 0 (usual: 1 to 4).")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(
                f"distillation.top_k is {self.top_k}; give at least 1 (usual: 64), or null for all tokens."
            )


@dataclass(frozen=True)
class Targets:
    """What the teacher says. Numbers are in float32 (float64 of a float64 model); gradients do not reach the teacher.

    Attributes:
        log_probabilities: Of its k likeliest tokens at the temperature, ``[positions, k]``; of the whole vocabulary in
            its own order, ``[positions, vocabulary]``, where ``indices`` is None.
        indices: Which tokens these are, likeliest first, ``[positions, k]``.
        rest: Log-probability of all other tokens together, ``[positions]``; None where there are no others.
        hidden: For each layer of the student but its last, the hidden states after the dense layer that it stands for,
            ``[rows, length, hidden]``; empty if they are not compared.
    """

    log_probabilities: Tensor
    indices: Tensor | None
    rest: Tensor | None
    hidden: tuple[Tensor, ...]


def layer_origins(plans: Sequence[Plan], num_layers_dense: int) -> list[int]:
    """For each layer of the compressed model, the dense layer whose output it stands for: of a window, the highest.

    Args:
        plans: What was done to the dense model, in order.
        num_layers_dense: How many layers the dense model, or the teacher, has.

    Raises:
        UsageError: If the first plan was computed on a model of another depth.
    """
    if plans and plans[0].base.num_layers != num_layers_dense:
        raise UsageError(
            f"The teacher has {num_layers_dense} layers, but the student was made of a model that had "
            f"{plans[0].base.num_layers} ({plans[0].base.pretrained}). Give that one as distillation.teacher, or set "
            "distillation.hidden_weight to 0."
        )
    return [group[-1] for group in layer_groups(list(plans), num_layers_dense)]


def check_teacher(teacher: "PreTrainedModel", student: "PreTrainedModel", settings: Distillation) -> None:
    """Refuses a teacher that the student cannot be compared with.

    Raises:
        UsageError: If the vocabularies differ in size, or hidden states of different widths would be compared.
    """
    # From the configs: parameters that DeepSpeed holds in pieces have no shape.
    ours, theirs = (int(model.config.get_text_config().vocab_size) for model in (student, teacher))
    if ours != theirs:
        raise UsageError(
            f"The teacher's vocabulary has {theirs} tokens, the student's {ours}; it has to be the same one. Give the "
            "model that the student was made of as distillation.teacher."
        )
    if settings.hidden_weight and hidden_size(student) != hidden_size(teacher):
        raise UsageError(
            f"distillation.hidden_weight is {settings.hidden_weight}, but the student's hidden state has "
            f"{hidden_size(student)} channels and the teacher's {hidden_size(teacher)}. Set it to 0."
        )


@torch.no_grad()
def teacher_targets(
    teacher: "PreTrainedModel",
    inputs: dict[str, Tensor],
    selected: Tensor,
    settings: Distillation,
    layers: Sequence[int],
) -> Targets:
    """Asks the teacher about the selected positions, row by row.

    Args:
        teacher: In evaluation mode, on the device of the inputs.
        inputs: ``input_ids``, ``position_ids`` and, unless sequences are packed, ``attention_mask``,
            ``[rows, length]``.
        selected: Positions whose prediction of the next token is wanted, bool, ``[rows, length]``.
        settings: Temperature, number of likeliest tokens, and whether hidden states are compared.
        layers: :func:`layer_origins` of the student, all of them.
    """
    assert not teacher.training, "dropout would blur what it says"
    compared = list(layers[:-1]) if settings.hidden_weight else []
    output = backbone(teacher)(**inputs, use_cache=False, output_hidden_states=bool(compared))
    hidden = tuple(output.hidden_states[layer + 1] for layer in compared)  # the first is that before any layer
    final = output.last_hidden_state[selected]
    vocabulary = int(teacher.config.get_text_config().vocab_size)
    top_k = None if settings.top_k is None or settings.top_k >= vocabulary else settings.top_k
    slices = final.split(max(1, _SLICE_BYTES // (4 * vocabulary)))
    if top_k is None:
        whole = [_log_probabilities(logits(teacher, part), None, settings.temperature) for part in slices]
        return Targets(torch.cat(whole), None, None, hidden)
    indices, classes = [], []
    for part in slices:
        values = logits(teacher, part)
        indices.append(values.topk(top_k).indices)
        classes.append(_log_probabilities(values, indices[-1], settings.temperature))
    kept, rest = torch.cat(classes).split([top_k, 1], dim=1)
    return Targets(kept, torch.cat(indices), rest[:, 0], hidden)


def divergence(student_logits: Tensor, targets: Targets, settings: Distillation) -> Tensor:
    """The sum over positions of KL(teacher || student) at the temperature, times its square.

    With ``top_k`` it runs over the k tokens and one class of all others. By the log-sum inequality that is a lower
    bound of the divergence over the vocabulary, and it rises with k.

    Args:
        student_logits: Of the same positions, ``[positions, vocabulary]``.
        targets: Of :func:`teacher_targets`, with the same settings.
        settings: Holds the temperature.

    Returns:
        A scalar of at least 0, in float32 (float64 of float64 logits).
    """
    student = _log_probabilities(student_logits, targets.indices, settings.temperature)
    teacher = targets.log_probabilities
    if targets.rest is not None:
        teacher = torch.cat([teacher, targets.rest[:, None]], dim=1)
    terms = teacher.exp() * (teacher - student)
    each = torch.where(teacher > -torch.inf, terms, 0.0).sum(1)  # p (log p - log q) is 0 where p is
    return each.clamp(min=0).sum() * settings.temperature**2  # by rounding, equal ones may be -1e-7 apart


def _log_probabilities(values: Tensor, indices: Tensor | None, temperature: float) -> Tensor:
    """Log-probabilities from logits ``[positions, vocabulary]``.

    With the indices of tokens to keep apart, ``[positions, k]``, the result is ``[positions, k + 1]``: theirs, and that
    of all other tokens together.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32)) / temperature
    if indices is not None:
        # Not 1 minus the kept: where next to nothing is left, that would be rounding alone, and so would its gradient.
        rest = values.scatter(1, indices, -torch.inf).logsumexp(1, keepdim=True)
        values = torch.cat([values.gather(1, indices), rest], dim=1)
    return values.log_softmax(1)


def hidden_distance(student_hidden: Sequence[Tensor], targets: Targets, mask: Tensor) -> Tensor:
    """The sum over real tokens of the mean over layers of |student − teacher|² / |teacher|².

    Each token has its own norm, since a few of them have hidden states that are larger by orders of magnitude.

    Args:
        student_hidden: ``hidden_states[1:-1]`` of the student, each ``[rows, length, hidden]``: after every layer but
            the last one, whose entry has passed the final norm; the logits cover it.
        targets: Of :func:`teacher_targets`, with a positive ``hidden_weight``.
        mask: Which tokens are real, ``[rows, length]``.

    Returns:
        A scalar, in float32 (float64 of a float64 model).
    """
    total = torch.zeros((), device=mask.device)
    for ours, theirs in zip(student_hidden, targets.hidden, strict=True):
        wide = torch.promote_types(theirs.dtype, torch.float32)
        wanted = theirs[mask.bool()].to(wide)
        squared = (ours[mask.bool()].to(wide) - wanted).square().sum(-1)
        total = total + (squared / wanted.square().sum(-1)).sum()
    return total / max(1, len(targets.hidden))
