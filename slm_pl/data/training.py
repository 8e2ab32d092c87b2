"""What all data modules share: calibration text, and the batches of training and validation."""

import contextlib
import random
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from lightning import LightningDataModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from slm_pl.data.batching import Batching, Example, MicroBatches, ResumableLoader, Schedule, StepSampler, only
from slm_pl.data.corpora import CalibrationSet, CalibrationText, joined, load_calibration
from slm_pl.data.prompts import Prompt
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROW = 2
"""Packed examples are dealt out to as few rows as this many times the greatest length would take: fewer rows leave less
padding, longer ones cost more attention."""


@dataclass(frozen=True)
class Examples:
    """The tokenised examples of a run.

    Attributes:
        train: Columns ``input_ids``, ``labels``, ``length`` (tokens) and ``counted`` (labels that count).
        val: The same.
        prompts: Of the validation examples; empty where these are no instructions.
        key: Fingerprint of all examples.
        longest: Most tokens that an example may have.
    """

    train: "Dataset"
    val: "Dataset"
    prompts: list[Prompt]
    key: str
    longest: int


class TrainingData(LightningDataModule):
    """Base of the data modules.

    Args:
        calibration: What the compression callbacks look at.
        fitting: What layers are refitted on by least squares, one text or several; null for the calibration text.
        batch_size: Training examples in a micro-batch of one process, what fits into memory; where they are packed, on
            average, since all micro-batches of a step then have nearly equally many tokens.
        eval_batch_size: Validation examples in a batch of one process.
        global_batch_size: Examples of an optimizer step over all processes and micro-batches; how many micro-batches
            are accumulated follows from it. Null: ``batch_size`` x devices x ``trainer.accumulate_grad_batches``.
        batching: ``packed``: several examples in a row, each attending to itself only; ``grouped``: examples of like
            length together; ``padded``: as drawn.
        val_size: Number of validation examples.
        seed: Seed of the split and of the training order.
        num_workers: Worker processes per loader.
    """

    def __init__(
        self,
        calibration: CalibrationText = CalibrationText(),  # noqa: B008  frozen
        fitting: list[CalibrationText] | None = None,
        batch_size: int = 4,
        eval_batch_size: int = 8,
        global_batch_size: int | None = None,
        batching: Batching = "packed",
        val_size: int = 2000,
        seed: int = 1234,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_ranges(
            batch_size=(batch_size, 1),
            eval_batch_size=(eval_batch_size, 1),
            global_batch_size=(global_batch_size, 1),
            val_size=(val_size, 0),
            num_workers=(num_workers, 0),
        )
        self.calibration = calibration
        self.fitting = fitting
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.global_batch_size = global_batch_size
        self.batching = batching
        self.val_size = val_size
        self.seed = seed
        self.num_workers = num_workers
        self.calibration_set: CalibrationSet | None = None
        self.fitting_set: CalibrationSet | None = None
        self.examples: Examples | None = None
        self.predict_prompts: list[Prompt] | None = None

    @abstractmethod
    def load_examples(self) -> Examples:
        """Reads and tokenises, or finds in the cache what was tokenised before.

        Raises:
            UsageError: The source cannot be used, or has too few examples for ``val_size``.
        """

    def load_prompts(self) -> list[Prompt]:
        """What ``predict`` continues."""
        raise UsageError(f"{type(self).__name__} has no prompts to continue. Use data: AlpacaDataModule for predict.")

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Tokenizer of the module that the trainer runs."""
        assert self.trainer is not None
        return cast("PreTrainedTokenizerBase", self.trainer.lightning_module.tokenizer)

    @property
    def train_examples(self) -> "Dataset":
        """Of the training part."""
        assert self.examples is not None
        return self.examples.train

    @property
    def val_examples(self) -> "Dataset":
        """Of the validation part."""
        assert self.examples is not None
        return self.examples.val

    def calibration_batches(self) -> CalibrationSet:
        """Calibration samples, tokenised on first use: only a callback that searches asks for them."""
        if self.calibration_set is None:
            self.calibration_set = load_calibration(self.calibration, self.tokenizer)
        return self.calibration_set

    def fitting_batches(self) -> CalibrationSet:
        """Samples for least squares, tokenised on first use."""
        if self.fitting_set is None:
            self.fitting_set = (
                self.calibration_batches()
                if self.fitting is None
                else joined([load_calibration(text, self.tokenizer) for text in self.fitting])
            )
        return self.fitting_set

    def prepare_data(self) -> None:
        """Tokenises into the cache, on one process of each node."""
        assert self.trainer is not None
        if self.trainer.state.fn == TrainerFn.FITTING:
            # One process that fails alone would leave the others waiting. They all will, in `setup`.
            with contextlib.suppress(UsageError):
                self.examples = self.examples or self.load_examples()

    def setup(self, stage: str) -> None:
        """Reads what the stage needs, once, and says how many micro-batches make an optimizer step.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            UsageError: Examples or prompts cannot be read, or the batch sizes do not fit together.
        """
        trainer = self.trainer
        assert trainer is not None
        if isinstance(trainer.strategy, DeepSpeedStrategy) and isinstance(trainer.strategy.config, dict):
            # For its logs only. Lightning would look for it in a batch sampler.
            trainer.strategy.config.setdefault("train_micro_batch_size_per_gpu", self.batch_size)
        if getattr(trainer, "overfit_batches", 0):
            raise UsageError(
                "trainer.overfit_batches puts another sampler in place of the one that makes the micro-batches. Use "
                "data.max_rows and data.val_size: 0."
            )
        if getattr(trainer, "pruning", False):
            return  # `prune` runs the set-up of predict, and reads calibration text only
        if stage in ("fit", "validate") and self.examples is None:
            self.examples = self.load_examples()
        if stage == "fit":
            if self.batching == "packed" and not getattr(self.trainer.lightning_module, "packable", True):  # type: ignore[union-attr]
                raise UsageError(
                    "data.batching is 'packed', and this model does not keep the examples of a row apart. Use "
                    "data.batching: grouped."
                )
            self._accumulate()
        if stage == "predict" and self.predict_prompts is None:
            self.predict_prompts = self.load_prompts()

    def _accumulate(self) -> None:
        """Tells the trainer how many micro-batches an optimizer step has."""
        trainer = self.trainer
        assert trainer is not None
        together = self.batch_size * trainer.world_size
        if self.global_batch_size is None:
            self._global_batch = together * trainer.accumulate_grad_batches
        else:
            self._global_batch = self.global_batch_size
            needed = -(-self.global_batch_size // together)
            if trainer.accumulate_grad_batches not in (1, needed):
                raise UsageError(
                    f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but data.global_batch_size "
                    f"= {self.global_batch_size} with data.batch_size = {self.batch_size} on {trainer.world_size} "
                    f"device(s) takes {needed}. Leave one of the two away."
                )
            trainer.accumulate_grad_batches = needed
        rank_zero_info(
            f"{self._global_batch} examples an optimizer step: {trainer.world_size} device(s) x "
            f"{trainer.accumulate_grad_batches} micro-batch(es) of about "
            f"{self._global_batch / trainer.world_size / trainer.accumulate_grad_batches:g}, {self.batching}"
        )

    def train_dataloader(self) -> ResumableLoader:
        """This process's micro-batches; see :class:`slm_pl.data.batching.Batch`."""
        trainer, examples = self.trainer, self.examples
        assert trainer is not None
        assert examples is not None
        schedule = Schedule(
            examples.train["length"][:],
            examples.train["counted"][:],
            self._global_batch,
            trainer.accumulate_grad_batches,
            trainer.world_size,
            self.batching,
            self.seed,
        )
        sampler = StepSampler(schedule, trainer.global_rank, lambda: trainer.global_step)
        return self._loader(examples.train, self.batching == "packed", sampler)

    @property
    def identity(self) -> dict[str, str | int]:
        """What decides the batches of a step, by name."""
        assert self.trainer is not None
        assert self.examples is not None
        return {
            "data.seed": self.seed,
            "data.batching": self.batching,
            "data.global_batch_size": self._global_batch,
            "the number of devices": self.trainer.world_size,
            "the number of micro-batches of a step": self.trainer.accumulate_grad_batches,
            "the number of training examples": len(self.examples.train),
            "the fingerprint of its tokens": self.examples.key[:16],
        }

    def state_dict(self) -> dict[str, str | int]:
        """What a checkpoint says of its data."""
        return self.identity if self.examples is not None and self.trainer.state.fn == TrainerFn.FITTING else {}  # type: ignore[union-attr]

    def load_state_dict(self, state: dict[str, str | int]) -> None:
        """Compares it with this run.

        Raises:
            UsageError: If training would not go on with the same batches.
        """
        assert self.trainer is not None
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        for name, value in self.identity.items():
            if state.get(name) != value:
                raise UsageError(
                    f"The checkpoint was trained with {name} = {state.get(name)!r}, this run has {value!r}, so it "
                    "would not go on with the same batches. Resume with the data options and the number of devices of "
                    "the run that wrote it, or start anew without --ckpt_path."
                )

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """The validation examples, sorted by length unless as drawn; no loader where ``val_size`` is 0."""
        trainer, examples = self.trainer, self.examples
        assert trainer is not None
        assert examples is not None
        if not len(examples.val):
            return []
        lengths, counted = examples.val["length"][:], examples.val["counted"][:]
        order = list(range(len(lengths)))
        if self.batching != "padded":
            order.sort(key=lambda index: -lengths[index])
            # Not the longest first: a part of the validation set would be another kind of text.
            size = self.eval_batch_size * trainer.world_size
            groups = [order[start : start + size] for start in range(0, len(order), size)]
            whole, rest = groups[: len(order) // size], groups[len(order) // size :]
            random.Random(0).shuffle(whole)
            order = [index for group in (*whole, *rest) for index in group]
        val = examples.val.select(order)
        schedule = Schedule(
            [lengths[i] for i in order],
            [counted[i] for i in order],
            self.eval_batch_size * trainer.world_size,
            1,
            trainer.world_size,
            "padded",
            None,
        )
        return self._loader(val, False, StepSampler(schedule, trainer.global_rank, lambda: 0))

    def _loader(self, examples: "Dataset", packed: bool, sampler: StepSampler) -> ResumableLoader:
        assert self.examples is not None
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        columns = examples.select_columns(list(Example.__annotations__))
        return ResumableLoader(
            MicroBatches(columns, eos if pad is None else pad, self.row_length if packed else None),
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    @property
    def row_length(self) -> int:
        """Most tokens of a packed row: all of a micro-batch where attention is told where examples end."""
        assert self.trainer is not None
        assert self.examples is not None
        if getattr(self.trainer.lightning_module, "variable_length_attention", False):
            return 1 << 62
        return ROW * self.examples.longest

    def test_dataloader(self) -> DataLoader[torch.Tensor]:
        """One element of no meaning: the test hooks measure on text of their own."""
        return DataLoader([torch.zeros(1)])  # type: ignore[arg-type]

    def predict_dataloader(self) -> DataLoader[Prompt]:
        """One :class:`Prompt` dictionary at a time, without a batch dimension."""
        assert self.predict_prompts is not None
        return DataLoader(self.predict_prompts, batch_size=1, collate_fn=only)  # type: ignore[arg-type]


def check_ranges(**minima: tuple[int | None, int]) -> None:
    """Refuses numbers below what is allowed; None is none given.

    Args:
        minima: For each option its value and the least one.
    """
    for option, (value, minimum) in minima.items():
        if value is not None and value < minimum:
            raise UsageError(f"data.{option} is {value}; allowed are whole numbers from {minimum}.")


def split(examples: "Dataset", val_size: int, source: str, what: str, hint: str = "") -> "tuple[Dataset, Dataset]":
    """The training and the validation part; validation comes first.

    Raises:
        UsageError: If nothing would be left to train on.
    """
    if val_size >= len(examples):
        raise UsageError(
            f"data.val_size is {val_size}, but {source} gives {len(examples)} usable {what} and at least one must be "
            f"left for training. Lower data.val_size{hint} or give more."
        )
    return examples.select(range(val_size, len(examples))), examples.select(range(val_size))
