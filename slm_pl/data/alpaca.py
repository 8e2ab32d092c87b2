"""Instructions for recovery training."""

import random
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from slm_pl.data.batching import Batching
from slm_pl.data.corpora import CalibrationText
from slm_pl.data.prompts import Prompt, PromptStyle, encode, render
from slm_pl.data.readers import read_jsonl
from slm_pl.data.rows import rows_on_disk, text_field
from slm_pl.data.tokenised import fingerprint, tokenised
from slm_pl.data.training import Examples, TrainingData, check_ranges, split
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset


class AlpacaDataModule(TrainingData):
    """Instruction rows for recovery, calibration text for compression.

    Rows become the prompt of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca), or of the tokenizer's chat
    template, and their response, followed by EOS; the loss counts the response and the EOS only. The tokenizer is that
    of the module (``module.tokenizer``). Token ids are kept in the cache directory (``$SLM_PL_CACHE``, else
    ``~/.cache/slm_pl``) and used again for the same rows, tokenizer and settings.

    * fit, validate: the rows of ``path``, shuffled with ``seed``; the first ``val_size`` are for validation.
    * test: one element of no meaning, so that Lightning runs the stage: the test hooks bring their own text, and no
      instruction row is read.
    * predict: prompts, one dictionary with the key ``prompt`` at a time.

    Sample::

        data:
          path: yahma/alpaca-cleaned
          batch_size: 4
          global_batch_size: 64
          cutoff: 256
          calibration:
            source: embedded
            samples: 10
            sequence_length: 128

    Args:
        path: Hub id, a ``.json`` (list of objects), ``.jsonl`` or ``.parquet`` file, or ``embedded`` (docstrings of the
            Python standard library). Columns: ``instruction``, ``output``, and optionally ``input``.
        calibration: What the compression callbacks look at.
        fitting: What layers are refitted on by least squares, one text or several; null for the calibration text.
        batch_size: Training rows in a micro-batch of one process, what fits into memory; where they are packed, on
            average, since all micro-batches of a step then have nearly equally many tokens.
        eval_batch_size: Validation rows in a batch of one process.
        global_batch_size: Rows of an optimizer step over all processes and micro-batches; how many micro-batches are
            accumulated follows from it. Null: ``batch_size`` x devices x ``trainer.accumulate_grad_batches``.
        batching: ``packed``: several rows of text in one of the batch, each attending to itself only; ``grouped``:
            rows of like length together; ``padded``: as drawn.
        prompt: ``alpaca``, or ``chat`` for the template of an instruct model.
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

    def __init__(
        self,
        path: str = "yahma/alpaca-cleaned",
        calibration: CalibrationText = CalibrationText(),  # noqa: B008  frozen
        fitting: list[CalibrationText] | None = None,
        batch_size: int = 4,
        eval_batch_size: int = 8,
        global_batch_size: int | None = None,
        batching: Batching = "packed",
        prompt: PromptStyle = "alpaca",
        cutoff: int = 256,
        val_size: int = 2000,
        seed: int = 1234,
        max_rows: int | None = None,
        num_workers: int = 0,
        prompts: str | None = None,
    ) -> None:
        super().__init__(
            calibration, fitting, batch_size, eval_batch_size, global_batch_size, batching, val_size, seed, num_workers
        )
        check_ranges(cutoff=(cutoff, 2), max_rows=(max_rows, 1))
        self.path = path
        self.prompt = prompt
        self.cutoff = cutoff
        self.max_rows = max_rows
        self.prompts = prompts

    def load_prompts(self) -> list[Prompt]:
        """What ``predict`` continues: the prompts file, or the validation rows."""
        if self.prompts is not None:
            found = self._read_prompts(Path(self.prompts))
            if not found:
                raise UsageError(f"No prompts to continue in {self.prompts}. Write one prompt a line.")
            return found
        if not self.val_size:
            raise UsageError("No prompts to continue: data.prompts is null and data.val_size is 0. Set one of them.")
        return self.load_examples().prompts

    def load_examples(self) -> Examples:
        """Reads the rows, leaves out what cannot be learnt from, and says how many that were."""
        if self.tokenizer.eos_token_id is None:
            raise UsageError(
                "This model's tokenizer has no EOS token, which ends every response. Choose another model."
            )
        with rows_on_disk(self.path) as rows:
            return self._examples_of(rows)

    def _examples_of(self, rows: "Dataset") -> Examples:
        tokenizer = self.tokenizer
        order = list(range(len(rows)))
        random.Random(self.seed).shuffle(order)
        order = order[: self.max_rows]
        outputs = rows.select(order).select_columns("output").iter(batch_size=1000)
        empty = [not output.strip() for some in outputs for output in some["output"]]
        filled = rows.select([number for number, none in zip(order, empty, strict=True) if not none])

        def encode_rows(columns: dict[str, list[object]], numbers: list[int]) -> dict[str, list[object]]:
            texts = list(zip(columns["instruction"], columns["input"], columns["output"], strict=True))
            prompts = [render(self.prompt, tokenizer, str(text), str(more)) for text, more, _ in texts]
            wholes = [render(self.prompt, tokenizer, str(text), str(more), str(out)) for text, more, out in texts]
            made: dict[str, list[object]] = {name: [] for name in ("row", "input_ids", "labels", "length", "counted")}
            for row, example in zip(numbers, encode(tokenizer, prompts, wholes, self.cutoff), strict=True):
                if example is not None:
                    ids, labels = example
                    counted = sum(label >= 0 for label in labels[1:])
                    for name, value in zip(made, (row, ids, labels, len(ids), counted), strict=True):
                        made[name].append(value)
            return made

        settings = {"prompt": self.prompt, "cutoff": self.cutoff}
        together = (zip(*some.values(), strict=True) for some in filled.iter(batch_size=1000))
        key = fingerprint(tokenizer, settings, (row for some in together for row in some))
        kept = tokenised(filled, encode_rows, key)
        what = f"rows ({len(rows)} read, max_rows is {self.max_rows})"
        train, val = split(kept, self.val_size, self.path, what, ", raise data.max_rows" if self.max_rows else "")
        columns = kept.select_columns("input_ids").iter(batch_size=1000)
        whole = sum(ids[-1] == tokenizer.eos_token_id for some in columns for ids in some["input_ids"])
        rank_zero_info(
            f"{self.path}: {len(train)} rows for training, {len(val)} for validation; "
            f"left out: {sum(empty)} with an empty output, {len(filled) - len(kept)} whose prompt alone "
            f"fills the cutoff of {self.cutoff} tokens; {len(kept) - whole} are cut off"
        )
        of_val = filled.select(list(val["row"]))
        prompts = [self._as_prompt(row["instruction"], row["input"]) for row in of_val]
        return Examples(train, val, prompts, key, self.cutoff)

    def _as_prompt(self, instruction: str, input_text: str) -> Prompt:
        text = render(self.prompt, self.tokenizer, instruction, input_text)
        return {"prompt": text, "instruction": instruction, "input": input_text}

    def _read_prompts(self, path: Path) -> list[Prompt]:
        if not path.is_file():
            raise UsageError(
                f"File not found: {path}. data.prompts takes a text file with one prompt a line, or a .jsonl file with "
                "`instruction` and optionally `input`."
            )
        if path.suffix.lower() == ".jsonl":
            return [
                self._as_prompt(text_field(place, row, "instruction"), text_field(place, row, "input", optional=True))
                for place, row in read_jsonl(path)
            ]
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read as UTF-8 text: {error}.") from error
        return [{"prompt": line, "instruction": "", "input": ""} for line in lines if line.strip()]
