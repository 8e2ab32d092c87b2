import json

import pytest

from slm_pl.data import TextDataModule
from slm_pl.errors import UsageError
from tests.helpers.tokenizer import pico_tokenizer
from tests.slm_pl.data.test_alpaca import run

DOCUMENTS = [f"Document {n} tells of {'layers and ' * (3 + n)} windows." for n in range(14)]


def write(path):
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in [*DOCUMENTS, "  "]))
    return str(path)


def test_windows_are_cut_from_documents_with_an_eos_behind_each(tmp_path):
    tokenizer = pico_tokenizer()
    data = TextDataModule(write(tmp_path / "t.jsonl"), column="body", sequence_length=32, val_size=2, batch_size=3)
    seen = run("fit", data)
    stream = [token for text in DOCUMENTS for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    windows = [stream[i : i + 32] for i in range(0, len(stream) - 31, 32)]
    assert len(windows) > 8
    assert [row for batch in seen["val"] for row in batch["input_ids"].tolist()] == windows[:2]
    trained = [row for batch in seen["train"] for row in batch["input_ids"].tolist()]
    assert sorted(trained) == sorted(windows[2:])
    assert trained != windows[2:]
    for batch in seen["train"]:
        assert batch["labels"][:, 1:].tolist() == batch["input_ids"][:, 1:].tolist()
        assert batch["labels"][:, 0].tolist() == [-100] * len(batch["labels"])
        assert batch["position_ids"].tolist() == [list(range(32))] * len(batch["labels"])
    assert {batch["step_labels"] for batch in seen["train"][:-1]} == {3 * 31}


def test_max_documents_and_embedded():
    few = TextDataModule("embedded", max_documents=1, sequence_length=64, val_size=1, batch_size=64)
    run("fit", few)
    more = TextDataModule("embedded", max_documents=2, sequence_length=64, val_size=1, batch_size=64)
    run("fit", more)
    assert 0 < len(few.train_examples) < len(more.train_examples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 1}, r"data\.sequence_length is 1; allowed are whole numbers from 2"),
        ({"max_documents": 0}, r"data\.max_documents is 0"),
    ],
)
def test_ranges(changes, message):
    with pytest.raises(UsageError, match=message):
        TextDataModule(**changes)


def test_too_little_text_and_no_prompts(tmp_path):
    path = write(tmp_path / "t.jsonl")
    with pytest.raises(UsageError, match="val_size is 1, but .* gives 0 usable windows of 5000 tokens"):
        run("fit", TextDataModule(path, column="body", sequence_length=5000, val_size=1))
    with pytest.raises(UsageError, match="TextDataModule has no prompts.*AlpacaDataModule"):
        run("predict", TextDataModule(path, column="body"))
    with pytest.raises(UsageError, match="no text in column|no column 'text'"):
        run("fit", TextDataModule(path))
