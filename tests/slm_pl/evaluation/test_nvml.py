import inspect
import os
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch

from slm_pl.evaluation.efficiency.nvml import GpuSampler, Handle, Sample, energy, find, memory_peaks, settled, summarise

GIB = 2**30
GPU = torch.device("cuda", 0)
KEYS = ["gpu_utilisation", "gpu_energy", "gpu_memory"]

# Written by hand in the form that NVML gives, no GPU was read: two samples of a warm-up, four from 10 s to 12 s, one
# from afterwards.
SAMPLES = [
    Sample(9.0, 3, 1, 55.0, 210, 33, 3 * GIB, 30 * GIB),
    Sample(9.9, 100, 99, 400.0, 1980, 71, 9 * GIB, 31 * GIB),
    Sample(10.2, 90, 40, 200.0, 1400, 40, 4 * GIB, 8 * GIB),
    Sample(10.6, 96, 44, 240.0, 1410, 42, 5 * GIB, 9 * GIB),
    Sample(11.0, 98, 60, 260.0, 1410, 44, 5 * GIB, 9 * GIB),
    Sample(11.8, 92, 48, 220.0, 1380, 46, None, 8 * GIB),
    Sample(12.1, 0, 0, 60.0, 210, 45, 7 * GIB, 32 * GIB),
]


def test_utilisation_leaves_out_the_period_that_began_before():
    assert settled(10.0, 14.0) == 11.0
    assert settled(10.0, 12.5) == 10.0  # too short to leave anything out


def test_summary_of_the_counted_time_only():
    used = summarise(SAMPLES, 10.0, 12.0)
    assert (used.seconds, used.samples) == (2.0, 4)
    assert (used.gpu_percent.median, used.gpu_percent.min, used.gpu_percent.max) == (94, 90, 98)
    assert (used.memory_percent.mean, used.memory_percent.max) == (48, 60)
    assert (used.power_w.mean, used.power_w.max, used.power_w.n) == (230, 260, 4)
    assert (used.sm_clock_mhz.median, used.sm_clock_mhz.min) == (1405, 1380)
    assert (used.temperature_c.min, used.temperature_c.max) == (40, 46)


def test_summary_includes_samples_on_the_border():
    assert summarise(SAMPLES, 10.2, 11.8).samples == 4
    assert summarise(SAMPLES, 10.21, 11.79).samples == 2


def test_summary_without_readings():
    assert summarise(SAMPLES, 9.2, 9.8) is None
    assert summarise([Sample(1.0, device_bytes=GIB), Sample(1.5)], 0.0, 2.0) is None


def test_summary_of_what_was_read():
    used = summarise([Sample(1.0, power_w=50.0), Sample(1.5), Sample(1.8, power_w=70.0)], 0.0, 2.0)
    assert (used.samples, used.power_w.n, used.power_w.mean) == (3, 2, 60)
    assert used.gpu_percent is used.temperature_c is None


def test_energy_by_the_counter():
    taken = energy(SAMPLES, 10.0, 12.0, 8_000_000_500, 8_000_481_000, tokens=1000)
    assert taken.joules == pytest.approx(480.5)
    assert taken.joules_per_token == pytest.approx(0.4805)
    assert taken.source == "NVML energy counter"


@pytest.mark.parametrize("counter", [(None, None), (7, None), (None, 7), (7, 7)])
def test_energy_by_the_power(counter):
    taken = energy(SAMPLES, 10.0, 12.0, *counter, tokens=100)
    # 0.2 s at 200 W, 0.4 s from 200 W to 240 W, 0.4 s from 240 W to 260 W, 0.8 s from 260 W to 220 W, 0.2 s at 220 W
    assert taken.joules == pytest.approx(40 + 88 + 100 + 192 + 44)
    assert taken.joules_per_token == pytest.approx(4.64)
    assert taken.source == "NVML power, integrated over time"


def test_energy_against_interpolation():
    generator = numpy.random.default_rng(0)
    at = numpy.sort(generator.uniform(0, 10, 60))
    power = generator.uniform(50, 400, 60)
    samples = [Sample(float(t), power_w=float(p)) for t, p in zip(at, power, strict=True)]
    start, end = 2.5, 7.25
    inside = (at >= start) & (at <= end)
    assert 10 < inside.sum() < 50
    # Means of slices of 10 us; ``interp``, too, is constant beyond the points.
    edges = numpy.linspace(start, end, 475_001)
    slices = numpy.interp((edges[1:] + edges[:-1]) / 2, at[inside], power[inside])
    expected = slices.mean() * (end - start)
    assert energy(samples, start, end, None, None, tokens=1).joules == pytest.approx(expected, rel=1e-6)


def test_energy_skips_samples_without_power():
    samples = [Sample(0.0, power_w=100.0), Sample(1.0, gpu_percent=50), Sample(2.0, power_w=200.0)]
    assert energy(samples, 0.0, 2.0, None, None, tokens=1).joules == pytest.approx(300)


def test_no_energy_of_a_single_sample():
    assert energy(SAMPLES, 10.0, 10.5, None, None, tokens=1) is None
    assert energy(SAMPLES, 10.0, 10.5, 1000, 3000, tokens=1).joules == 2


def test_memory_peaks_of_the_counted_time_only():
    assert memory_peaks(SAMPLES, 10.0, 12.0) == (5 * GIB, 9 * GIB)
    assert memory_peaks(SAMPLES, 11.5, 12.0) == (None, 8 * GIB)
    assert memory_peaks(SAMPLES, 13.0, 14.0) == (None, None)


class StandInPynvml(ModuleType):
    """Stands in for ``pynvml``: two made-up GPUs, of which the second is torch's first."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801
        pass

    class NVMLError_FunctionNotFound(NVMLError):  # noqa: N801
        pass

    class NVMLLibraryMismatchError(Exception):
        pass

    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self):
        super().__init__("pynvml")
        self.gpus = {"GPU-aaaa": "gpu in slot 0", "GPU-bbbb": "gpu in slot 1"}
        self.started = self.stopped = 0
        self.calls = 0
        self.enough = threading.Event()
        self.counter = iter([5_000_000, 5_012_500])
        self.process = SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * GIB)

    def nvmlInit(self):
        self.started += 1

    def nvmlShutdown(self):
        self.stopped += 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.gpus:
            raise self.NVMLError("Not Found")
        return self.gpus[uuid]

    def nvmlDeviceGetMigMode(self, device):
        raise self.NVMLError_NotSupported("Not Supported")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return next(self.counter)

    def nvmlDeviceGetUtilizationRates(self, handle):
        assert handle == "gpu in slot 1"
        self.count()
        return SimpleNamespace(gpu=87, memory=35)

    def nvmlDeviceGetPowerUsage(self, handle):
        self.count()
        return 213_400

    def nvmlDeviceGetClockInfo(self, handle, type):
        self.count()
        return {self.NVML_CLOCK_SM: 1410}[type]

    def nvmlDeviceGetTemperatureV(self, handle, sensor):
        self.count()
        return {self.NVML_TEMPERATURE_GPU: 41}[sensor]

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return {self.NVML_TEMPERATURE_GPU: 39}[sensor]

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        self.count()
        return [SimpleNamespace(pid=-1, usedGpuMemory=20 * GIB), self.process]

    def nvmlDeviceGetMemoryInfo(self, handle):
        self.count()
        return SimpleNamespace(total=40 * GIB, free=16 * GIB, used=24 * GIB)

    def refuse(self, *names, error=None):
        def refusing(*args):
            self.count()
            raise error or self.NVMLError_NotSupported("Not Supported")

        for name in names:
            setattr(self, name, refusing)

    def count(self):
        self.calls += 1
        if self.calls == 40:  # some more than four rounds, whatever is refused
            self.enough.set()


@pytest.fixture
def pynvml(monkeypatch):
    stand_in = StandInPynvml()
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="bbbb"))
    yield stand_in
    assert stand_in.stopped == stand_in.started
    assert [thread for thread in threading.enumerate() if thread.name == "GpuSampler"] == []


def sampled(pynvml):
    """The figures of a run that lasts at least three samples."""
    with GpuSampler(GPU, interval=0.001) as sampler:
        assert pynvml.enough.wait(30)
    return sampler.figures(tokens=50)


def test_stand_in_is_called_as_the_package():
    package = pytest.importorskip("pynvml")
    for name, function in vars(StandInPynvml).items():
        if name.startswith("nvml"):
            arguments = list(inspect.signature(function).parameters)[1:]
            inspect.signature(getattr(package, name)).bind(*arguments)
        elif name.startswith("NVML_"):
            assert getattr(package, name) == function
        elif name.startswith("NVML"):
            assert issubclass(getattr(package, name), Exception)
    assert issubclass(package.NVMLError_NotSupported, package.NVMLError)
    assert issubclass(package.NVMLError_FunctionNotFound, package.NVMLError)
    assert [name for name, _ in package.c_nvmlUtilization_t._fields_] == ["gpu", "memory"]
    assert "used" in [name for name, _ in package.c_nvmlMemory_t._fields_]
    assert {"pid", "usedGpuMemory"} <= {name for name, _ in package.c_nvmlProcessInfo_t._fields_}


def test_all_figures(pynvml):
    figures = sampled(pynvml)
    used = figures.utilisation
    assert used.samples >= 3
    assert used.seconds > 0
    assert (used.gpu_percent.median, used.memory_percent.median) == (87, 35)
    assert (used.power_w.median, used.sm_clock_mhz.median, used.temperature_c.median) == (213.4, 1410, 41)
    assert (figures.energy.joules, figures.energy.joules_per_token) == (12.5, 0.25)
    assert (figures.process_bytes, figures.device_bytes) == (3 * GIB, 24 * GIB)
    assert figures.missing == {}
    assert pynvml.started == 1


def test_found_by_uuid(pynvml):
    found = find(GPU)
    assert isinstance(found, Handle)
    assert found.gpu == "gpu in slot 1"
    assert (pynvml.started, pynvml.stopped) == (1, 0)
    pynvml.nvmlShutdown()


def test_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GpuSampler(torch.device("cpu")) as sampler:
        pass
    figures = sampler.figures(tokens=1)
    assert figures.missing == dict.fromkeys(KEYS, "the model ran on cpu; NVML measures NVIDIA GPUs")
    assert figures.utilisation is figures.energy is figures.process_bytes is figures.device_bytes is None


def test_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with GpuSampler(GPU) as sampler:
        pass
    assert sampler.figures(tokens=1).missing == dict.fromkeys(KEYS, "the package nvidia-ml-py is not installed")


def test_no_driver(pynvml):
    pynvml.refuse("nvmlInit", error=pynvml.NVMLError("Driver Not Loaded"))
    with GpuSampler(GPU) as sampler:
        pass
    assert sampler.figures(tokens=1).missing["gpu_energy"] == "NVML did not start: Driver Not Loaded"


def test_unknown_gpu(pynvml):
    del pynvml.gpus["GPU-bbbb"]
    assert find(GPU) == "NVML gave no access to GPU-bbbb: Not Found"
    assert pynvml.started == 1


def test_no_permission(pynvml):
    pynvml.refuse("nvmlDeviceGetHandleByUUID", error=pynvml.NVMLError("Insufficient Permissions"))
    assert find(GPU) == "NVML gave no access to GPU-bbbb: Insufficient Permissions"


@pytest.mark.parametrize(("mode", "refused"), [([1, 1], True), ([0, 1], False)])
def test_mig(pynvml, mode, refused):
    pynvml.nvmlDeviceGetMigMode = lambda device: mode
    found = find(GPU)
    assert isinstance(found, str) == refused
    if refused:
        assert "MIG" in found
    else:
        pynvml.nvmlShutdown()


def test_unsupported_readings(pynvml):
    pynvml.refuse("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetClockInfo")
    pynvml.refuse("nvmlDeviceGetMemoryInfo", error=pynvml.NVMLError("Insufficient Permissions"))
    pynvml.refuse("nvmlDeviceGetTotalEnergyConsumption")
    figures = sampled(pynvml)
    assert figures.utilisation.gpu_percent is figures.utilisation.sm_clock_mhz is None
    assert figures.utilisation.power_w.median == 213.4
    assert figures.energy.joules == pytest.approx(213.4 * figures.utilisation.seconds)
    assert figures.energy.source == "NVML power, integrated over time"
    assert (figures.process_bytes, figures.device_bytes) == (3 * GIB, None)
    assert figures.missing == {
        "gpu_utilisation": "gpu_percent, memory_percent, sm_clock_mhz: Not Supported",
        "gpu_memory": "device_bytes: Insufficient Permissions",
    }


def test_nothing_supported(pynvml):
    pynvml.refuse(*(name for name in vars(StandInPynvml) if name.startswith("nvmlDeviceGet") and "UUID" not in name))
    figures = sampled(pynvml)
    assert figures.utilisation is figures.energy is figures.process_bytes is figures.device_bytes is None
    assert list(figures.missing) == KEYS
    assert figures.missing["gpu_energy"] == "energy counter, power_w: Not Supported"


def test_driver_older_than_a_function(pynvml):
    pynvml.refuse("nvmlDeviceGetTemperatureV", error=pynvml.NVMLError_FunctionNotFound("Function Not Found"))
    mismatch = pynvml.NVMLLibraryMismatchError("no such version")
    pynvml.refuse("nvmlDeviceGetComputeRunningProcesses", error=mismatch)
    figures = sampled(pynvml)
    assert figures.utilisation.temperature_c.median == 39
    assert figures.missing == {"gpu_memory": "process_bytes: no such version"}


@pytest.mark.parametrize("process", [(-2, GIB), (os.getpid(), None)])
def test_process_not_told(pynvml, process):
    pynvml.process = SimpleNamespace(pid=process[0], usedGpuMemory=process[1])
    figures = sampled(pynvml)
    assert (figures.process_bytes, figures.device_bytes) == (None, 24 * GIB)
    assert figures.missing["gpu_memory"].startswith("process_bytes: NVML does not tell it")


def test_failure_in_the_thread(pynvml):
    readings = iter([SimpleNamespace(used=24 * GIB)])

    def failing(handle):
        reading = next(readings, None)
        if reading is None:
            pynvml.enough.set()
            raise RuntimeError("torn wire")
        return reading

    pynvml.nvmlDeviceGetMemoryInfo = failing
    figures = sampled(pynvml)
    assert figures.utilisation is figures.device_bytes is None
    assert figures.missing["gpu_utilisation"].endswith("the sampling thread failed: RuntimeError: torn wire")
    assert figures.missing["gpu_memory"].endswith("RuntimeError: torn wire")
    assert figures.energy.joules == 12.5


def test_too_short(pynvml):
    pynvml.counter = iter([7, 7])
    with GpuSampler(GPU, interval=600) as sampler:
        pass
    figures = sampler.figures(tokens=1)
    assert figures.energy is None
    assert figures.missing["gpu_energy"].startswith("energy counter, power_w: the ")
    assert figures.missing["gpu_energy"].endswith(" s of the counted runs were too short")


def test_error_of_the_measured(pynvml):
    with pytest.raises(ZeroDivisionError), GpuSampler(GPU):
        1 / 0  # noqa: B018
    assert pynvml.stopped == 1


def test_never_entered():
    figures = GpuSampler(GPU).figures(tokens=1)
    assert figures.missing == dict.fromkeys(KEYS, "the GPU was not sampled")
