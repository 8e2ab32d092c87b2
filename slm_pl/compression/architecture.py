"""Where things are in a Hugging Face model: the only file that knows module paths and config fields.

To support another architecture, add one entry to :data:`ARCHITECTURES` and its pico config to
``tests/helpers/pico.py``; the contract tests do the rest.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FUSED_MLP = ("mlp.gate_up_proj", "mlp.down_proj")
_NEOX_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

MOST_LAYERS = 1000
"""Decoder layers that a config or a plan may name; either may come from a stranger. Llama 3.1 405B has 126."""

_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")

Group = Literal["attention", "mlp"]
"""What can be made narrower: attention by KV groups (heads, without grouped queries), MLPs by intermediate channels."""
GROUPS: tuple[Group, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class Architecture:
    """Module paths and config fields of one model type.

    Attributes:
        layers: Path of the ``ModuleList`` of decoder layers, from the causal language model.
        final: Paths of the modules between the last decoder layer and the language-model head, in order. One that a
            model of this type does not have is passed over.
        attention: Paths of attention's linear maps inside one decoder layer: query, key, value and output, or one map
            for the first three and the output.
        mlp: The same of its MLP: the maps that read the hidden state (gate and up, one map for both, or up alone) and
            the one that writes it. Empty if it has experts only.
        attention_order: How the rows of one map for query, key and value are ordered: all queries, then all keys, then
            all values, or those of one head after another.
        head_norms: Norms over the queries and over the keys of all heads together.
        output_norms: Norms of what attention and what the MLP write, before it is added to the hidden state; empty
            where it is added as it is.
        fixed_heads: Why no head can be removed; null where they can.
        own_head_dim: Whether the config says the size of a head, so that there can be fewer of them.
        intermediate: The config field of the MLP's width; null where it follows from the hidden size.
        experts: Names of the parameters of the experts and their router inside one decoder layer. They are kept with
            the projections. The experts of two layers do not correspond, so no sum or mean of them is formed, and they
            keep their width.
        per_layer_lists: Config fields that hold one entry for each layer.
        packable: Whether position ids that start again keep the examples of a row from attending to each other.
    """

    layers: str = "model.layers"
    final: tuple[str, ...] = ("model.norm",)
    attention: tuple[str, ...] = _ATTENTION
    mlp: tuple[str, ...] = _GATED_MLP
    attention_order: Literal["separate", "stacked", "by_head"] = "separate"
    head_norms: tuple[str, ...] = ()
    output_norms: tuple[str, ...] = ()
    fixed_heads: str | None = None
    own_head_dim: bool = True
    intermediate: str | None = "intermediate_size"
    experts: tuple[str, ...] = ()
    per_layer_lists: tuple[str, ...] = ("layer_types", "layer_widths")
    packable: bool = True

    @property
    def projections(self) -> tuple[str, ...]:
        """Paths of the linear maps inside a decoder layer; all other parameters and the biases are its *others*."""
        return self.attention + self.mlp


_EXPERTS = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")

ARCHITECTURES: dict[str, Architecture] = {
    "bloom": Architecture(
        layers="transformer.h",
        final=("transformer.ln_f",),
        attention=("self_attention.query_key_value", "self_attention.dense"),
        attention_order="by_head",
        mlp=_NEOX_MLP,
        fixed_heads="its position biases (ALiBi) go by the number of the head",
        own_head_dim=False,
        intermediate=None,
        packable=False,
    ),
    "gemma2": Architecture(output_norms=_POST_NORMS),
    "gemma3_text": Architecture(output_norms=_POST_NORMS),
    "glm4": Architecture(mlp=_FUSED_MLP, output_norms=("post_self_attn_layernorm", "post_mlp_layernorm")),
    "gpt_neox": Architecture(
        layers="gpt_neox.layers",
        final=("gpt_neox.final_layer_norm",),
        attention=("attention.query_key_value", "attention.dense"),
        attention_order="by_head",
        mlp=_NEOX_MLP,
        own_head_dim=False,
    ),
    "granite": Architecture(),
    "llama": Architecture(),
    "mistral": Architecture(),
    "mixtral": Architecture(mlp=(), experts=_EXPERTS),
    "olmo2": Architecture(head_norms=("self_attn.q_norm", "self_attn.k_norm"), output_norms=_POST_NORMS),
    "opt": Architecture(
        layers="model.decoder.layers",
        final=("model.decoder.final_layer_norm", "model.decoder.project_out"),
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        mlp=("fc1", "fc2"),
        own_head_dim=False,
        intermediate="ffn_dim",
        packable=False,
    ),
    "phi3": Architecture(
        attention=("self_attn.qkv_proj", "self_attn.o_proj"), attention_order="stacked", mlp=_FUSED_MLP
    ),
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
    return config_layers(model.config)


def config_layers(config: "PreTrainedConfig") -> int:
    """How many decoder layers a config asks for."""
    return int(config.get_text_config().num_hidden_layers)


def layer_counts(said: Iterable[str]) -> list[str]:
    """Of the fields of a config file, those that say how many layers there are, whatever the model's type."""
    return [field for field in said if field in _LAYER_COUNTS]


def surplus_layers(config: "PreTrainedConfig", stored: Iterable[str]) -> list[str]:
    """Names of weights that belong to decoder layers beyond those that a config asks for.

    Args:
        config: Of a model; of a type that is not known here, nothing is found.
        stored: Names as in the checkpoint or as transformers renames them.
    """
    if config.model_type not in ARCHITECTURES:
        return []
    # A checkpoint of the model without its head leaves out the first part of the path.
    first, _, path = ARCHITECTURES[config.model_type].layers.partition(".")
    layer = re.compile(rf"(?:{re.escape(first)}\.)?{re.escape(path)}\.(\d{{1,9}})\.")
    found = [(name, layer.match(name)) for name in stored]
    return [name for name, match in found if match is not None and int(match[1]) >= config_layers(config)]


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
    paths = architecture.attention if architecture.experts else architecture.projections
    # Where no layer has kept its attention or its MLP, some are gone.
    there = {path for layer in decoder_layers(model) for path, _ in layer.named_modules()}
    return sorted({path.rpartition(".")[2] for path in paths if path in there})


@dataclass(frozen=True)
class Output:
    """How a group of a decoder layer reaches the hidden state: through a linear map, a norm if any, and a factor.

    Attributes:
        path: Of the map in the layer.
        map: The map.
        norm: The norm of what it writes, or None.
        factor: What that is multiplied by when it is added to the hidden state.
    """

    path: str
    map: nn.Linear
    norm: nn.Module | None
    factor: float


def output_of(model: "PreTrainedModel", layer: int, group: Group) -> Output | None:
    """How a group of a decoder layer writes.

    None where it is no linear map (experts), has lost all its units, or is not added to the hidden state as it is but
    normalised with it (OPT 350M).
    """
    if not getattr(model.config, "do_layer_norm_before", True):
        return None
    architecture, module = architecture_of(model), decoder_layers(model)[layer]
    paths = architecture.attention if group == "attention" else architecture.mlp
    found = dict(module.named_modules()).get(paths[-1]) if paths else None
    if not isinstance(found, nn.Linear) or found.in_features == 0:
        return None
    norm = None
    if architecture.output_norms:
        norm = module.get_submodule(architecture.output_norms[GROUPS.index(group)])
    factor = float(getattr(model.config.get_text_config(), "residual_multiplier", 1.0))
    return Output(paths[-1], found, norm, factor)


def attention_of(layer: nn.Module, architecture: Architecture) -> nn.Module:
    """The attention module of a decoder layer."""
    return layer.get_submodule(architecture.attention[-1].rpartition(".")[0])


def head_sizes(layer: nn.Module, architecture: Architecture) -> tuple[int, int]:
    """How many entries a head has, and how many query heads share one key/value head."""
    attention = attention_of(layer, architecture)
    size = getattr(attention, "head_dim", None) or attention.head_size
    return int(size), int(getattr(attention, "num_key_value_groups", 1))  # type: ignore[arg-type]


def cache_values(layer: nn.Module, architecture: Architecture) -> int:
    """How many values one token adds to the key/value cache of a layer: the keys and values of all its KV heads."""
    maps = dict(attention_of(layer, architecture).named_modules())
    names = [path.rpartition(".")[2] for path in architecture.attention[:-1]]
    if any(name not in maps for name in names):
        return 2  # it lost all its heads, and only counts tokens in the cache
    rows = [int(maps[name].weight.shape[0]) for name in names]
    if architecture.attention_order == "separate":
        return sum(rows[1:])
    _, queries = head_sizes(layer, architecture)
    return 2 * rows[0] // (queries + 2)


def attention_windows(model: "PreTrainedModel") -> list[int | None]:
    """How many tokens each decoder layer attends to; None for all."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [None if window is None else "sliding_attention"] * config_layers(model.config)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def context_length(config: "PreTrainedConfig") -> int | None:
    """How many tokens a model can attend to by its position embeddings; None where nothing limits them."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def idle_expert_bytes(model: "PreTrainedModel") -> int:
    """Bytes of the experts that one token does not use."""
    architecture = architecture_of(model)
    config = model.config.get_text_config()
    total = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if not architecture.experts or not total:
        return 0
    own = [
        parameter.numel() * parameter.element_size()
        for layer in decoder_layers(model)
        for name, parameter in layer.named_parameters()
        if name in architecture.experts[1:]  # the router comes first and is always used
    ]
    return sum(own) * (total - config.num_experts_per_tok) // total


def accepts(model: "PreTrainedModel", heads: int | None = None, channels: int | None = None) -> bool:
    """Whether the stock config takes so many query heads, or channels of the hidden state; some ask for a multiple.

    The config of a Llama or Gemma refuses a hidden size that the number of heads does not divide, although it says the
    size of a head by itself.
    """
    trial = copy.copy(model.config)  # of the config alone: two of its fields are set
    if heads is not None:
        trial.num_attention_heads = heads
    if channels is not None:
        trial.hidden_size = channels
    try:
        trial.validate_architecture()
    except ValueError:
        return False
    return True


def set_equal_widths(model: "PreTrainedModel", heads: int | None, groups: int | None, channels: int | None) -> None:
    """Writes widths that all layers share into the config, as stock transformers reads them.

    Args:
        model: The model; its layers have these widths already.
        heads: Query heads of each layer; None if no attention was made narrower.
        groups: Its key/value heads.
        channels: Intermediate channels of each MLP; None if no MLP was made narrower.
    """
    architecture, config = architecture_of(model), model.config
    if heads is not None:
        config.head_dim = head_sizes(decoder_layers(model)[0], architecture)[0]  # else it would follow from the heads
        config.num_attention_heads = heads
        config.num_key_value_heads = groups
    if channels is not None:
        assert architecture.intermediate is not None
        setattr(config, architecture.intermediate, channels)


def hidden_size(model: "PreTrainedModel") -> int:
    """How many channels the hidden state between two decoder layers has."""
    return int(model.config.get_text_config().hidden_size)


def query_width(model: "PreTrainedModel") -> int:
    """How many entries the query heads of a decoder layer have together, as the config says it."""
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def set_hidden_size(model: "PreTrainedModel", channels: int) -> None:
    """Makes the config and the modules agree on the width of a hidden state whose parameters have it already."""
    architecture, config, old = architecture_of(model), model.config, hidden_size(model)
    config.head_dim = head_sizes(decoder_layers(model)[0], architecture)[0]  # else it would follow from the hidden size
    config.hidden_size = channels
    for module in model.modules():
        for name in ("hidden_size", "hidden_dim", "embedding_dim"):
            if getattr(module, name, None) == old:
                setattr(module, name, channels)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(module.weight.shape)
        if hasattr(module, "embed_scale"):  # Gemma's, the root of the hidden size
            module.embed_scale.fill_(channels**0.5)  # type: ignore[operator]
            module.scalar_embed_scale = channels**0.5


def gguf_fields(config: "PreTrainedConfig") -> dict[str, int | float]:
    """What GGUF says of a Llama, in its own words without ``llama.`` in front: numbers that all layers share."""
    return {
        "block_count": config_layers(config),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }


def narrow_llama(layers: int, hidden: int, intermediate: int, heads: int, vocabulary: int) -> "PreTrainedModel":
    """A Llama of these sizes with weights drawn at random, in eval mode; its attention is made of plain products."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        initializer_range=0.2,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
