"""Where things are in a Hugging Face model: the only file that knows module paths and config fields.

To support another architecture, add one entry to :data:`ARCHITECTURES` and its pico config to
``tests/helpers/pico.py``; the contract tests do the rest.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FUSED_MLP = ("mlp.gate_up_proj", "mlp.down_proj")
_NEOX_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


@dataclass(frozen=True)
class Architecture:
    """Module paths and config fields of one model type.

    Attributes:
        layers: Path of the ``ModuleList`` of decoder layers, from the causal language model.
        final: Paths of the modules between the last decoder layer and the language-model head, in order. One that a
            model of this type does not have is passed over.
        projections: Paths of the linear maps inside one decoder layer. All other parameters of a layer, and the
            biases, are its *other parameters*.
        experts: Names of the parameters of the experts and their router inside one decoder layer. They are kept with
            the projections. The experts of two layers do not correspond, so no sum or mean of them is formed.
        per_layer_lists: Config fields that hold one entry for each layer.
    """

    layers: str = "model.layers"
    final: tuple[str, ...] = ("model.norm",)
    projections: tuple[str, ...] = _ATTENTION + _GATED_MLP
    experts: tuple[str, ...] = ()
    per_layer_lists: tuple[str, ...] = ("layer_types",)


_EXPERTS = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")

ARCHITECTURES: dict[str, Architecture] = {
    "bloom": Architecture(
        layers="transformer.h",
        final=("transformer.ln_f",),
        projections=("self_attention.query_key_value", "self_attention.dense", *_NEOX_MLP),
    ),
    "gemma2": Architecture(),
    "gemma3_text": Architecture(),
    "glm4": Architecture(projections=_ATTENTION + _FUSED_MLP),
    "gpt_neox": Architecture(
        layers="gpt_neox.layers",
        final=("gpt_neox.final_layer_norm",),
        projections=("attention.query_key_value", "attention.dense", *_NEOX_MLP),
    ),
    "granite": Architecture(),
    "llama": Architecture(),
    "mistral": Architecture(),
    "mixtral": Architecture(projections=_ATTENTION, experts=_EXPERTS),
    "olmo2": Architecture(),
    "opt": Architecture(
        layers="model.decoder.layers",
        final=("model.decoder.final_layer_norm", "model.decoder.project_out"),
        projections=(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "fc1",
            "fc2",
        ),
    ),
    "phi3": Architecture(projections=("self_attn.qkv_proj", "self_attn.o_proj", *_FUSED_MLP)),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    # Some of its layers may have an ordinary MLP.
    "qwen3_moe": Architecture(experts=_EXPERTS),
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
            f"{', '.join(sorted(ARCHITECTURES))}. {_looks_like(model)}To add it, write one entry in "
            "slm_pl/compression/architecture.py."
        )
    return ARCHITECTURES[model_type]


def _looks_like(model: nn.Module) -> str:
    """What the entry of an unknown model would probably say: where its layers are, and the matrices in one."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and module]
    config = getattr(model, "config", None)
    expected = getattr(config, "num_hidden_layers", None)
    if not lists:
        return ""
    # As many as the config says; else the outermost, since a layer may itself hold a longer list of experts.
    path, layers = min(lists, key=lambda found: (len(found[1]) != expected, found[0].count("."), -len(found[1])))
    matrices = [name for name, p in layers[0].named_parameters() if p.ndim > 1]
    shown = ", ".join(matrices[:12]) + (", …" if len(matrices) > 12 else "")
    return (
        f"Its decoder layers seem to be {path!r} ({len(layers)} x {type(layers[0]).__name__}) with the weight matrices "
        f"{shown or '(none)'}. "
    )


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
    if architecture.experts:
        _set_layers_without_experts(config, origins)
    config.num_hidden_layers = len(layers)  # configs with another name for it, such as n_layer, map this one


def _set_layers_without_experts(config: "PreTrainedConfig", origins: list[int]) -> None:
    """Says by index which layers have an ordinary MLP; a rule like "every second layer" no longer holds."""
    step = getattr(config, "decoder_sparse_step", None)
    if step is None:
        return
    without = [origin in config.mlp_only_layers or (origin + 1) % step != 0 for origin in origins]
    config.mlp_only_layers = [index for index, dense in enumerate(without) if dense]
    config.decoder_sparse_step = 1


def backbone(model: "PreTrainedModel") -> nn.Module:
    """The model without its language-model head; its output is the final hidden state, after the final norm."""
    return model.base_model


def final_hidden_state(model: "PreTrainedModel", hidden: Tensor) -> Tensor:
    """What :func:`backbone` makes of the output of the last decoder layer: the final norm, and a projection if any."""
    for path in architecture_of(model).final:
        parent, _, name = path.rpartition(".")
        module = getattr(model.get_submodule(parent), name)
        if module is not None:
            hidden = module(hidden)
    return hidden


def logits(model: "PreTrainedModel", hidden: Tensor) -> Tensor:
    """What the language-model head makes of a final hidden state, scaled and capped as the model's forward does."""
    values = model.get_output_embeddings()(hidden)
    scaling = getattr(model.config, "logits_scaling", None)
    if scaling is not None:
        values = values / scaling
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        values = torch.tanh(values / cap) * cap
    return values


def projection_names(architecture: Architecture) -> set[str]:
    """Names in the ``named_parameters()`` of a decoder layer: weights of the projections, experts and routers."""
    return {f"{path}.weight" for path in architecture.projections} | set(architecture.experts)


def lora_targets(model: "PreTrainedModel") -> list[str]:
    """Module names that LoRA adapts by default: all projections, but of a model with experts those of attention alone.

    There, PEFT takes the names of an MLP's projections for the experts, also where some layers have an ordinary MLP.
    """
    architecture = architecture_of(model)
    paths = _ATTENTION if architecture.experts else architecture.projections
    return sorted({path.rpartition(".")[2] for path in paths})
