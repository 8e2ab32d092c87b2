"""What NVIDIA's management library (NVML) tells of a GPU while a model runs on it.

All readings but the process's memory are of the whole GPU, whoever uses it. They are coarser than the samples are
close: utilisation is that of the driver's last sample period, between 1/6 s and 1 s depending on the product, so the
first samples still tell of the time before the counted runs; they are left out where these last long enough. Power is
the present one on GA100 and on GPUs older than Ampere, and the mean of the last second on newer ones. Figures of a few
seconds or less are rough.
"""

import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TypeVar

import torch

from slm_pl.evaluation.efficiency.record import Energy, Spread, Utilisation

_T = TypeVar("_T")
_PERIOD = 1.0  # seconds: the longest time over which drivers take the mean
_READINGS = ("gpu_percent", "memory_percent", "power_w", "sm_clock_mhz", "temperature_c")


@dataclass(frozen=True)
class Sample:
    """Readings of one moment; None of those that NVML did not give.

    Args:
        at: ``time.perf_counter()`` just before reading.
        gpu_percent: Share of the driver's last sample period in which a kernel ran.
        memory_percent: Share of it in which the GPU's memory was read or written.
        power_w: Watts of the GPU and its memory.
        sm_clock_mhz: Clock of the streaming multiprocessors.
        temperature_c: Degrees Celsius.
        process_bytes: GPU memory of this process, its CUDA context included.
        device_bytes: GPU memory that is not free: that of all processes and what driver and firmware reserve.
            ``nvidia-smi`` leaves the reserve out, and so shows some hundred megabytes less.
    """

    at: float
    gpu_percent: float | None = None
    memory_percent: float | None = None
    power_w: float | None = None
    sm_clock_mhz: float | None = None
    temperature_c: float | None = None
    process_bytes: int | None = None
    device_bytes: int | None = None


@dataclass(frozen=True)
class GpuFigures:
    """What the samples of the counted runs come to.

    Args:
        utilisation: Utilisation, power, clock and temperature.
        energy: Energy.
        process_bytes: Most memory of this process in a sample.
        device_bytes: Most memory in use on the GPU in a sample.
        missing: Why something is absent, by ``gpu_utilisation``, ``gpu_energy`` and ``gpu_memory``.
    """

    utilisation: Utilisation | None = None
    energy: Energy | None = None
    process_bytes: int | None = None
    device_bytes: int | None = None
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Handle:
    """A GPU that NVML can measure.

    Args:
        nvml: The module ``pynvml``.
        gpu: What its functions take for the GPU.
    """

    nvml: ModuleType
    gpu: object


def find(device: torch.device) -> Handle | str:
    """Starts NVML and finds torch's GPU by UUID: ``CUDA_VISIBLE_DEVICES`` renumbers GPUs for torch, not for NVML.

    Returns:
        The GPU, and then ``pynvml.nvmlShutdown`` is left to the caller; or why NVML cannot measure it.
    """
    if device.type != "cuda":
        return f"the model ran on {device.type}; NVML measures NVIDIA GPUs"
    try:
        import pynvml
    except ImportError:
        return "the package nvidia-ml-py is not installed"
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"NVML did not start: {error}"
    try:
        handle = Handle(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        if not _has_mig(handle):
            return handle
        reason = "the model ran on a MIG instance; NVML measures utilisation and power of whole GPUs only"
    except pynvml.NVMLError as error:
        reason = f"NVML gave no access to {uuid}: {error}"
    pynvml.nvmlShutdown()
    return reason


def summarise(samples: Sequence[Sample], start: float, end: float) -> Utilisation | None:
    """Summarises the samples from ``start`` to ``end``; None if nothing was read in that time."""
    inside = _inside(samples, start, end)
    readings = {name: [value for s in inside if (value := getattr(s, name)) is not None] for name in _READINGS}
    spreads = {name: Spread.of(values) for name, values in readings.items() if values}
    return Utilisation(end - start, len(inside), **spreads) if spreads else None


def settled(start: float, end: float) -> float:
    """From when on samples tell of the time after ``start`` alone: a second later, if that leaves two at least."""
    return start + _PERIOD if end - start >= 3 * _PERIOD else start


def energy(
    samples: Sequence[Sample],
    start: float,
    end: float,
    counter_start_mj: int | None,
    counter_end_mj: int | None,
    tokens: int,
) -> Energy | None:
    """Energy from ``start`` to ``end``, by the GPU's counter or else by integrating the power.

    Args:
        samples: In order of time. Power counts as linear between two samples, and as constant before the first and
            after the last one inside.
        start: Seconds, on the clock of the samples.
        end: Likewise.
        counter_start_mj: The counter at ``start``, in millijoules.
        counter_end_mj: The counter at ``end``. One that has not advanced does not count: the time was too short for it.
        tokens: Among how many tokens the energy is divided.

    Returns:
        The energy; None without a counter and with fewer than two samples of the power.
    """
    if counter_start_mj is not None and counter_end_mj is not None and counter_end_mj > counter_start_mj:
        joules = (counter_end_mj - counter_start_mj) / 1000
        return Energy(joules, joules / tokens, "NVML energy counter")
    line = [(s.at, s.power_w) for s in _inside(samples, start, end) if s.power_w is not None]
    if len(line) < 2:
        return None
    line = [(start, line[0][1]), *line, (end, line[-1][1])]
    joules = sum((after - before) * (p + q) / 2 for (before, p), (after, q) in itertools.pairwise(line))
    return Energy(joules, joules / tokens, "NVML power, integrated over time")


def memory_peaks(samples: Sequence[Sample], start: float, end: float) -> tuple[int | None, int | None]:
    """Most bytes of this process and most bytes in use on the GPU, of the samples from ``start`` to ``end``."""
    inside = _inside(samples, start, end)
    process = [s.process_bytes for s in inside if s.process_bytes is not None]
    device = [s.device_bytes for s in inside if s.device_bytes is not None]
    return max(process, default=None), max(device, default=None)


class GpuSampler:
    """Samples a GPU in a thread of its own while the context lasts; does nothing where NVML cannot measure.

    Enter it once, after the warm-up and with the GPU idle; leave it when the GPU has finished the last counted run.

    Args:
        device: Where the model runs.
        interval: Seconds from the end of one sample to the next.
    """

    def __init__(self, device: torch.device, interval: float = 0.05) -> None:
        self._device = device
        self._interval = interval
        self._found: Handle | str = "the GPU was not sampled"
        self._samples: list[Sample] = []
        self._refused: dict[str, str] = {}
        self._failure: str | None = None
        self._start = self._end = 0.0
        self._counter_start: int | None = None
        self._counter_end: int | None = None
        self._stop = threading.Event()

    def __enter__(self) -> "GpuSampler":
        self._found = find(self._device)
        if isinstance(self._found, Handle):
            self._thread = threading.Thread(target=self._run, args=(self._found,), name="GpuSampler", daemon=True)
            self._counter_start = self._counter(self._found)
            self._start = time.perf_counter()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if isinstance(self._found, Handle):
            self._end = time.perf_counter()
            self._counter_end = self._counter(self._found)
            self._stop.set()
            self._thread.join()
            self._found.nvml.nvmlShutdown()

    def figures(self, tokens: int) -> GpuFigures:
        """What was measured, after the context has been left.

        Args:
            tokens: Among how many tokens the energy is divided.
        """
        if isinstance(self._found, str):
            return GpuFigures(missing=dict.fromkeys(("gpu_utilisation", "gpu_energy", "gpu_memory"), self._found))
        # What was sampled before the thread failed would pass for the whole time.
        samples = [] if self._failure else self._samples
        used = summarise(samples, settled(self._start, self._end), self._end)
        joules = energy(samples, self._start, self._end, self._counter_start, self._counter_end, tokens)
        process, device = memory_peaks(samples, self._start, self._end)
        reasons = {
            "gpu_utilisation": self._why({name: getattr(used, name, None) for name in _READINGS}),
            "gpu_energy": self._why({"energy counter": joules, "power_w": joules}),
            "gpu_memory": self._why({"process_bytes": process, "device_bytes": device}),
        }
        return GpuFigures(used, joules, process, device, {key: reason for key, reason in reasons.items() if reason})

    def _why(self, figures: Mapping[str, object]) -> str:
        """Why some of the figures are None; empty if none is."""
        default = self._failure or f"the {self._end - self._start:.3f} s of the counted runs were too short"
        reasons: dict[str, list[str]] = {}
        for name, figure in figures.items():
            if figure is None:
                reasons.setdefault(self._refused.get(name, default), []).append(name)
        return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())

    def _run(self, handle: Handle) -> None:
        try:
            while not self._stop.is_set():
                self._samples.append(self._sample(handle))
                self._stop.wait(self._interval)
        except Exception as error:
            self._failure = f"the sampling thread failed: {type(error).__name__}: {error}"

    def _sample(self, handle: Handle) -> Sample:
        nvml, gpu = handle.nvml, handle.gpu

        def read(name: str, reading: Callable[[], _T]) -> _T | None:
            return self._read(handle, name, reading)

        return Sample(
            at=time.perf_counter(),
            gpu_percent=read("gpu_percent", lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
            memory_percent=read("memory_percent", lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).memory),
            power_w=read("power_w", lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
            sm_clock_mhz=read("sm_clock_mhz", lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            temperature_c=read("temperature_c", lambda: _temperature(handle)),
            process_bytes=read("process_bytes", lambda: _own_bytes(handle)),
            device_bytes=read("device_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used),
        )

    def _counter(self, handle: Handle) -> int | None:
        nvml, gpu = handle.nvml, handle.gpu
        return self._read(handle, "energy counter", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu))

    def _read(self, handle: Handle, name: str, reading: Callable[[], _T]) -> _T | None:
        try:
            return reading()
        except (handle.nvml.NVMLError, handle.nvml.NVMLLibraryMismatchError, LookupError) as error:
            self._refused[name] = str(error)
            return None


def _has_mig(handle: Handle) -> bool:
    try:
        return handle.nvml.nvmlDeviceGetMigMode(handle.gpu)[0] == handle.nvml.NVML_DEVICE_MIG_ENABLE
    except handle.nvml.NVMLError_NotSupported:  # GPUs older than Ampere
        return False


def _temperature(handle: Handle) -> int:
    nvml = handle.nvml
    try:
        return nvml.nvmlDeviceGetTemperatureV(handle.gpu, nvml.NVML_TEMPERATURE_GPU)
    except nvml.NVMLError_FunctionNotFound:  # drivers older than the function
        return nvml.nvmlDeviceGetTemperature(handle.gpu, nvml.NVML_TEMPERATURE_GPU)


def _own_bytes(handle: Handle) -> int:
    for process in handle.nvml.nvmlDeviceGetComputeRunningProcesses(handle.gpu):
        if process.pid == os.getpid() and process.usedGpuMemory is not None:
            return process.usedGpuMemory
    raise LookupError("NVML does not tell it, as on Windows and in containers with process ids of their own")


def _inside(samples: Sequence[Sample], start: float, end: float) -> list[Sample]:
    return [sample for sample in samples if start <= sample.at <= end]
