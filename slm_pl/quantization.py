"""Weights of 8 bits: torchao's weight-only int8, as a switch of loading and of exporting.

The weight of a linear map becomes a row of int8 numbers for each of its outputs and one scale per row, so that
w ≈ scale · q. The scale is max |w| / 127.5 of the row, q is w / scale rounded to -128..127, and zero stays zero. The
map widens q to the dtype of the model and computes in that: less memory for weights, but no less time.
"""

import importlib.util
import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from torch import nn

from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, TorchAoConfig

Quantization = Literal["int8"]
INT8 = "int8 weight-only (torchao)"


def quantization_of(config: "PreTrainedConfig") -> str | None:
    """Names what the weights of a model are quantised to.

    Args:
        config: Of a checkpoint, or of a model that is loaded.

    Returns:
        ``int8 weight-only (torchao)`` for what this package writes, the name of the method for anything else, None for
        weights that are not quantised.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    entries = found if isinstance(found, Mapping) else getattr(found, "to_dict", dict)()
    if _is_int8(entries.get("quant_type")):
        return INT8
    if "quant_method" not in entries:
        return "bitsandbytes" if {"load_in_8bit", "load_in_4bit"} & set(entries) else "unknown method"
    method = entries["quant_method"]
    return str(getattr(method, "value", method))


def _is_int8(quant_type: object) -> bool:
    default = quant_type.get("default") if isinstance(quant_type, dict) else None
    if not isinstance(default, dict) or default.get("_type") != "Int8WeightOnlyConfig":
        return False
    settings = default.get("_data") or {}
    rows = (settings.get("granularity") or {}).get("_type", "PerRow") == "PerRow"
    return rows and settings.get("group_size") is None


def check_quantization(config: "PreTrainedConfig", name: str, wanted: Quantization | None) -> None:
    """Refuses, before any weight is read, what cannot be loaded.

    Args:
        config: Of the checkpoint.
        name: Of the checkpoint.
        wanted: What its weights are to be quantised to.

    Raises:
        UsageError: If torchao is needed and missing, or the weights are quantised in another way.
    """
    found = quantization_of(config)
    if wanted is not None and found not in (None, INT8):
        raise UsageError(
            f"{name} is quantised already ({found}); quantization {wanted} is for weights that are not. Leave it out, "
            "or give the checkpoint as it was before."
        )
    if found in (INT8, "torchao"):
        require_torchao(f"{name}, whose weights are quantised with it,")
    elif wanted is not None:
        require_torchao(f"quantization {wanted}")


def require_torchao(what: str) -> None:
    """Refuses what torchao is needed for, where it is missing.

    Raises:
        UsageError: If it is not installed, or older than transformers wants.
    """
    from transformers.utils import is_torchao_available

    if importlib.util.find_spec("torchao") is None or not is_torchao_available():
        raise UsageError(
            f"{what} needs torchao 0.16 or newer, which is not installed here. Install it: "
            "pip install -e '.[quantization]'"
        )


def compress_first(name: str, found: str, work: str) -> UsageError:
    """What to tell the user who wants to change weights that are quantised.

    Args:
        name: Of the model.
        found: What its weights are.
        work: What cannot be done to them, such as ``trained``.
    """
    return UsageError(
        f"The weights of {name} are quantised ({found}) and cannot be {work}. Start from the model as it was before, "
        "without model.quantization, and quantise what comes out: give callbacks.ExportCheckpoint quantization: int8."
    )


def int8_config(model: "PreTrainedModel | None" = None) -> "TorchAoConfig":
    """What makes transformers quantise as it loads.

    Args:
        model: What will be loaded, without its weights, if its layers differ in width: a map that lost all its inputs
            has no largest weight, so it stays as it is.
    """
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    kept: list[str] | None = None  # what transformers chooses: the language-model head
    if model is not None:
        head = model.get_output_embeddings()
        linear = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
        kept = [name for name, module in linear if module is head or module.in_features == 0]
    # torchao would also change how torch compiles for the whole process; an older one its float32 products, too.
    settings = Int8WeightOnlyConfig(version=2, set_inductor_config=False)
    return TorchAoConfig(settings, modules_to_not_convert=kept)


_NO_CONCERN = re.compile(r"Failed to load \S*_C\w*\S*\.so|.* is an Enum subclass and is now natively supported")


def _concerns_somebody(record: logging.LogRecord) -> bool:
    return _NO_CONCERN.match(record.getMessage()) is None


def quieten() -> None:
    """Drops what importing torchao logs: kernels that int8 does not use, and a note to its authors."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).addFilter(_concerns_somebody)
