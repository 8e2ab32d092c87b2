"""Options and table of ``estimate``."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jsonargparse import ArgumentParser
from rich import box
from rich.console import Console
from rich.table import Table

from slm_pl.errors import UsageError
from slm_pl.estimate.costs import MACHINES, Machine
from slm_pl.estimate.run import Estimate
from slm_pl.recovery.memory import GB

MachineName = Literal["a100", "h100", "this"]

DESCRIPTION = """\
Tells what configs take of each GPU before anything is run: operations, bytes, memory, time. No weights are
needed; where configs/architectures does not have the model's sizes, its config.json is fetched.

A phase takes max(F / peak, B / bandwidth) / utilisation seconds. F are the operations of its matrix products, B the
bytes of the weights, once for every batch that goes through them. A forward pass of T tokens in samples of L takes
T (2 P + 4 q L) operations for each decoder layer of P weights and q entries of all query heads, and 2 T V h for a head
of V rows; training with adapters, forward and backward, two such passes, and a third where layers are checkpointed. How
often a search passes through a layer is counted while the method itself decides on a narrow stand-in of as many layers;
where that depends on what it finds (a threshold, lazy), the real model takes more or less. Not counted: loading,
tokenising, element-wise work, exports and communication; utilisation stands for what they take.
"""


def estimate_parser() -> ArgumentParser:
    """Options of ``estimate``."""
    parser = ArgumentParser(prog="main.py estimate", description=DESCRIPTION)
    parser.add_argument("--config", nargs="+", required=True, help="Configs, each a whole run as fit takes it.")
    parser.add_argument("--ratio", type=float | None, default=None, help="As for fit: the share that is removed.")
    parser.add_argument(
        "--machine", type=MachineName, default="a100", help="The peaks of one GPU; `this` measures this computer's."
    )
    parser.add_argument("--utilisation", type=float, default=0.4, help="Share of the peaks that is reached.")
    parser.add_argument(
        "--architecture",
        type=str | None,
        default=None,
        help="The model's config.json; null takes it from configs/architectures, or from the model.",
    )
    return parser


def machine_of(name: str, utilisation: float) -> Machine:
    """The machine of this name.

    Raises:
        UsageError: If one is out of range.
    """
    if not 0 < utilisation <= 1:
        raise UsageError(f"--utilisation is {utilisation}; it is a share of the peaks, in (0, 1]. For 40 % give 0.4.")
    if name in MACHINES:
        return MACHINES[name]
    assert name in get_args(MachineName)
    from slm_pl.evaluation.efficiency.work import machine_peak

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    half, single, double = (machine_peak(device, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    return Machine(f"this {device.type}", half.flops_per_s, single.flops_per_s, double.flops_per_s, single.bytes_per_s)


def table(one: Estimate, machine: Machine, utilisation: float) -> Table:
    """A row for every phase of a config."""
    before, after = (f"{value / 1e9:.2f}" for value in one.parameters)
    shown = Table(title=f"{one.name}: {before} → {after} billion parameters; of each GPU", box=box.MARKDOWN)
    for name in ("phase", "GPUs", "PFLOP", "TB read", "GB", "time", "GPU-hours"):
        shown.add_column(name, justify="left" if name == "phase" else "right")
    hours = 0.0
    for phase in one.phases:
        seconds = phase.seconds(machine, utilisation)
        hours += seconds * phase.gpus / 3600
        too_much = machine.memory is not None and phase.memory > machine.memory
        shown.add_row(
            phase.name,
            str(phase.gpus),
            f"{(phase.flops + phase.flops64) / 1e15:,.3g}",
            f"{phase.bytes / 1e12:,.3g}",
            f"{phase.memory / GB:.1f}{' (does not fit)' if too_much else ''}",
            _time(seconds),
            f"{seconds * phase.gpus / 3600:.2f}",
        )
    if one.phases:
        most = f"{max(phase.memory for phase in one.phases) / GB:.1f}"
        shown.add_row("all", "", "", "", most, "", f"{hours:.2f}")
    return shown


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show(estimates: Sequence[Estimate], machine: Machine, utilisation: float) -> None:
    """Prints the tables, and under each what is not in it."""
    console = Console()
    peaks = f"{machine.flops / 1e12:,.4g} TFLOP/s ({machine.flops32 / 1e12:,.3g} in float32) and "
    peaks += f"{machine.bytes_per_s / GB:,.4g} GB/s"
    console.print(f"On {machine.name}, {utilisation:.0%} of {peaks}:", highlight=False)
    for one in estimates:
        console.print(table(one, machine, utilisation))
        for reason in dict.fromkeys(one.left_out):
            console.print(f"not counted, or assumed: {reason}", soft_wrap=True, highlight=False)
