"""Which weights recovery trains, and how adapters become part of the model again."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from slm_pl.compression.architecture import decoder_layers, lora_targets
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (arXiv 2106.09685); the defaults are those of the published recovery recipe.

    Attributes:
        r: Rank.
        alpha: The update is scaled by ``alpha / r``.
        dropout: On the input of the low-rank path.
        target_modules: Names of the linear maps to adapt; null for all projections of the decoder layers.
        dora: Learn the length of each weight's columns apart from their direction (DoRA, arXiv 2402.09353).
        rslora: Scale by ``alpha / sqrt(r)`` instead, for large ranks (rsLoRA, arXiv 2312.03732).
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: list[str] | None = None
    dora: bool = False
    rslora: bool = False

    def __post_init__(self) -> None:
        """Refuses values PEFT would fail on later."""
        if self.r < 1:
            raise UsageError(f"lora.r is {self.r}; give a rank of at least 1 (published: 8), or lora: null.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"lora.dropout is {self.dropout}; give a probability in [0, 1) (published: 0.05).")


def numel(parameter: Tensor) -> int:
    """Entries of a parameter, also of one that DeepSpeed has spread over the processes."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def say_trainable(model: nn.Module, what: str) -> None:
    """Tells the share of the parameters that is trained."""
    parameters = list(model.parameters())
    trained = sum(numel(p) for p in parameters if p.requires_grad)
    rank_zero_info(
        f"{what}: {trained / 1e6:,.2f} M of {sum(map(numel, parameters)) / 1e6:,.1f} M parameters are trained"
    )


def add_adapters(model: "PreTrainedModel", lora: LoRA, float32: bool) -> "PeftModel":
    """Freezes a model and puts low-rank adapters beside its linear maps.

    Args:
        model: The compressed model, changed in place.
        lora: The adapters.
        float32: Keep them in float32 whatever the model's dtype is.

    Raises:
        UsageError: If the model has no maps of these names.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules or lora_targets(model)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if unknown := sorted(set(targets) - names):
        raise UsageError(
            f"lora.target_modules names {unknown}, which the model does not have. Its projections are "
            f"{lora_targets(model)}."
        )
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM",
        # What a layer lost whole has nothing to adapt.
        exclude_modules=_without_entries(model) or None,
    )
    adapted = cast("PeftModel", get_peft_model(model, config, autocast_adapter_dtype=float32))
    say_trainable(adapted, f"{'DoRA' if lora.dora else 'LoRA'} r={lora.r}")
    return adapted


def _without_entries(model: nn.Module) -> list[str]:
    """Names of the linear maps that have no inputs or no outputs left."""
    linear = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name, module in linear if numel(module.weight) == 0]


def train_last_layers(model: "PreTrainedModel", count: int) -> None:
    """Freezes all but the last decoder layers and the language-model head (partial-layer tuning, arXiv 2411.15558).

    Where the head shares its weight with the embeddings, these are trained, too.

    Raises:
        UsageError: If there are not so many layers.
    """
    layers = decoder_layers(model)
    if count > len(layers):
        raise UsageError(f"model.last_layers is {count}, but the model has {len(layers)} decoder layers.")
    model.requires_grad_(False)
    for layer in layers[len(layers) - count :]:
        layer.requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)
    say_trainable(model, f"The last {count} decoder layers and the head")


@torch.no_grad()
def merge_adapters(model: "PeftModel") -> "PreTrainedModel":
    """Adds the adapters to the weights, in place, and removes them.

    The sum is formed in float32 and rounded to the weight's dtype once: in bfloat16, an update added to a weight that
    is 256 times larger would be lost.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            base = cast(nn.Linear, module.get_base_layer())
            dtype = base.weight.dtype
            cast(nn.Module, module).float()
            module.merge()
            base.to(dtype)
    return cast("PreTrainedModel", model.unload())
