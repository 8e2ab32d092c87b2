"""Plain text for continued pre-training."""

from collections.abc import Sequence
from typing import cast

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from slm_pl.data.batching import Batching
from slm_pl.data.corpora import CalibrationText, read_documents
from slm_pl.data.tokenised import fingerprint, tokenised
from slm_pl.data.training import Examples, TrainingData, check_ranges, split
from slm_pl.errors import UsageError

DOCUMENTS = 1000
"""How many documents are joined at a time; what is left of them when they are cut is dropped."""


class TextDataModule(TrainingData):
    """Plain text for continued pre-training, the other recovery of Shortened LLaMA (https://arxiv.org/abs/2402.02834).

    Documents are tokenised, joined with an EOS behind each, and cut into windows of ``sequence_length`` tokens, all of
    which are learnt. The windows are cut from the documents in their order, 1,000 documents at a time.

    Sample::

        data:
          class_path: slm_pl.data.TextDataModule
          init_args:
            source: DKYoon/SlimPajama-6B
            max_documents: 100000
            sequence_length: 2048
            batch_size: 2
            global_batch_size: 256

    Args:
        source: Hub id, a ``.txt`` (one document), ``.jsonl`` or ``.parquet`` file, or ``embedded`` (chapters of
            Python's language reference, those that calibration draws from).
        name: Configuration of a Hub data set.
        split: Split of a Hub data set.
        column: Column that holds the text.
        sequence_length: Tokens of a window.
        max_documents: How many documents to use, ``None`` for all.
        calibration: What the compression callbacks look at.
        fitting: What layers are refitted on by least squares, one text or several; null for the calibration text.
        batch_size: Windows in a micro-batch of one process, at most; what fits into memory.
        eval_batch_size: Validation windows in a batch of one process.
        global_batch_size: Windows of an optimizer step over all processes and micro-batches; how many micro-batches
            are accumulated follows from it. Null: ``batch_size`` x devices x ``trainer.accumulate_grad_batches``.
        val_size: Number of validation windows, the first ones.
        seed: Seed of the training order.
        num_workers: Worker processes per loader.

    Raises:
        UsageError: A number is out of range; later, when text is needed, the source cannot be used.
    """

    def __init__(
        self,
        source: str = "DKYoon/SlimPajama-6B",
        name: str | None = None,
        split: str = "train",
        column: str = "text",
        sequence_length: int = 2048,
        max_documents: int | None = None,
        calibration: CalibrationText = CalibrationText(),  # noqa: B008  frozen
        fitting: list[CalibrationText] | None = None,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        global_batch_size: int | None = None,
        val_size: int = 100,
        seed: int = 1234,
        num_workers: int = 0,
    ) -> None:
        batching: Batching = "padded"  # all windows are equally long
        super().__init__(
            calibration, fitting, batch_size, eval_batch_size, global_batch_size, batching, val_size, seed, num_workers
        )
        check_ranges(sequence_length=(sequence_length, 2), max_documents=(max_documents, 1))
        self.source = source
        self.name = name
        self.split = split
        self.column = column
        self.sequence_length = sequence_length
        self.max_documents = max_documents

    def load_examples(self) -> Examples:
        """Reads, joins and cuts the documents."""
        tokenizer, length = self.tokenizer, self.sequence_length
        if tokenizer.eos_token_id is None:
            raise UsageError(
                "This model's tokenizer has no EOS token, which ends every document. Choose another model."
            )
        documents = read_documents(self.source, self.name, self.split, self.column)
        texts = [documents[i] for i in range(min(len(documents), self.max_documents or len(documents)))]
        read, texts = len(texts), [text for text in texts if text.strip()]

        def windows(columns: dict[str, list[object]], numbers: list[int]) -> dict[str, list[object]]:
            ids: list[int] = []
            for found in tokenizer(cast("list[str]", columns["text"]), verbose=False)["input_ids"]:
                ids += [*found, tokenizer.eos_token_id]
            cut: Sequence[object] = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
            count = len(cut)
            return {
                "input_ids": list(cut),
                "labels": list(cut),
                "length": [length] * count,
                "counted": [length - 1] * count,
            }

        from datasets import Dataset

        key = fingerprint(tokenizer, {"sequence_length": length, "documents": DOCUMENTS}, texts)
        made = tokenised(Dataset.from_dict({"text": texts}), windows, key, DOCUMENTS)
        train, val = split(made, self.val_size, self.source, f"windows of {length} tokens")
        rank_zero_info(
            f"{self.source}: {len(texts):,} documents, {len(train):,} windows of {length} tokens for training, "
            f"{len(val):,} for validation; left out: {read - len(texts):,} empty documents, and less than a window at "
            f"the end of every {DOCUMENTS:,} documents"
        )
        return Examples(train, val, [], key, length)
