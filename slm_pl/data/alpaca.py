"""Alpaca instructions for recovery training, and the calibration text of the compression methods."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from slm_pl.data.corpora import CalibrationSet, CalibrationText, load_calibration
from slm_pl.data.embedded import docstring_rows
from slm_pl.data.readers import file_suffix, load_hub, read_json, read_jsonl, read_parquet
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100

_SUFFIXES = (".json", ".jsonl", ".parquet")
# The published prompts of Stanford Alpaca; the line end behind "Response:" is that of the recovery recipes
# (alpaca-lora, LLM-Pruner), and keeps the first word of the response apart from the prompt.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class Row(TypedDict):
    """One row of Alpaca."""

    instruction: str
    input: str
    output: str


class Prompt(TypedDict):
    """What the module continues in ``predict``: ``prompt``; the other two are "" for a prompt that was given whole."""

    prompt: str
    instruction: str
    input: str


class Example(TypedDict):
    """One tokenised row; both lists are equally long."""

    input_ids: list[int]
    labels: list[int]


def alpaca_prompt(instruction: str, input_text: str = "") -> str:
    """Stanford Alpaca's prompt, up to where the response begins.

    Args:
        instruction: What to do.
        input_text: What to do it with; "" selects the template without input.
    """
    # not chained replacements: an instruction may itself contain "{input}"
    if input_text:
        return _WITH_INPUT.format(instruction=instruction, input=input_text)
    return _WITHOUT_INPUT.format(instruction=instruction)


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right to the longest of the batch.

    Attributes:
        pad_id: Token id that fills ``input_ids``; the attention mask is 0 and the label -100 there.
    """

    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each int64 ``[batch, longest]``."""
        lengths = [len(example["input_ids"]) for example in examples]
        shape = (len(examples), max(lengths))
        batch = {
            "input_ids": torch.full(shape, self.pad_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED_LABEL),
        }
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            batch["input_ids"][row, :length] = torch.tensor(example["input_ids"])
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = torch.tensor(example["labels"])
        return batch


class AlpacaDataModule(LightningDataModule):
    """Instruction rows for recovery, calibration text for compression.

    Rows become the prompt of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca) and its response, followed
    by EOS; the loss counts the response and the EOS only. The tokenizer is that of the module (``module.tokenizer``).

    * fit, validate: the rows of ``path``, shuffled with ``seed``; the first ``val_size`` are for validation.
    * test: one element of no meaning, so that Lightning runs the stage: the test hooks bring their own text, and no
      instruction row is read.
    * predict: prompts, one dictionary with the key ``prompt`` at a time.

    Sample::

        data:
          path: yahma/alpaca-cleaned
          batch_size: 4
          cutoff: 256
          calibration:
            source: embedded
            samples: 10
            sequence_length: 128

    Args:
        path: Hub id, a ``.json`` (list of objects), ``.jsonl`` or ``.parquet`` file, or ``embedded`` (docstrings of the
            Python standard library). Columns: ``instruction``, ``output``, and optionally ``input``.
        calibration: What the compression callbacks look at.
        batch_size: Training rows per step and process.
        eval_batch_size: Validation rows per step and process.
        cutoff: Prompt and response are truncated to this many tokens. A row whose prompt alone fills it is left out.
        val_size: Number of validation rows.
        seed: Seed of the split and of the training order.
        max_rows: Number of rows to use, validation included, ``None`` for all.
        num_workers: Worker processes per loader.
        prompts: For predict: a ``.jsonl`` file with ``instruction`` and optionally ``input``, or a text file with one
            whole prompt a line. ``None``: the instructions of the validation rows.

    Raises:
        UsageError: A number is out of range; later, when rows are needed, the source cannot be used.
    """

    # a frozen dataclass: one default instance for all is safe
    def __init__(
        self,
        path: str = "yahma/alpaca-cleaned",
        calibration: CalibrationText = CalibrationText(),  # noqa: B008
        batch_size: int = 4,
        eval_batch_size: int = 8,
        cutoff: int = 256,
        val_size: int = 2000,
        seed: int = 1234,
        max_rows: int | None = None,
        num_workers: int = 0,
        prompts: str | None = None,
    ) -> None:
        super().__init__()
        minima = {
            "batch_size": (batch_size, 1),
            "eval_batch_size": (eval_batch_size, 1),
            "cutoff": (cutoff, 2),
            "val_size": (val_size, 0),
            "max_rows": (1 if max_rows is None else max_rows, 1),
            "num_workers": (num_workers, 0),
        }
        for option, (value, minimum) in minima.items():
            if value < minimum:
                raise UsageError(f"data.{option} is {value}; allowed are whole numbers from {minimum}.")
        self.path = path
        self.calibration = calibration
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.cutoff = cutoff
        self.val_size = val_size
        self.seed = seed
        self.max_rows = max_rows
        self.num_workers = num_workers
        self.prompts = prompts
        self.calibration_set: CalibrationSet | None = None
        self.train_examples: list[Example] | None = None
        self.val_examples: list[Example] | None = None
        self.predict_prompts: list[Prompt] | None = None
        self._val_prompts: list[Prompt] = []

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Tokenizer of the module that the trainer runs."""
        assert self.trainer is not None
        return cast("PreTrainedTokenizerBase", self.trainer.lightning_module.tokenizer)

    def calibration_batches(self) -> CalibrationSet:
        """Calibration samples, tokenised on first use: only a callback that searches asks for them."""
        if self.calibration_set is None:
            self.calibration_set = load_calibration(self.calibration, self.tokenizer)
        return self.calibration_set

    def setup(self, stage: str) -> None:
        """Tokenise what the stage needs, once.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            UsageError: Rows or prompts cannot be read, or too few rows are left for ``val_size``.
        """
        if getattr(self.trainer, "pruning", False):
            return  # `prune` runs the set-up of predict, and reads calibration text only
        needs_rows = stage in ("fit", "validate") or (stage == "predict" and self.prompts is None)
        if needs_rows and self.train_examples is None:
            self._setup_rows()
        if stage == "predict" and self.predict_prompts is None:
            self.predict_prompts = self._val_prompts if self.prompts is None else _read_prompts(Path(self.prompts))
            if not self.predict_prompts:
                raise UsageError(
                    f"No prompts to continue in {self.prompts}. Write one prompt a line."
                    if self.prompts
                    else "No prompts to continue: data.prompts is null and data.val_size is 0. Set one of them."
                )

    def _setup_rows(self) -> None:
        rows = _read_rows(self.path)
        found = len(rows)
        random.Random(self.seed).shuffle(rows)
        rows = rows[: self.max_rows]
        filled = [row for row in rows if row["output"].strip()]
        prompts = [_as_prompt(row["instruction"], row["input"]) for row in filled]
        tokenised = self._tokenise([prompt["prompt"] for prompt in prompts], [row["output"] for row in filled])
        kept = [(example, prompt) for example, prompt in zip(tokenised, prompts, strict=True) if example is not None]
        if self.val_size >= len(kept):
            raise UsageError(
                f"data.val_size is {self.val_size}, but {self.path} gives {len(kept)} usable rows ({found} read, "
                f"max_rows is {self.max_rows}) and at least one must be left for training. Lower data.val_size"
                f"{', raise data.max_rows' if self.max_rows else ''} or give more rows."
            )
        self.val_examples = [example for example, _ in kept[: self.val_size]]
        self._val_prompts = [prompt for _, prompt in kept[: self.val_size]]
        self.train_examples = [example for example, _ in kept[self.val_size :]]
        rank_zero_info(
            f"{self.path}: {len(self.train_examples)} rows for training, {len(self.val_examples)} for validation; "
            f"left out: {len(rows) - len(filled)} with an empty output, {len(filled) - len(kept)} whose prompt alone "
            f"fills the cutoff of {self.cutoff} tokens"
        )

    def _tokenise(self, prompts: list[str], outputs: list[str]) -> list[Example | None]:
        """Examples with response-only labels; ``None`` where the prompt alone fills the cutoff."""
        if not prompts:
            return []
        tokenizer = self.tokenizer
        eos = tokenizer.eos_token_id
        if eos is None:
            raise UsageError(
                "This model's tokenizer has no EOS token, which ends every response. Choose another model."
            )
        # verbose=False: what is longer than the model's context is truncated below, there is nothing to warn of
        prompt_ids = tokenizer(prompts, verbose=False)["input_ids"]
        # Prompt and response are tokenised together, as text that the model meets elsewhere; a token that spans the
        # boundary counts as response.
        whole = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
        whole_ids = tokenizer(whole, verbose=False)["input_ids"]
        examples: list[Example | None] = []
        for head, ids in zip(prompt_ids, whole_ids, strict=True):
            start = _common_prefix(head, ids)
            if start >= self.cutoff:
                examples.append(None)
                continue
            if ids[-1] != eos:
                ids = [*ids, eos]
            ids = ids[: self.cutoff]
            examples.append({"input_ids": ids, "labels": [IGNORED_LABEL] * start + ids[start:]})
        return examples

    def train_dataloader(self) -> DataLoader[Example]:
        """Shuffled batches of ``input_ids``, ``attention_mask``, ``labels``: int64 ``[batch_size, longest]``."""
        assert self.train_examples is not None
        return DataLoader(
            self.train_examples,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=self._collator(),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Example] | list[DataLoader[Example]]:
        """Batches as for training, in fixed order; no loader where ``val_size`` is 0."""
        if not self.val_examples:
            return []
        return DataLoader(
            self.val_examples,  # type: ignore[arg-type]
            batch_size=self.eval_batch_size,
            collate_fn=self._collator(),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def test_dataloader(self) -> DataLoader[torch.Tensor]:
        """One element of no meaning: the test hooks measure on text of their own."""
        return DataLoader([torch.zeros(1)])  # type: ignore[arg-type]

    def predict_dataloader(self) -> DataLoader[Prompt]:
        """One :class:`Prompt` dictionary at a time, without a batch dimension."""
        assert self.predict_prompts is not None
        return DataLoader(self.predict_prompts, batch_size=1, collate_fn=_only)  # type: ignore[arg-type]

    def _collator(self) -> Collator:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return Collator(eos if pad is None else pad)


def _only(items: list[Prompt]) -> Prompt:
    (item,) = items
    return item


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading items that are equal."""
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))


def _as_prompt(instruction: str, input_text: str) -> Prompt:
    return {"prompt": alpaca_prompt(instruction, input_text), "instruction": instruction, "input": input_text}


def _read_rows(path: str) -> list[Row]:
    if path == "embedded":
        return [
            {"instruction": row["instruction"], "input": row["input"], "output": row["output"]}
            for row in docstring_rows("train")
        ]
    suffix = file_suffix(path, _SUFFIXES)
    placed: Iterable[tuple[str, object]]
    if suffix == ".jsonl":
        placed = read_jsonl(Path(path))
    elif suffix == ".json":
        content = read_json(Path(path))
        if not isinstance(content, list):
            raise UsageError(
                f"{path}: a JSON {type(content).__name__}; allowed is a list of objects (Alpaca's format)."
            )
        placed = ((f"{path}, item {number}", item) for number, item in enumerate(content, 1))
    else:
        table = read_parquet(Path(path)) if suffix == ".parquet" else load_hub(path, None, "train")
        placed = ((f"{path}, row {number}", row) for number, row in enumerate(table, 1))
    return [
        {
            "instruction": _field(place, row, "instruction"),
            "input": _field(place, row, "input", optional=True),
            "output": _field(place, row, "output"),
        }
        for place, row in placed
    ]


def _read_prompts(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise UsageError(
            f"File not found: {path}. data.prompts takes a text file with one prompt a line, or a .jsonl file with "
            "`instruction` and optionally `input`."
        )
    if path.suffix.lower() == ".jsonl":
        return [
            _as_prompt(_field(place, row, "instruction"), _field(place, row, "input", optional=True))
            for place, row in read_jsonl(path)
        ]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    return [{"prompt": line, "instruction": "", "input": ""} for line in lines if line.strip()]


def _field(place: str, row: object, column: str, *, optional: bool = False) -> str:
    """One text column of a row; an absent or null optional one is "", a null output too (such rows are left out)."""
    if not isinstance(row, dict):
        raise UsageError(f"{place}: a JSON {type(row).__name__}; each row must be an object with named columns.")
    value = row.get(column)
    if value is None and (optional or (column == "output" and column in row)):
        return ""
    if not isinstance(value, str):
        found = ", ".join(map(repr, row)) or "none"
        raise UsageError(
            f"{place}: no text in column {column!r}; columns found: {found}. Needed are 'instruction' and 'output', "
            "and optionally 'input', each a string: rename the columns."
        )
    return value
