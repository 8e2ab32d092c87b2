"""Where things are in a Hugging Face model: the only file that knows module paths and config fields.

To support another architecture, add one entry to :data:`ARCHITECTURES` and its pico config to
``tests/helpers/pico.py``; the contract tests do the rest.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """Module paths and config fields of one model type.

    Attributes:
        layers: Path of the ``ModuleList`` of decoder layers, from the causal language model.
        projections: Paths of the linear maps inside one decoder layer. All other parameters of a layer, and the
            biases, are its *other parameters*.
        num_layers: Config field that counts the layers.
        per_layer_lists: Config fields that hold one entry for each layer.
    """

    layers: str = "model.layers"
    projections: tuple[str, ...] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    num_layers: str = "num_hidden_layers"
    per_layer_lists: tuple[str, ...] = ("layer_types",)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
}


def architecture_of(model: "PreTrainedModel") -> Architecture:
    """Finds the entry of a model.

    Raises:
        UsageError: If the architecture is not supported.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in ARCHITECTURES:
        raise UsageError(
            f"The model is a {type(model).__name__} of model_type {model_type!r}; supported are "
            f"{', '.join(sorted(ARCHITECTURES))}. To add it, write one entry in slm_pl/compression/architecture.py."
        )
    return ARCHITECTURES[model_type]


def num_layers(model: "PreTrainedModel") -> int:
    """How many decoder layers a model has; also of one that cannot be compressed."""
    return int(model.config.get_text_config().num_hidden_layers)


def decoder_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """The decoder layers of a model, in order."""
    return model.get_submodule(architecture_of(model).layers)  # type: ignore[return-value]


def set_decoder_layers(model: "PreTrainedModel", layers: list[nn.Module], origins: list[int]) -> None:
    """Gives a model other decoder layers and makes everything that counts layers agree.

    Args:
        model: The causal language model, changed in place.
        layers: The layers it is to have.
        origins: For each of them, the index of the layer whose entry it takes in the config's per-layer lists.
    """
    architecture = architecture_of(model)
    path, _, name = architecture.layers.rpartition(".")
    setattr(model.get_submodule(path), name, nn.ModuleList(layers))
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the key/value cache is addressed by it
                module.layer_idx = index  # type: ignore[assignment]
    config = model.config
    for field in architecture.per_layer_lists:
        entries = getattr(config, field, None)
        if entries is not None:
            setattr(config, field, [entries[origin] for origin in origins])
    setattr(config, architecture.num_layers, len(layers))


def backbone(model: "PreTrainedModel") -> nn.Module:
    """The model without its language-model head; its output is the final hidden state, after the final norm."""
    return model.base_model


def final_norm(model: "PreTrainedModel") -> nn.Module:
    """The norm between the last decoder layer and the language-model head."""
    return backbone(model).norm  # type: ignore[return-value]


def projection_names(architecture: Architecture) -> list[str]:
    """Names of the projection weights in the ``named_parameters()`` of a decoder layer."""
    return [f"{path}.weight" for path in architecture.projections]


def lora_targets(model: "PreTrainedModel") -> list[str]:
    """Module names that LoRA adapts by default: all projections (the last part of each path)."""
    return sorted({path.rpartition(".")[2] for path in architecture_of(model).projections})
