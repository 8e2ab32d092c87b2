"""Time stamps on a CPU and on a GPU."""

import time
from collections.abc import Sequence
from typing import Protocol

import torch


def finish(device: torch.device) -> None:
    """Waits until a device has done all that it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Clock(Protocol):
    """Marks moments now, and tells the seconds between them later."""

    def mark(self) -> object:
        """Notes this moment."""

    def seconds(self, marks: Sequence[object]) -> list[float]:
        """Seconds from the first mark to each of the others."""


class WallClock:
    """``perf_counter``; the device finishes its work before each stamp, if it is not the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> float:
        """Notes this moment."""
        finish(self._device)
        return time.perf_counter()

    def seconds(self, marks: Sequence[object]) -> list[float]:
        """Seconds from the first mark to each of the others."""
        stamps = [mark for mark in marks if isinstance(mark, float)]
        return [stamp - stamps[0] for stamp in stamps[1:]]


class CudaClock:
    """CUDA events: they are recorded between the kernels, and nothing waits for them until the end of a run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """Notes this moment of the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, marks: Sequence[object]) -> list[float]:
        """Seconds from the first mark to each of the others, when the last has passed."""
        events = [mark for mark in marks if isinstance(mark, torch.cuda.Event)]
        events[-1].synchronize()
        return [events[0].elapsed_time(event) / 1000 for event in events[1:]]  # elapsed_time is in milliseconds


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else WallClock(device)
