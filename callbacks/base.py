"""The lifecycle that all compression methods share."""

import contextlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from slm_pl import files
from slm_pl.compression import surgery
from slm_pl.compression.architecture import num_layers
from slm_pl.compression.feasibility import check
from slm_pl.compression.least_squares import LeastSquares, count_fits, fit_outputs
from slm_pl.compression.plan import (
    Base,
    Calibration,
    JSONValue,
    Method,
    Plan,
    Step,
    count_parameters,
    plan_name,
)
from slm_pl.compression.streaming import Spill, streaming
from slm_pl.console import progress
from slm_pl.data import CalibrationSet, CalibrationText, TrainingData
from slm_pl.errors import UsageError
from slm_pl.layer_map import layer_parameters
from slm_pl.module import CausalLM
from slm_pl.pictures import matrix_names, trace_names, trace_pictures

if TYPE_CHECKING:
    from transformers import PreTrainedModel


T = TypeVar("T")


def on_first_rank(trainer: pl.Trainer, work: Callable[[], T]) -> T:
    """Does something with files on the first rank; its result, or its failure, is that of every rank.

    A rank that fails alone would leave the others waiting for it in the next collective.

    Raises:
        UsageError: On all ranks, if ``work`` raised it on the first.
        RuntimeError: On the other ranks, if ``work`` raised anything else.
    """
    result, usage, failure = None, None, None
    if trainer.is_global_zero:
        try:
            result = work()
        except UsageError as error:
            usage = str(error)
        except Exception as error:
            trainer.strategy.broadcast((None, None, f"{type(error).__name__}: {error}"))
            raise
    result, usage, failure = trainer.strategy.broadcast((result, usage, failure))
    if failure is not None:
        raise RuntimeError(f"The first rank failed with {failure}")
    if usage is not None:
        raise UsageError(usage)
    return cast(T, result)


class EarlyCheck(pl.Callback, ABC):
    """A callback that can tell at the start what would fail at the end.

    Lightning sets callbacks up in order, so one below a compression callback gets its turn only after the search.
    """

    @abstractmethod
    def check(self, trainer: pl.Trainer) -> None:
        """Raises a :class:`~slm_pl.errors.UsageError` if this callback's work cannot be done."""


class PlanObserver(pl.Callback, ABC):
    """A callback that looks at the model between the plan and the surgery, wherever it stands in the list."""

    @abstractmethod
    def on_plan(self, trainer: pl.Trainer, pl_module: CausalLM, plan: Plan) -> None:
        """Called on every rank with the weights still those that the plan was computed on.

        The model is on the device that the run computes on, in eval mode, without gradients.
        """


@contextlib.contextmanager
def on_its_device(trainer: pl.Trainer, pl_module: CausalLM) -> "Iterator[PreTrainedModel]":
    """Lends the model to the device that the run computes on, in eval mode, without gradients.

    While callbacks are set up, Lightning has not moved it there yet.
    """
    model = pl_module.load_model()
    device, training = pl_module.device, model.training
    if pl_module.streaming:
        try:
            with torch.no_grad(), streaming(model.eval(), trainer.strategy.root_device):
                yield model
        finally:
            model.train(training)
        return
    nn.Module.to(model, trainer.strategy.root_device).eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        nn.Module.to(model, device).train(training)


class CompressionCallback(pl.Callback, ABC):
    """Compresses the model before Lightning wraps, optimises and shards it.

    A method derives from this class, keeps each argument of its ``__init__`` in an attribute of the same name, and
    implements :meth:`plan`. It acts in every stage (fit, validate, test, predict and prune), unless the model directory
    already carries a plan of the same method. With ``plan_path`` the search is skipped and that plan is applied; a run
    that resumes from a checkpoint takes the plan of its run directory.

    Args:
        plan_path: A ``plan.json`` to apply instead of searching.
    """

    computes_with_weights = False
    """Whether :meth:`plan` computes with weights outside of a forward pass; then layers cannot stream to a GPU."""
    consolidation: str = "drop"
    least_squares = LeastSquares()
    """Methods that remove layers take both as arguments."""
    citation: ClassVar[str] = ""
    """BibTeX of the method's paper, for the cards of models that are made with it."""

    def __init__(self, plan_path: str | None = None) -> None:
        self.plan_path = plan_path
        self._applied: Plan | None = None

    @classmethod
    def cite(cls, arguments: Mapping[str, JSONValue]) -> str:
        """BibTeX of what a plan with these arguments comes from; empty if from no paper."""
        return cls.citation

    @property
    def uses_calibration(self) -> bool:
        """Whether :meth:`plan` looks at calibration text; if not, none is read."""
        return True

    @abstractmethod
    def plan(self, model: "PreTrainedModel", calibration: CalibrationSet) -> Plan:
        """Decides what to do; never changes the model.

        Args:
            model: A Hugging Face causal language model on the device to compute on, in eval mode.
            calibration: Token ids; under several processes, this rank's share of them. Empty for a method that does
                not use them.

        Returns:
            The plan, equal on all ranks.
        """

    @property
    def refit(self) -> LeastSquares | None:
        """How the layers that stay are refitted; None where they keep their weights."""
        return self.least_squares if self.consolidation == "least_squares" else None

    def decide(self, model: "PreTrainedModel", calibration: CalibrationSet, fitting: CalibrationSet) -> Plan:
        """The plan, and in it what refits the layers that stay, if that is wanted; never changes the model.

        Args:
            model: As for :meth:`plan`.
            calibration: As for :meth:`plan`.
            fitting: What the layers are refitted on; under several processes, this rank's share.
        """
        plan = self.plan(model, calibration)
        if self.refit is None or not plan.steps:
            return plan
        with progress("Refitting by least squares", count_fits(plan, self.refit)) as advance:
            fitted = fit_outputs(model, plan, fitting, self.refit, advance)
        told = cast(dict[str, JSONValue], fitted.outcome["least_squares"])
        text: dict[str, JSONValue] = {"source": fitting.text.source, "sha256": fitting.sha256}
        return replace(fitted, outcome={**fitted.outcome, "least_squares": {**text, **told}})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Plans on every rank, writes ``plan.json`` on the first, applies the plan on every rank."""
        assert isinstance(pl_module, CausalLM)
        if self._applied is not None and self._applied in pl_module.plans:
            return  # the same objects run a second stage
        others = [c._applied for c in trainer.callbacks if isinstance(c, CompressionCallback)]  # type: ignore[attr-defined]
        carried = [p for p in pl_module.plans if p.method.class_path == self.class_path and p not in others]
        if carried and (self.plan_path is None or self._load(trainer, Path(self.plan_path)) in carried):
            wanted = self.arguments()
            # A plan that was made before an argument was there has its default.
            defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
            known = [{name: plan.method.init_args.get(name, defaults[name]) for name in wanted} for plan in carried]
            if self.plan_path is None and wanted not in known:
                rank_zero_warn(
                    f"{pl_module.pretrained} was compressed by {self.class_path} with {carried[-1].method.init_args} "
                    f"and is not compressed again with {wanted}. Start from the dense model to change them."
                )
            return
        pl_module.check_run(stage)
        pl_module.check_unquantised("cut or merged")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyCheck):
                callback.check(trainer)
        model = pl_module.load_model()
        plan = self._find_plan(trainer, pl_module)
        # Refuse a plan that does not fit before it is written as this run's.
        check(model, plan)
        run_plan = self._run_plan(trainer, pl_module)
        number = len(pl_module.plans) + 1
        on_first_rank(trainer, lambda: _save(plan, run_plan.parent, number))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PlanObserver):
                with on_its_device(trainer, pl_module):
                    callback.on_plan(trainer, pl_module, plan)
        before = plan.base
        if not pl_module.plans:
            pl_module.dense_layers = layer_parameters(model)
        surgery.apply(model, plan, Spill(trainer.default_root_dir) if pl_module.streaming else lambda new: None)
        pl_module.plans.append(plan)
        self._applied = plan
        parameters = count_parameters(model)
        asked = "" if plan.requested_ratio is None else f", {plan.requested_ratio:.1%} asked for"
        rank_zero_info(
            f"{type(self).__name__}: {before.num_layers} -> {num_layers(model)} layers, "
            f"{before.num_parameters / 1e6:,.1f} M -> {parameters / 1e6:,.1f} M parameters "
            f"({1 - parameters / before.num_parameters:.2%} removed{asked}). Plan: {run_plan}"
        )

    @property
    def class_path(self) -> str:
        """The import path users write, ``callbacks.Name``."""
        return _class_path(type(self))

    def arguments(self) -> dict[str, JSONValue]:
        """The arguments of ``__init__`` that decide the result; where a plan is and how much memory to use do not."""
        names = (
            name for name in inspect.signature(type(self)).parameters if name not in ("plan_path", "memory_budget")
        )
        values = {name: getattr(self, name) for name in names}
        if self.refit is None:
            values.pop("least_squares", None)
        return {name: v.to_json() if isinstance(v, LeastSquares) else v for name, v in values.items()}

    def make_plan(
        self,
        model: "PreTrainedModel",
        calibration: CalibrationSet,
        steps: list[Step],
        trace: list[dict[str, JSONValue]],
        outcome: dict[str, JSONValue],
    ) -> Plan:
        """Puts a decision together with everything it rests on."""
        text = calibration.text
        seen = Calibration(text.source, text.samples, text.sequence_length, text.seed, calibration.sha256)
        return Plan(
            base=Base.of(model),
            method=Method(self.class_path, self.arguments()),
            calibration=seen if self.uses_calibration else None,
            steps=tuple(steps),
            trace=tuple(trace),
            outcome=outcome,
        )

    def _run_plan(self, trainer: pl.Trainer, pl_module: CausalLM) -> Path:
        return Path(trainer.default_root_dir) / plan_name(len(pl_module.plans) + 1)

    def _load(self, trainer: pl.Trainer, path: Path) -> Plan:
        return on_first_rank(trainer, lambda: Plan.load(path))

    def _find_plan(self, trainer: pl.Trainer, pl_module: CausalLM) -> Plan:
        if self.plan_path is not None:
            return self._load(trainer, Path(self.plan_path))
        run_plan = self._run_plan(trainer, pl_module)
        if trainer.ckpt_path is not None and on_first_rank(trainer, run_plan.is_file):
            rank_zero_info(f"{type(self).__name__}: resuming with the plan in {run_plan}")
            return self._load(trainer, run_plan)
        device = trainer.strategy.root_device
        if pl_module.streaming and device.type != "cpu" and (self.computes_with_weights or self.refit is not None):
            raise UsageError(
                f"model.streaming is on and the device is {device}, but {type(self).__name__} computes with weights "
                "that are not there, as it is asked. Give --trainer.accelerator cpu."
            )
        with on_its_device(trainer, pl_module) as model:
            calibration = self._text(trainer, self.uses_calibration, lambda data: data.calibration_batches())
            fitting = self._text(trainer, self.refit is not None, lambda data: data.fitting_batches())
            return self.decide(model, calibration, fitting)

    def _text(
        self, trainer: pl.Trainer, wanted: bool, read: Callable[[TrainingData], CalibrationSet]
    ) -> CalibrationSet:
        """This rank's share of a text; an empty set if it is not wanted."""
        datamodule = getattr(trainer, "datamodule", None)
        if not wanted:
            text = datamodule.calibration if isinstance(datamodule, TrainingData) else CalibrationText()
            return CalibrationSet.from_ids([], text)
        if not isinstance(datamodule, TrainingData):
            raise UsageError(
                f"{type(self).__name__} needs calibration text from a data module of slm_pl.data, such as "
                f"AlpacaDataModule; got {type(datamodule).__name__}. Pass one as datamodule, or give plan_path."
            )
        samples = read(datamodule)
        return samples.shard(trainer.global_rank, trainer.world_size) if trainer.world_size > 1 else samples


def _class_path(method: type[CompressionCallback]) -> str:
    module = method.__module__
    return f"{module.partition('.')[0] if module.startswith('callbacks.') else module}.{method.__qualname__}"


def citations(plans: Sequence[Plan]) -> list[str]:
    """BibTeX entries of the methods that made these plans, each key once: two methods may share a paper.

    A plan may come from a stranger, so the class it names is looked for among those that are there and never imported.
    """
    there: dict[str, type[CompressionCallback]] = {}
    classes = CompressionCallback.__subclasses__()
    while classes:
        method = classes.pop()
        there[_class_path(method)] = method
        classes += method.__subclasses__()
    used = [(there.get(plan.method.class_path), plan.method.init_args) for plan in plans]
    found = [method.cite(arguments) for method, arguments in used if method is not None]
    entries = [entry for text in found if text for entry in re.split(r"\n\n(?=@)", text)]
    return list({entry.partition("{")[2].partition(",")[0]: entry for entry in entries}.values())


def _save(plan: Plan, directory: Path, number: int) -> None:
    """Writes a plan and its picture; what an earlier run drew of another plan goes."""
    plan.save(directory / plan_name(number))
    for name in (*trace_names(number), *matrix_names(number)):
        (directory / name).unlink(missing_ok=True)
    for name, picture in trace_pictures(plan, number).items():
        files.write_bytes(directory / name, picture)
