"""What a sweep is asked to do."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from slm_pl.errors import UsageError
from slm_pl.parts import Section

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OWN_SECTIONS = {"default_root_dir": "output_dir", "callbacks": "methods, measure and recovery.callbacks"}


@dataclass
class Recovery:
    """What ``fit`` is told beside the method; the sections lie on top of those of the sweep.

    Args:
        model: Such as ``lora`` and ``learning_rate``.
        data: Such as ``path`` and ``batch_size``.
        trainer: Such as ``max_epochs`` and ``strategy``.
        callbacks: Such as a ModelCheckpoint.
        config_version: There so that a whole config, such as configs/parts/recipe_lora_alpaca.yaml, can be named.
    """

    model: Section = field(default_factory=dict)
    data: Section = field(default_factory=dict)
    trainer: Section = field(default_factory=dict)
    callbacks: list[Section] = field(default_factory=list)
    config_version: int = 1

    def __post_init__(self) -> None:
        _check_trainer("recovery.trainer", self.trainer)
        for callback in self.callbacks:
            if "dirpath" in callback.get("init_args", {}):
                raise UsageError(
                    f"{callback['class_path']} of recovery.callbacks has a dirpath, which all cells would share. Leave "
                    "it out: each cell keeps its checkpoints in its own directory."
                )


@dataclass
class Jobs:
    """How submitit runs the cells, one job each.

    Args:
        cluster: ``slurm``, ``local`` (processes on this machine), ``debug`` (in this process), or null for what there
            is.
        parameters: Of submitit, such as ``timeout_min``, ``gpus_per_node``, ``mem_gb`` and ``slurm_partition``. A job
            is one task on one node; for several devices Lightning starts the processes.
        at_once: How many jobs may run at the same time. Of slurm this is the limit of the job array; other clusters
            get the cells in groups of at_once, and the next group when all jobs of the one before have ended.
    """

    cluster: Literal["slurm", "local", "debug"] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    at_once: int = 8

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks_per_node"):
            if self.parameters.get(name, 1) != 1:
                raise UsageError(
                    f"submitit.parameters.{name} is {self.parameters[name]}; a cell is one task on one node, and "
                    "Lightning starts its processes. Leave it out, and set trainer.devices."
                )
        if self.at_once < 1:
            raise UsageError(f"submitit.at_once is {self.at_once}; give 1 or more jobs.")


@dataclass
class SweepConfig:
    """Compresses one model with every method, to every size, with every seed; and measures and compares.

    A method's size is the share of all parameters that is removed. A method that is one callback gets it as ``ratio``.
    In a sequence, a callback with a ``ratio`` of its own keeps it, and the others get what is left in equal shares,
    each of the model that it finds: with two and 0.2 it is 0.1056 each, since 0.8944 x 0.8944 = 0.8.

    Args:
        output_dir: Where everything goes: a directory for each cell, and the tables.
        model: The dense model, as in any config.
        methods: By label: one compression callback, or a list of them in sequence. The value ``"{seed}"`` of an
            argument stands for the seed.
        ratios: Sizes to compress to, each in (0, 1).
        data: As in any config; the calibration text is what all methods look at.
        trainer: As in any config, without callbacks and default_root_dir.
        seeds: Each is seed_everything and the seed of the calibration sampler.
        recovery: Trains after compression: ``fit`` instead of ``prune``.
        measure: The test hooks.
        dense: Also measure the model as it is.
        keep_exports: Keep the compressed models; if not, their weights go as soon as they are measured.
        engine: ``process``: one cell after another on this machine; ``submitit``: a job for each.
        submitit: Of that engine.
        config_version: Which version of these options a YAML is for.
    """

    output_dir: str
    model: Section
    methods: dict[str, Section | list[Section]]
    ratios: list[float]
    measure: list[Section]
    data: Section = field(default_factory=dict)
    trainer: Section = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [1234])
    recovery: Recovery | None = None
    dense: bool = True
    keep_exports: bool = True
    engine: Literal["process", "submitit"] = "process"
    submitit: Jobs = field(default_factory=Jobs)
    config_version: int = 1

    def __post_init__(self) -> None:
        _check_trainer("trainer", self.trainer)
        _check_several("ratios", self.ratios, "numbers in (0, 1), the share of all parameters to remove, such as [0.2]")
        _check_several("seeds", self.seeds, "whole numbers, such as [1234]")
        wrong: list[float] = [ratio for ratio in self.ratios if not 0 < ratio < 1]
        if wrong:
            raise UsageError(f"ratios holds {wrong[0]}; a ratio is in (0, 1), the share of all parameters to remove.")
        if not self.measure:
            raise UsageError("measure is empty. List test hooks, such as configs/parts/quickstart_perplexity.yaml.")
        for label in self.methods:
            if not _LABEL.fullmatch(label) or label == "dense":
                raise UsageError(
                    f"methods has the label {label!r}; a label names directories: letters, digits, _, . and -, not "
                    "`dense`."
                )
            for callback in self.sequence(label):
                if not isinstance(callback.get("class_path"), str):
                    raise UsageError(
                        f"methods.{label} has no class_path. Give a compression callback, such as {{class_path: "
                        "callbacks.FLAP}, or a list of them."
                    )

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> "SweepConfig":
        """Makes one of what the parser gives; what is null there is as if it were left out."""
        given = _given(options)
        for name, kind in (("recovery", Recovery), ("submitit", Jobs)):
            if name in given:
                given[name] = kind(**_given(given[name]))
        return cls(**given)

    def sequence(self, label: str) -> list[Section]:
        """The callbacks of a method, in order.

        Raises:
            UsageError: If there are none.
        """
        method = self.methods[label]
        callbacks = method if isinstance(method, list) else [method]
        if not callbacks:
            raise UsageError(f"methods.{label} is an empty list. Give a compression callback.")
        return callbacks


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _check_several(name: str, values: Sequence[float], allowed: str) -> None:
    if not values or len(set(values)) < len(values):
        raise UsageError(f"{name} is {list(values)}; give one or more different {allowed}.")


def _check_trainer(name: str, trainer: Section) -> None:
    for option, instead in _OWN_SECTIONS.items():
        if option in trainer:
            raise UsageError(f"{name} has {option}, which the sweep sets for each cell. Leave it out; use {instead}.")
