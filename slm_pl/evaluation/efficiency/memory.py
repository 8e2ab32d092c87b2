"""How much memory a model and its runs take."""

import contextlib
import ctypes
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slm_pl.compression.architecture import ARCHITECTURES, attention_windows, cache_values, decoder_layers
from slm_pl.evaluation.efficiency.record import PeakMemory
from slm_pl.memory import plain_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each storage once; quantised tensors count as they are stored."""
    storages = {}
    for tensor in tensors:
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return tensor_bytes([*model.parameters(), *model.buffers()])


def cache_bytes(model: "PreTrainedModel", batch_size: int, tokens: int, static: bool = False) -> int | None:
    """Bytes of a key/value cache, by arithmetic.

    Args:
        model: Its layers may differ in width, and in how far back they look.
        batch_size: Rows.
        tokens: Of each row.
        static: Whether it has its length from the start; else it grows with its tokens.

    Returns:
        The bytes; None if the architecture is not known.
    """
    if model.config.model_type not in ARCHITECTURES:
        return None
    architecture = ARCHITECTURES[model.config.model_type]
    values = 0
    for layer, window in zip(decoder_layers(model), attention_windows(model), strict=True):
        # A layer with a window keeps what the next token will see of the past; from the start, room for that one, too.
        kept = tokens if window is None else min(tokens, window if static else window - 1)
        values += kept * cache_values(layer, architecture)
    return values * batch_size * model.dtype.itemsize


def free_memory() -> int | None:
    """Bytes of main memory that this process can still take, where the system tells: its own limit, if it has one."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    lines = info.read_text().splitlines()
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    # A container's or a job's limit: Linux, Control Group v2.
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free.append(max(int(text) - int(used.read_text()), 0))
    return min(free, default=None)


class PeakMeter:
    """Peak memory between ``reset`` and ``read``.

    ``clear`` comes first, and a run between it and ``reset``: memory that was given back has to be taken anew, which
    takes time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reason = f"no peak memory counter for device {device.type!r} on this system"

    def clear(self) -> None:
        """Gives back what is free; else what earlier work took would count as used, or as reserved."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "cpu":
            # Only glibc can be told to give it back.
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)

    def reset(self) -> None:
        """Starts anew from what is in use now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            try:
                # Sets the high-water mark of the resident set to its present size: man 5 proc, /proc/pid/clear_refs.
                Path("/proc/self/clear_refs").write_text("5")
                self.reason = ""
            except OSError as error:
                self.reason = f"the process's peak resident set cannot be reset: {error}"

    def read(self) -> tuple[PeakMemory | None, str]:
        """The peak, or None and why."""
        if self.device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
            return PeakMemory(allocated, "torch.cuda.max_memory_allocated", reserved), ""
        if self.reason:
            return None, self.reason
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return PeakMemory(int(line.split()[1]) * 1024, "process peak resident set (VmHWM)"), ""
        return None, "the system does not report a peak resident set (VmHWM)"
