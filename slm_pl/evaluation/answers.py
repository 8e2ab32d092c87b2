"""Measured figures in the cache directory, found again for the same weights and the same questions."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from slm_pl import files
from slm_pl.errors import UsageError
from slm_pl.evaluation._model import device_of
from slm_pl.evaluation._ranks import world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""Version of what an entry holds."""


@dataclass(frozen=True)
class Answers:
    """An entry of the cache.

    Args:
        result: The figures, as JSON has them.
        samples: The records of every question, by task, where they were kept.
    """

    result: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]] | None


def text_sha256(text: str) -> str:
    """Hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Hash of a model's configuration and of every parameter and buffer, by name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        known = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def key(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", asked: Mapping[str, object]) -> str:
    """Name of an entry: a hash of what decides the figures to the last digit, but for the kind of CPU.

    Args:
        model: For its weights, their dtype and device.
        tokenizer: For its vocabulary and rules.
        asked: What was asked and how.
    """
    import transformers

    from slm_pl.data.tokenised import fingerprint  # not at the top: the data modules import lightning

    device = device_of(model)
    known = {
        "format": FORMAT,
        "weights": weights_sha256(model),
        "tokenizer": fingerprint(tokenizer, {}, ()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": str(getattr(getattr(model, "config", None), "_attn_implementation", None)),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "processes": world()[1],
        **asked,
    }
    return text_sha256(json.dumps(known, sort_keys=True))


def find(name: str, samples: bool) -> Answers | None:
    """An entry, if the first process has it.

    Args:
        name: Its :func:`key`.
        samples: Whether the records of the questions are needed, too; only the first process gets them.
    """
    rank, processes = world()
    entry = _read(name, samples) if rank == 0 else None
    if processes == 1:
        return entry
    box = [None if entry is None else entry.result]
    dist.broadcast_object_list(box, src=0)
    return entry if rank == 0 or box[0] is None else Answers(box[0], None)


def _read(name: str, samples: bool) -> Answers | None:
    path = files.cache_directory() / "zero_shot" / name
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
        if not samples:
            return Answers(result, None)
        return Answers(result, json.loads((path / "samples.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def keep(name: str, result: Mapping[str, Any], samples: Mapping[str, Any] | None) -> None:
    """Leaves an entry, whole or not at all; a cache that cannot be written, or is being written, costs no figures."""
    from lm_eval.utils import handle_non_serializable

    path = files.cache_directory() / "zero_shot" / name
    try:
        files.make_directory(path.parent)
        with files.new_directory(path, overwrite=True) as directory:
            if samples is not None:
                text = json.dumps(samples, default=handle_non_serializable, ensure_ascii=False)
                (directory / "samples.json").write_text(text, encoding="utf-8")
            (directory / "result.json").write_text(json.dumps(result), encoding="utf-8")
    except UsageError as error:
        warnings.warn(f"The figures are not kept for the next time: {error}", stacklevel=2)
