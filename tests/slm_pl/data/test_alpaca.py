import json
import logging
import random

import pytest
import torch
from lightning import LightningModule, Trainer

from slm_pl.data import AlpacaDataModule, CalibrationText
from slm_pl.data.corpora import load_calibration
from slm_pl.data.embedded import docstring_rows
from slm_pl.data.prompts import alpaca_prompt
from slm_pl.errors import UsageError
from tests.helpers.tokenizer import pico_tokenizer


class Recorder(LightningModule):
    """A module without a model: it keeps every batch that Lightning hands it."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch):
        self.seen["train"].append(batch)
        return self.weight * 0

    def validation_step(self, batch):
        self.seen["val"].append(batch)

    def test_step(self, batch):
        self.seen["test"].append(batch)

    def predict_step(self, batch):
        self.seen["predict"].append(batch)
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


def run(stage, data, tokenizer=None, **trainer_options):
    module = Recorder(tokenizer or pico_tokenizer())
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer_options,
    )
    getattr(trainer, stage)(module, datamodule=data)
    return module.seen


def make_rows(count, with_input=True):
    return [
        {
            "instruction": f"Count to {number}",
            "input": f"start at {number % 3}" if with_input and number % 2 else "",
            "output": f"The answer is {number}, or nearly {number * 7}.",
        }
        for number in range(count)
    ]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def as_text(row):
    """Stanford Alpaca's templates, written out again."""
    if row.get("input"):
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\n" + row["instruction"]
            + "\n\n### Input:\n" + row["input"] + "\n\n### Response:\n"
        )  # fmt: skip
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n" + row["instruction"] + "\n\n### Response:\n"
    )


def unpadded(batches):
    """(input ids, labels) of every example: of a row, what lies between one position 0 and the next."""
    found = []
    for batch in batches:
        rows = zip(batch["input_ids"], batch["position_ids"], batch["attention_mask"], batch["labels"], strict=True)
        for ids, positions, mask, labels in rows:
            tokens = int(mask.sum())
            starts = [i for i in range(tokens) if positions[i] == 0]
            for start, end in zip(starts, [*starts[1:], tokens], strict=True):
                found.append((ids[start:end].tolist(), labels[start:end].tolist()))
    return found


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_training_rows_are_prompt_and_learnt_response(tmp_path, suffix, add_bos):
    tokenizer = pico_tokenizer(add_bos=add_bos)
    rows = make_rows(12)
    data = AlpacaDataModule(write(tmp_path / f"a{suffix}", rows), batch_size=5, val_size=3, seed=3)
    seen = run("fit", data, tokenizer)

    def expected(row):
        prompt = tokenizer(as_text(row)).input_ids
        response = [*tokenizer(row["output"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        return prompt + response, [-100] * len(prompt) + response

    shuffled = list(rows)
    random.Random(3).shuffle(shuffled)
    assert sorted(unpadded(seen["val"])) == sorted(expected(row) for row in shuffled[:3])
    assert sorted(unpadded(seen["train"])) == sorted(expected(row) for row in shuffled[3:])
    assert [batch["examples"] for batch in seen["train"]] == [5, 4]


@pytest.mark.parametrize("has_pad", [True, False])
def test_padding_uses_the_pad_token_or_else_eos(tmp_path, has_pad):
    tokenizer = pico_tokenizer()
    if not has_pad:
        tokenizer.pad_token = None
    rows = [{**row, "output": "x" * (1 + 9 * number)} for number, row in enumerate(make_rows(4, with_input=False))]
    seen = run("fit", AlpacaDataModule(write(tmp_path / "a.json", rows), batching="padded", val_size=0), tokenizer)
    (batch,) = seen["train"]
    padding = batch["input_ids"][batch["attention_mask"] == 0]
    assert len(padding) > 0
    assert set(padding.tolist()) == {tokenizer.pad_token_id if has_pad else tokenizer.eos_token_id}
    assert set(batch["labels"][batch["attention_mask"] == 0].tolist()) == {-100}
    assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]


def test_cutoff_truncates_and_leaves_out_what_has_no_response(tmp_path, caplog):
    tokenizer = pico_tokenizer()
    rows = [
        {"instruction": "Say it", "output": "word " * 200},
        {"instruction": "Say it", "output": "ok"},
        {"instruction": "Say it " * 100, "output": "never reached"},
        {"instruction": "Say it", "output": " \n"},
        {"instruction": "Say it", "output": ""},
    ]
    start = len(tokenizer(alpaca_prompt("Say it")).input_ids)
    path = write(tmp_path / "a.json", rows)
    with caplog.at_level(logging.INFO):
        seen = run("fit", AlpacaDataModule(path, val_size=0, cutoff=start + 5), tokenizer)
    long, short = sorted(unpadded(seen["train"]), key=lambda pair: -len(pair[0]))
    assert [len(long[0]), sum(label != -100 for label in long[1])] == [start + 5, 5]
    assert long[0] == tokenizer(as_text(rows[0]) + rows[0]["output"]).input_ids[: start + 5]
    assert long[0][-1] != tokenizer.eos_token_id
    assert short[0][-1] == short[1][-1] == tokenizer.eos_token_id
    assert "2 rows for training, 0 for validation; left out: 2 with an empty output, 1 whose prompt" in caplog.text
    with pytest.raises(UsageError, match="gives 0 usable rows"):
        run("fit", AlpacaDataModule(path, val_size=0, cutoff=start), tokenizer)


def test_token_across_the_boundary_counts_as_response(tmp_path):
    tokenizer = pico_tokenizer()
    tokenizer.add_tokens(["\n\n"])  # swallows the line end of the prompt where the response begins with another
    row = {"instruction": "Say it", "output": "\n yes"}
    data = AlpacaDataModule(write(tmp_path / "a.json", [row]), val_size=0)
    ((ids, labels),) = unpadded(run("fit", data, tokenizer)["train"])
    before = tokenizer(as_text(row).removesuffix("\n")).input_ids
    learnt = [tokenizer.convert_tokens_to_ids("\n\n"), *tokenizer(" yes").input_ids, tokenizer.eos_token_id]
    assert ids == before + learnt
    assert labels == [-100] * len(before) + learnt


def test_max_rows_counts_after_the_shuffle_and_includes_validation(tmp_path):
    rows = make_rows(30)
    path = write(tmp_path / "a.json", rows)
    data = AlpacaDataModule(path, val_size=2, max_rows=5, batch_size=1, seed=8, batching="padded")
    seen = run("fit", data)
    random.Random(8).shuffle(rows)
    tokenizer = pico_tokenizer()
    texts = [tokenizer.decode(ids[:-1]) for ids, _ in [*unpadded(seen["val"]), *unpadded(seen["train"])]]
    assert texts[:2] == [as_text(row) + row["output"] for row in rows[:2]]
    assert sorted(texts) == sorted(as_text(row) + row["output"] for row in rows[:5])


def test_training_order_is_shuffled_and_seeded(tmp_path):
    path = write(tmp_path / "a.json", make_rows(20))
    orders = [
        unpadded(run("fit", AlpacaDataModule(path, val_size=1, batch_size=1, seed=seed))["train"]) for seed in (5, 5, 6)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    data = AlpacaDataModule(path, val_size=1, batch_size=1, seed=5)
    run("fit", data)
    stored = [(example["input_ids"], [-100, *example["labels"][1:]]) for example in data.train_examples]
    assert orders[0] != stored
    assert sorted(orders[0]) == sorted(stored)


def test_embedded_rows():
    data = AlpacaDataModule("embedded", val_size=4, max_rows=12)
    run("fit", data)
    tokenizer = pico_tokenizer()
    outputs = {alpaca_prompt(row["instruction"]) + row["output"] for row in docstring_rows("train")}
    whole = [
        e
        for part in (data.train_examples, data.val_examples)
        for e in part
        if e["input_ids"][-1] == tokenizer.eos_token_id
    ]
    assert whole
    assert {tokenizer.decode(example["input_ids"][:-1]) for example in whole} <= outputs


def test_hub_rows(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list(make_rows(6))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    seen = run("fit", AlpacaDataModule(val_size=2))
    assert asked == [(("yahma/alpaca-cleaned", None), {"split": "train"})]
    assert len(unpadded(seen["train"])) == 4


def test_test_stage_reads_no_rows():
    data = AlpacaDataModule("no/such-data-set")
    assert len(run("test", data)["test"]) == 1
    assert data.examples is None


def test_predict_continues_the_validation_instructions(tmp_path):
    rows = make_rows(6)
    seen = run("predict", AlpacaDataModule(write(tmp_path / "a.json", rows), val_size=3, seed=2))
    random.Random(2).shuffle(rows)
    assert seen["predict"] == [
        {"prompt": as_text(row), "instruction": row["instruction"], "input": row["input"]} for row in rows[:3]
    ]


def test_predict_reads_prompts_as_they_are_or_as_instructions(tmp_path):
    (tmp_path / "p.txt").write_text("The Leaning Tower\n\n  of Pisa \n")
    data = AlpacaDataModule("no/such-data-set", prompts=str(tmp_path / "p.txt"))
    assert [item["prompt"] for item in run("predict", data)["predict"]] == ["The Leaning Tower", "  of Pisa "]
    rows = [{"instruction": "Count {input}"}, {"instruction": "Sort", "input": "3 {2} 1"}]
    prompts = write(tmp_path / "p.jsonl", rows)
    seen = run("predict", AlpacaDataModule("no/such-data-set", prompts=prompts))
    assert [item["prompt"] for item in seen["predict"]] == [as_text(row) for row in rows]


def test_calibration_is_tokenised_on_first_use_and_kept():
    data = AlpacaDataModule("no/such-data-set", CalibrationText(samples=3, sequence_length=20))
    run("test", data)
    assert data.calibration_set is None
    found = data.calibration_batches()
    assert found.sha256 == load_calibration(data.calibration, pico_tokenizer()).sha256
    assert data.calibration_batches() is found is data.calibration_set


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "output": "b"}],
            r"a\.json, item 1: no text in column 'instruction'; columns found: 'prompt', 'o",
        ),
        ([{"instruction": "a", "text": "b"}], "no text in column 'output'; columns found: 'instruction', 'text'"),
        ([{"instruction": "a", "input": 3, "output": "b"}], "no text in column 'input'"),
        (["a"], "item 1: a JSON str; each row must be an object"),
        ({"instruction": "a"}, "a JSON dict; allowed is a list of objects"),
        (make_rows(3), r"val_size is 3, but .* gives 3 usable rows \(3 read, .*Lower data\.val_size or give more"),
        ([], "val_size is 3, but .* gives 0 usable rows"),
    ],
)
def test_unusable_rows(tmp_path, rows, message):
    with pytest.raises(UsageError, match=message):
        run("fit", AlpacaDataModule(write(tmp_path / "a.json", rows), val_size=3))


def test_unusable_files(tmp_path):
    with pytest.raises(UsageError, match=r"File not found: .*absent\.json .*Give an existing \.json file"):
        run("fit", AlpacaDataModule(str(tmp_path / "absent.json")))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(
        UsageError, match=r"a\.txt is a file of an unknown kind; allowed are \.json, \.jsonl, \.parquet"
    ):
        run("fit", AlpacaDataModule(str(tmp_path / "a.txt")))
    with pytest.raises(UsageError, match=r"File not found: .*absent\.txt\. data\.prompts takes a text file"):
        run("predict", AlpacaDataModule(prompts=str(tmp_path / "absent.txt")))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UsageError, match=r"No prompts to continue in .*empty\.txt"):
        run("predict", AlpacaDataModule(prompts=str(tmp_path / "empty.txt")))
    with pytest.raises(UsageError, match=r"data\.prompts is null and data\.val_size is 0"):
        run("predict", AlpacaDataModule(write(tmp_path / "a.json", make_rows(2)), val_size=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size is 0; allowed are whole numbers from 1"),
        ({"eval_batch_size": -1}, r"data\.eval_batch_size is -1"),
        ({"cutoff": 1}, r"data\.cutoff is 1; allowed are whole numbers from 2"),
        ({"val_size": -1}, r"data\.val_size is -1; allowed are whole numbers from 0"),
        ({"max_rows": 0}, r"data\.max_rows is 0"),
        ({"num_workers": -2}, r"data\.num_workers is -2"),
        ({"global_batch_size": 0}, r"data\.global_batch_size is 0; allowed are whole numbers from 1"),
    ],
)
def test_ranges(options, message):
    with pytest.raises(UsageError, match=message):
        AlpacaDataModule(**options)


def test_tokenizer_without_eos(tmp_path):
    tokenizer = pico_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no EOS token"):
        run("fit", AlpacaDataModule(write(tmp_path / "a.json", make_rows(4)), val_size=1), tokenizer)


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_validation_keeps_its_order_or_goes_by_length(tmp_path, batching):
    data = AlpacaDataModule(write(tmp_path / "a.json", make_rows(9)), val_size=5, eval_batch_size=2, batching=batching)
    seen = run("validate", data)
    stored = [(example["input_ids"], example["labels"]) for example in data.val_examples]
    if batching == "packed":
        stored.sort(key=lambda pair: -len(pair[0]))
    assert unpadded(seen["val"]) == stored
    assert [len(batch["labels"]) for batch in seen["val"]] == [2, 2, 1]


def test_global_batch_decides_how_many_micro_batches_are_accumulated(tmp_path, caplog):
    path = write(tmp_path / "a.json", make_rows(30))
    data = AlpacaDataModule(path, val_size=2, batch_size=4, global_batch_size=10)
    with caplog.at_level(logging.INFO):
        seen = run("fit", data)
    assert "10 examples an optimizer step: 1 device(s) x 3 micro-batch(es) of about 3.33333, packed" in caplog.text
    assert data.trainer.accumulate_grad_batches == 3
    assert data.trainer.global_step == 3  # of 10, 10 and 8 rows
    assert [sum(b["examples"] for b in seen["train"][i : i + 3]) for i in (0, 3, 6)] == [10, 10, 8]
    with pytest.raises(UsageError, match="accumulate_grad_batches is 5, but data.global_batch_size = 10 .* takes 3"):
        run("fit", AlpacaDataModule(path, val_size=2, global_batch_size=10), accumulate_grad_batches=5)
    plain = AlpacaDataModule(path, val_size=2, batch_size=4)
    run("fit", plain, accumulate_grad_batches=2)
    assert plain.trainer.global_step == 4  # of 8


def test_tokens_come_from_the_cache_the_second_time(tmp_path, monkeypatch):
    monkeypatch.setenv("SLM_PL_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "a.json", make_rows(20))
    first = AlpacaDataModule(path, val_size=3)
    seen = unpadded(run("fit", first)["train"])
    (kept,) = (tmp_path / "cache" / "tokenised").glob("*.arrow")
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr("slm_pl.data.alpaca.encode", lambda *_: pytest.fail("tokenised again"))
    assert unpadded(run("fit", AlpacaDataModule(path, val_size=3))["train"]) == seen
    assert kept.stat().st_mtime_ns == before
    monkeypatch.undo()
    monkeypatch.setenv("SLM_PL_CACHE", str(tmp_path / "cache"))
    # other rows, another cutoff and another tokenizer are another entry
    run("fit", AlpacaDataModule(path, val_size=3, cutoff=60))
    run("fit", AlpacaDataModule(path, val_size=3), pico_tokenizer(add_bos=True))
    run("fit", AlpacaDataModule(write(tmp_path / "b.json", make_rows(21)), val_size=3))
    assert len(list((tmp_path / "cache" / "tokenised").glob("*.arrow"))) == 4
    # one that is broken is made anew
    kept.write_bytes(kept.read_bytes()[:100])
    assert unpadded(run("fit", AlpacaDataModule(path, val_size=3))["train"]) == seen


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("add_bos", [False, True])
def test_chat_rows_are_the_template_and_the_response_is_learnt_with_its_end(tmp_path, add_bos):
    tokenizer = pico_tokenizer(add_bos=add_bos)
    tokenizer.chat_template = ("<s>" if add_bos else "") + TEMPLATE
    row = {"instruction": "Sort", "input": "3 2 1", "output": "1 2 3"}
    data = AlpacaDataModule(write(tmp_path / "a.json", [row]), val_size=0, prompt="chat")
    ((ids, labels),) = unpadded(run("fit", data, tokenizer)["train"])
    head = tokenizer("<|user|>\nSort\n\n3 2 1</s>\n<|assistant|>\n").input_ids  # one BOS, not two
    answer = [*tokenizer("1 2 3", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert ids == head + answer  # the line end that the template has behind it is nothing to learn
    assert labels == [-100] * len(head) + answer
    prompts = write(tmp_path / "p.jsonl", [row])
    ((found),) = run("predict", AlpacaDataModule("no/such", prompt="chat", prompts=prompts), tokenizer)["predict"]
    assert tokenizer(found["prompt"]).input_ids == head


def test_a_template_whose_turn_ends_with_another_token_learns_the_eos_too(tmp_path):
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("</s>", "<end>")
    row = {"instruction": "Sort", "output": "1 2 3"}
    data = AlpacaDataModule(write(tmp_path / "a.json", [row]), val_size=0, prompt="chat")
    ((ids, _),) = unpadded(run("fit", data, tokenizer)["train"])
    assert tokenizer.decode(ids) == "<|user|>\nSort<end>\n<|assistant|>\n1 2 3<end>\n</s>"


def test_chat_without_a_template_or_with_one_that_fails(tmp_path):
    path = write(tmp_path / "a.json", make_rows(3))
    with pytest.raises(UsageError, match="tokenizer has no chat template.*data.prompt: alpaca"):
        run("fit", AlpacaDataModule(path, val_size=1, prompt="chat"))
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UsageError, match="chat template fails with TemplateError: no"):
        run("fit", AlpacaDataModule(path, val_size=1, prompt="chat"), tokenizer)
