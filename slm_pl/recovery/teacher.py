"""The dense model that a compressed one learns from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from slm_pl import loading
from slm_pl.compression.architecture import num_layers
from slm_pl.compression.plan import Plan, count_parameters
from slm_pl.recovery.distillation import (
    Distillation,
    check_teacher,
    divergence,
    hidden_distance,
    layer_origins,
    teacher_targets,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Teacher:
    """A frozen model, whole on every process; no part of what is trained, saved or spread over processes.

    Args:
        model: In eval mode, on the device to compute on.
        settings: What is learnt from it.
        layers: For every layer of the student, the teacher's layer that it stands for.
    """

    def __init__(self, model: "PreTrainedModel", settings: Distillation, layers: Sequence[int]) -> None:
        self.model = model.requires_grad_(False).eval()
        self.settings = settings
        self.layers = layers

    @classmethod
    def load(
        cls,
        settings: Distillation,
        source: loading.Source,
        plans: Sequence[Plan],
        student: "PreTrainedModel",
        device: torch.device,
    ) -> "Teacher":
        """Loads the teacher in the student's dtype.

        Args:
            settings: Which one; its default is the model that the plans started from.
            source: Where the student comes from.
            plans: What was done to it, in order.
            student: The model to be trained.
            device: Where to.

        Raises:
            UsageError: If it cannot be loaded, or does not fit the student.
        """
        if settings.teacher is not None:
            source = loading.resolve(settings.teacher, None, source.trust_remote_code)
        elif plans and plans[0].base.pretrained != source.pretrained:
            base = plans[0].base
            # A plan may be a stranger's: that the user trusts the code of one model does not let it choose another.
            source = loading.resolve(base.pretrained, base.revision)
        dtype = str(student.dtype).removeprefix("torch.")
        attention = getattr(student.config, "_attn_implementation", None)
        model = loading.load_model(source, dtype, attention)  # type: ignore[arg-type]
        check_teacher(model, student, settings)
        layers = layer_origins(plans, num_layers(model)) if settings.hidden_weight else []
        rank_zero_info(f"Teacher: {source.pretrained}, {count_parameters(model) / 1e6:,.1f} M parameters, frozen")
        model.to(device)  # type: ignore[arg-type]
        return cls(model, settings, layers)

    def losses(
        self, inputs: dict[str, Tensor], selected: Tensor, logits: Tensor, hidden: Sequence[Tensor], mask: Tensor
    ) -> dict[str, Tensor]:
        """What is added to the likelihood of a micro-batch, by name, as sums.

        Args:
            inputs: What the student read.
            selected: Which positions predict a label, bool ``[rows, length]``.
            logits: The student's there, ``[positions, vocabulary]``.
            hidden: The student's embeddings and states after each layer; empty where they are not compared.
            mask: 1 for tokens, 0 for padding, ``[rows, length]``.

        Returns:
            ``kl``, a sum over positions, and ``hidden``, a sum over tokens, as far as they have a weight.
        """
        settings = self.settings
        targets = teacher_targets(self.model, inputs, selected, settings, self.layers)
        found = {}
        if settings.weight:
            found["kl"] = settings.weight * divergence(logits, targets, settings)
        if settings.hidden_weight:
            # The last layer's entry is after the final norm; the logits speak for it.
            found["hidden"] = settings.hidden_weight * hidden_distance(hidden[1:-1], targets, mask)
        return found
