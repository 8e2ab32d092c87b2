"""The cells of a sweep: for each the two configs that it takes, and what tells whether they are done."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slm_pl.compression.target import share_of_each
from slm_pl.errors import UsageError
from slm_pl.identity import Parts, digest, parts_of
from slm_pl.parts import Section, merge
from slm_pl.sweep.config import SweepConfig

_DATA = "slm_pl.data.AlpacaDataModule"
_OTHER_SIZES = ("layer_ratio", "layers", "plan_path", "remove_layers", "threshold")
_SEED = "{seed}"


@dataclass(frozen=True)
class Step:
    """One run of the command line.

    Args:
        name: ``compress`` or ``measure``.
        command: The subcommand.
        config: What it is run with.
        hash: Of the parts, and of the step before it.
        parts: What decides its figures, wherever the sweep's own files are.
    """

    name: Literal["compress", "measure"]
    command: Literal["fit", "prune", "test"]
    config: Section
    hash: str
    parts: Parts


@dataclass(frozen=True)
class Cell:
    """One model to make and measure.

    Args:
        directory: Where its files are.
        label: For people.
        method: Label of the method; None for the dense model.
        ratio: The size; None for the dense model.
        seed: The seed.
        recovered: Whether it is trained.
        steps: What to run, in order; the last one measures.
        keep_export: Whether the weights stay.
    """

    directory: Path
    label: str
    method: str | None
    ratio: float | None
    seed: int
    recovered: bool
    steps: tuple[Step, ...]
    keep_export: bool

    @property
    def name(self) -> str:
        """Name of its directory."""
        return self.directory.name

    @property
    def hash(self) -> str:
        """Tells one cell from another with the same name."""
        return self.steps[-1].hash


def plan_cells(config: SweepConfig) -> list[Cell]:
    """All cells: the dense model, then methods x ratios x seeds.

    Raises:
        UsageError: If a method cannot be given a ratio.
    """
    cells = [_dense_cell(config)] if config.dense else []
    for method in config.methods:
        for ratio in config.ratios:
            cells += [_cell(config, method, ratio, seed) for seed in config.seeds]
    return cells


def size_text(ratio: float) -> str:
    """Such as ``20 %``."""
    return f"{100 * ratio:.6g} %"


def _dense_cell(config: SweepConfig) -> Cell:
    seed = config.seeds[0]

    def steps(directory: Path, label: str | None) -> list[tuple[str, Section]]:
        return [("test", _run(config, seed, {**config.model, "label": label}, directory, config.measure))]

    directory = Path(config.output_dir) / "dense"
    ((command, anywhere),) = steps(_NOWHERE, None)
    # Its figures do not depend on either: with more seeds, it stays what it was.
    del anywhere["seed_everything"], anywhere["data"]["init_args"]["calibration"]
    made = _hashed(steps(directory, "dense"), [(command, anywhere)])
    return Cell(directory, "dense", None, None, seed, False, made, True)


def _cell(config: SweepConfig, method: str, ratio: float, seed: int) -> Cell:
    callbacks = _filled(_sized(config.sequence(method), method, ratio), seed)
    recovery = config.recovery

    def steps(directory: Path, label: str | None) -> list[tuple[str, Section]]:
        export = str(directory / "export")
        exporting = {"class_path": "callbacks.ExportCheckpoint", "init_args": {"output_dir": export}}
        compress = _run(config, seed, config.model, directory, [*callbacks, exporting])
        if recovery is not None:
            compress["model"] = merge(compress["model"], recovery.model)
            compress["data"] = _seeded(_with_recovery_data(config.data, recovery.data), seed)
            compress["trainer"] = merge(compress["trainer"], recovery.trainer)
            compress["trainer"]["callbacks"] = [*compress["trainer"]["callbacks"], *recovery.callbacks]
        model = {**config.model, "pretrained": export, "label": label}
        model.pop("revision", None)  # the dense model's
        measure = _run(config, seed, model, directory, config.measure)
        return [("prune" if recovery is None else "fit", compress), ("test", measure)]

    label = f"{method} {size_text(ratio)}"
    if len(config.seeds) > 1:
        label += f", seed {seed}"
    name = f"{method}_{ratio:.6g}_s{seed}"
    if recovery is not None:
        label += ", recovered"
        name += "_recovered"
    directory = Path(config.output_dir) / name
    made = _hashed(steps(directory, label), steps(_NOWHERE, None))
    return Cell(directory, label, method, ratio, seed, recovery is not None, made, config.keep_exports)


_NOWHERE = Path(os.devnull) / "cell"  # there can be no file of this name


def _run(config: SweepConfig, seed: int, model: Section, directory: Path, callbacks: list[Section]) -> Section:
    return {
        "config_version": config.config_version,
        "seed_everything": seed,
        "model": model,
        "data": _seeded(_as_class(config.data), seed),
        "trainer": {
            "enable_progress_bar": False,  # it goes to a file
            **config.trainer,
            "default_root_dir": str(directory),
            "callbacks": callbacks,
        },
    }


def _hashed(runs: Iterable[tuple[str, Section]], anywhere: Iterable[tuple[str, Section]]) -> tuple[Step, ...]:
    """Steps of these runs, with the hashes of the same runs as they would be in another place with another label."""
    steps: list[Step] = []
    before = ""
    for (command, config), (_, hashed) in zip(runs, anywhere, strict=True):
        parts = parts_of(command, hashed)
        before = digest([before, parts])
        name: Literal["compress", "measure"] = "measure" if command == "test" else "compress"
        steps.append(Step(name, command, config, before, parts))  # type: ignore[arg-type]
    return tuple(steps)


def _sized(callbacks: list[Section], method: str, ratio: float) -> list[Section]:
    """The callbacks with their share of the size; see :class:`~slm_pl.sweep.config.SweepConfig`."""
    arguments = [
        {
            name: value
            for name, value in _section("init_args of a method", callback.get("init_args")).items()
            if value is not None
        }
        for callback in callbacks
    ]
    left = 1 - ratio
    for own in arguments:
        other = [name for name in _OTHER_SIZES if name in own]
        if other:
            raise UsageError(
                f"methods.{method} has {other[0]}, and a sweep gives the size as `ratio`. Leave {other[0]} out, or, in "
                "a sequence, give that callback a ratio of its own."
            )
        share = own.get("ratio", 0.0)
        if not isinstance(share, int | float) or not 0 <= share < 1:
            raise UsageError(f"methods.{method} has the ratio {share!r}; give a number in (0, 1), or leave it out.")
        left /= 1 - share
    free = sum("ratio" not in own for own in arguments)
    if not free:
        raise UsageError(
            f"Every callback of methods.{method} has a ratio of its own, so that the sweep's ratios change nothing. "
            "Leave it out of one of them."
        )
    if left >= 1:
        raise UsageError(
            f"methods.{method} is to remove {size_text(ratio)}, and what its callbacks have as a ratio of their own is "
            "no less. Give them less, or leave this ratio out."
        )
    equal = ratio if len(callbacks) == 1 else round(share_of_each(1 - left, free), 6)
    return [
        {**callback, "init_args": {"ratio": equal, **own}} for callback, own in zip(callbacks, arguments, strict=True)
    ]


def _filled(callbacks: list[Section], seed: int) -> list[Section]:
    return [
        {**one, "init_args": {name: seed if value == _SEED else value for name, value in one["init_args"].items()}}
        for one in callbacks
    ]


def _as_class(data: Section) -> Section:
    """The data with its class named, which a config may leave out."""
    if "class_path" in data:
        return {"class_path": data["class_path"], "init_args": dict(_section("data.init_args", data.get("init_args")))}
    return {"class_path": _DATA, "init_args": dict(data)}


def _with_recovery_data(data: Section, over: Section) -> Section:
    base = _as_class(data)
    if "class_path" not in over:
        return merge(base, {"init_args": over})
    if over["class_path"] == base["class_path"]:
        return merge(base, over)
    # Another class has other arguments, but what the methods look at is the sweep's.
    calibration = {name: value for name, value in base["init_args"].items() if name == "calibration"}
    return merge({"class_path": over["class_path"], "init_args": calibration}, over)


def _section(name: str, value: object) -> Section:
    """Options by name; none where there is null."""
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"{name} is {str(value)[:100]!r}; it holds options by name, such as {{seed: 1}}.")
    return value or {}


def _seeded(data: Section, seed: int) -> Section:
    calibration = {**_section("data.calibration", data["init_args"].get("calibration")), "seed": seed}
    return {**data, "init_args": {**data["init_args"], "calibration": calibration}}
