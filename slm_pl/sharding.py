"""Weights of which each process holds only a part: DeepSpeed's ZeRO stage 3.

Stages 1 and 2 divide the optimizer's state and the gradients. There every process has all weights, and needs nothing of
this file but :func:`load_trained`. FSDP divides weights too; nothing here loads or gathers them for it.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from slm_pl import loading
from slm_pl.errors import UsageError
from slm_pl.sums import check_sums

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def is_sharded(strategy: Strategy) -> bool:
    """Whether each process holds only a part of every weight during training."""
    return isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3


def check_strategy(strategy: Strategy, training: bool) -> None:
    """Refuses a strategy that this project cannot work with.

    Args:
        strategy: The trainer's.
        training: Whether the run is a fit.

    Raises:
        UsageError: If it spreads weights in a way that is not known here, or where nothing is trained.
    """
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise UsageError(
            f"{type(strategy).__name__} spreads the weights over the processes in a way that the export cannot gather. "
            "Use ddp, or DeepSpeed's stage 3: --trainer.strategy configs/parts/strategy_deepspeed_3.yaml."
        )
    if is_sharded(strategy) and not training:
        raise UsageError(
            "DeepSpeed's stage 3 spreads the weights over the processes, which is for training only. Prune and measure "
            "with --trainer.strategy auto (or ddp)."
        )


def adamw(strategy: Strategy) -> Callable[..., Optimizer]:
    """AdamW, on the CPU if DeepSpeed keeps the optimizer's state in main memory; it refuses PyTorch's there."""
    config = strategy.config if isinstance(strategy, DeepSpeedStrategy) else None
    if isinstance(config, dict) and "offload_optimizer" in config.get("zero_optimization", {}):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam  # AdamW unless told otherwise
    return torch.optim.AdamW


@contextmanager
def whole_parameters() -> Iterator[None]:
    """Parameters made in here stay whole although the strategy's ``model_sharded_context`` is around it.

    Make adapters so: DeepSpeed divides a parameter when the ``__init__`` of its module returns, and what PEFT sets
    afterwards would meet an empty tensor: B would not be zero when training starts, which is when DeepSpeed divides
    those that are still whole.
    """
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


def load_sharded(
    source: loading.Source, dtype: loading.DType = "auto", attn_implementation: str | None = None
) -> "PreTrainedModel":
    """Loads a causal language model of which no process ever holds more than its part and one tensor.

    All processes call it, inside ``model_sharded_context`` of the strategy, as in ``configure_model``. The first reads
    tensor after tensor; each is sent to the others and divided before it reads the next. (Transformers' own loader
    reads the whole checkpoint into the first process.)

    Args:
        source: A directory or Hub id with safetensors.
        dtype: As for :func:`slm_pl.loading.load_model`, but a 16-bit precision of the trainer goes before it: where
            weights are not divided, Lightning casts them when training starts.
        attn_implementation: As there.

    Returns:
        The model in eval mode, with its buffers on this process's device.

    Raises:
        UsageError: If there is no such model, or it lacks weights, or they are not as the config says, or transformers
            would have to convert them; or if the strategy divides weights in another way.
    """
    from deepspeed.runtime.zero import partition_parameters
    from transformers import GenerationConfig

    context = partition_parameters.top_level_context
    if context is None:
        raise UsageError(
            "Of the strategies that spread the weights over the processes, only DeepSpeed's stage 3 is supported: "
            "configs/parts/strategy_deepspeed_3.yaml."
        )
    with whole_parameters(), ExitStack() as stack:
        config = loading.read_config(source)
        if source.directory is not None:
            check_sums(source.directory)
        stored = _open(source, stack)
        wanted = config.dtype or _read(stored, min(stored)).dtype if dtype == "auto" else getattr(torch, dtype)
        if context.dtype != torch.float32:
            wanted = context.dtype
        # On the meta device first: a layer may be given its width after it was made, when it would be divided already.
        try:
            model = loading.empty_model(config, dtype=wanted, attn_implementation=attn_implementation)
        except Exception as error:
            raise loading.unreadable(source, "model", error) from error
        names = _stored_names(model, stored, source.pretrained)
        for parameter, aliases in _tensors(model.named_parameters(remove_duplicate=False)):
            whole = nn.Parameter(torch.empty_like(parameter, device=context.local_device), parameter.requires_grad)
            if context.rank == 0:
                whole.data.copy_(_read(stored, names[aliases[0]]))
            context._convert_to_zero_parameters([whole])  # sends what the first process has, and keeps a part of it
            _put(model, aliases, whole)
        buffers = {name: _read(stored, names[name]) for name, _ in model.named_buffers() if name in names}
        _fill_buffers(model, buffers, context.local_device)
    model.config._name_or_path = source.pretrained
    generation = _directory(source) / "generation_config.json"
    if generation.is_file():
        model.generation_config = GenerationConfig.from_pretrained(generation.parent)
    return model.eval()


def _directory(source: loading.Source) -> Path:
    """The source itself, or where the Hub's client keeps its files."""
    from huggingface_hub import snapshot_download

    if source.directory is not None:
        return source.directory
    wanted = ["model*.safetensors", "*.json"]
    return Path(snapshot_download(source.location, revision=source.revision, allow_patterns=wanted))


def _open(source: loading.Source, stack: ExitStack) -> dict[str, Any]:
    """Opens the files of a checkpoint; returns for the name of each tensor the file that holds it."""
    from safetensors import safe_open

    stored: dict[str, Any] = {}
    try:
        for path in loading.weight_files(_directory(source)):
            file = stack.enter_context(safe_open(path, framework="pt"))
            stored |= dict.fromkeys(file.keys(), file)
    except UsageError:
        raise
    except Exception as error:
        raise loading.unreadable(source, "model", error) from error
    return stored


def _read(stored: dict[str, Any], name: str) -> Tensor:
    return cast("Tensor", stored[name].get_tensor(name))


def _stored_names(model: "PreTrainedModel", stored: dict[str, Any], pretrained: str) -> dict[str, str]:
    """For the name of each tensor of a model, that in its checkpoint; they may differ by what transformers renames.

    Every process reads the shapes, so that all stop if one would.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    tensors = model.state_dict()
    names: dict[str, str] = {}
    for where in stored:
        name, converted = rename_source_key(where, renamings, converters, model.base_model_prefix, tensors)
        if converted is not None:
            raise UsageError(
                f"Transformers converts weights of {pretrained} as it loads them, such as {where} (the experts of a "
                "layer become one tensor), which DeepSpeed stage 3 cannot do tensor by tensor. Use stage 2."
            )
        names[name] = where
    for _, aliases in _tensors(model.named_parameters(remove_duplicate=False)):
        # Of tied weights a checkpoint holds one, under either name.
        names |= dict.fromkeys(aliases, next((names[a] for a in aliases if a in names), ""))
    if missing := [name for name in tensors if not names.get(name)]:
        raise loading.incomplete(pretrained, missing)
    loading.check_layers(model.config, names, pretrained)
    for name, tensor in tensors.items():
        shape = stored[names[name]].get_slice(names[name]).get_shape()
        if list(tensor.shape) != shape:
            raise UsageError(
                f"{names[name]} of {pretrained} has the shape {shape}; its config asks for {list(tensor.shape)}. Get "
                "the checkpoint and the config that belong together."
            )
    return names


def _tensors(named: Iterator[tuple[str, Tensor]]) -> list[tuple[Tensor, list[str]]]:
    """Each tensor once, with all names it has."""
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in named:
        found.setdefault(id(tensor), (tensor, []))[1].append(name)
    return list(found.values())


def _put(model: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Makes a tensor the parameter or buffer of these names."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # else transformers would draw it at random
    for name in names:
        holder, _, last = name.rpartition(".")
        setattr(model.get_submodule(holder), last, tensor)


def _fill_buffers(model: "PreTrainedModel", values: dict[str, Tensor], device: torch.device) -> None:
    """Gives an empty model its buffers: these values, and what transformers computes, such as rotary frequencies."""
    for name, buffer in list(model.named_buffers()):
        holder, _, last = name.rpartition(".")
        value = values[name].to(buffer.dtype) if name in values else torch.empty_like(buffer, device="cpu")
        setattr(model.get_submodule(holder), last, value)
    model.initialize_weights()
    for buffer, names in _tensors(model.named_buffers(remove_duplicate=False)):
        _put(model, names, buffer.to(device))


def load_trained(strategy: DeepSpeedStrategy, path: "str | os.PathLike[str]") -> None:
    """Puts the trained weights of a checkpoint into the model that DeepSpeed trains, for all its stages.

    All processes call it, before the trainer tears the strategy down. The optimizer is left as it is, so no step may
    follow. (The engine's own ``load_checkpoint`` would, in stage 3, gather the whole model in every process.)

    Args:
        strategy: With the engine.
        path: A checkpoint directory of this run. It is unpickled: never one that someone else made.
    """
    from deepspeed import zero
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, Tensor] = {}
    if strategy.is_global_zero:
        weights = get_fp32_state_dict_from_zero_checkpoint(path, exclude_frozen_parameters=True)
    assert strategy.lightning_module is not None
    for name, p in strategy.lightning_module.named_parameters():
        if p.requires_grad:
            with zero.GatheredParameters([p], modifier_rank=0), torch.no_grad():
                if strategy.is_global_zero and p.numel():  # DeepSpeed leaves out what a layer has lost whole
                    p.copy_(weights[name])
                if not is_sharded(strategy):
                    dist.broadcast(p.data, 0)


def merged_on_first_rank(model: "PreTrainedModel | PeftModel", strategy: DeepSpeedStrategy) -> "PreTrainedModel | None":
    """Makes a plain Hugging Face model of one whose weights are divided, adapters merged, in the first process.

    All processes call it, before the trainer tears the strategy down. Weights are gathered one module at a time; no
    other process holds more. The sum of weight and update is formed in float32 and rounded once.

    Args:
        model: With or without adapters; it stays as it is.
        strategy: That divided it.

    Returns:
        In the first process the whole model, on the CPU and in eval mode; in the others None.
    """
    from deepspeed import zero
    from peft import get_peft_model

    adapted = hasattr(model, "peft_config")
    base = cast("PreTrainedModel", cast("PeftModel", model).get_base_model() if adapted else model)
    plain: PreTrainedModel | None = None
    twin: Any = None
    if strategy.is_global_zero:
        plain = loading.empty_model(copy.deepcopy(base.config), dtype=base.dtype)
        twin = plain
        if adapted:  # a second PEFT model, so that PEFT merges whatever kind of update it is
            peft_config = copy.deepcopy(cast("PeftModel", model).active_peft_config)
            twin = get_peft_model(plain, peft_config, low_cpu_mem_usage=True)
    for name, module, parameters in _units(model):
        with zero.GatheredParameters(list(parameters.values())):
            if twin is not None:
                copies = {key: p.detach().to("cpu", copy=True) for key, p in parameters.items()}
        if twin is not None:
            _fill(twin.get_submodule(name), copies, adapted and _has_adapter(module))
    if plain is None:
        return None
    if adapted:
        plain = cast("PreTrainedModel", twin.unload())
    plain.tie_weights()
    persistent = plain.state_dict()
    _fill_buffers(plain, {n: b.cpu() for n, b in base.named_buffers() if n in persistent}, torch.device("cpu"))
    plain.generation_config = base.generation_config
    return plain.eval()


def _has_adapter(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _units(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """What is gathered at once: a module's own parameters, or those of a linear map and its adapters."""
    adapted = "\n"  # no name begins so
    for name, module in model.named_modules():
        if not name.startswith(adapted):
            whole = _has_adapter(module)
            adapted = f"{name}." if whole else adapted
            if parameters := dict(module.named_parameters(recurse=whole)):
                yield name, module, parameters


def _fill(module: nn.Module, values: dict[str, Tensor], merge: bool) -> None:
    """Gives a module its parameters; with adapters, adds them to its weight."""
    for name, value in values.items():
        _put(module, [name], nn.Parameter(value.float() if merge else value, requires_grad=False))
    if merge:
        layer: Any = module
        layer.merge()
        for name, value in values.items():
            module.get_parameter(name).data = module.get_parameter(name).to(value.dtype)
