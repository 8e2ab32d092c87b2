import json
import random
from dataclasses import asdict, replace

import pytest
import torch

from slm_pl.data import CORPORA, EvaluationText, hub_rows, load_evaluation
from slm_pl.data.embedded import topic_texts
from slm_pl.data.evaluation_text import PRESETS
from slm_pl.errors import UsageError
from tests.helpers.shared import SHARED, needs_shared
from tests.helpers.tokenizer import pico_tokenizer

BOS = 0


@pytest.fixture(scope="module")
def tokenizer():
    return pico_tokenizer()


def words(count, seed):
    return " ".join(random.Random(seed).choices(["layer", "merge", "the", "of", "window", "similar"], k=count))


def ids_of(windows):
    return [ids.tolist() for ids in windows.ids]


def whole(stream, length):
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def stored(directory, name, split, rows, column="text"):
    path = directory / name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return str(directory)


def text_file(tmp_path, count=200):
    path = tmp_path / "a.txt"
    path.write_text("  first line\n\n" + words(count, 3) + "\n")
    return path


def test_windows_do_not_overlap_and_the_tail_is_dropped(tmp_path):
    tokenizer = pico_tokenizer(add_bos=True)  # its BOS must not appear unasked
    path = text_file(tmp_path)
    stream = pico_tokenizer()(path.read_text()).input_ids
    assert len(stream) % 32
    plain = load_evaluation(EvaluationText(str(path), sequence_length=32), tokenizer)
    assert {ids.dtype for ids in plain.ids} == {torch.int64}
    assert ids_of(plain) == whole(stream, 32)
    assert (plain.sequence_length, plain.bos, plain.stride, plain.tail) == (32, "none", None, "drop")
    assert set(plain.context) == {1}
    cut = load_evaluation(EvaluationText(str(path), sequence_length=32, max_tokens=100), tokenizer)
    assert ids_of(cut) == whole(stream[:100], 32)
    with pytest.raises(UsageError, match=f"has {len(stream)} tokens, fewer than one window of sequence_length = 5000"):
        load_evaluation(EvaluationText(str(path), sequence_length=5000), tokenizer)


def test_embedded_text_is_the_heldout_topics(tokenizer):
    found = load_evaluation(EvaluationText(sequence_length=64, max_tokens=640), tokenizer)
    stream = tokenizer("\n\n".join(topic_texts("heldout"))).input_ids
    assert ids_of(found) == whole(stream[:640], 64)
    assert len(found) == 10


@pytest.mark.parametrize("add_bos", [False, True])
def test_bos(tmp_path, add_bos):
    tokenizer = pico_tokenizer(add_bos=add_bos)
    path = text_file(tmp_path)
    stream = pico_tokenizer()(path.read_text()).input_ids

    def load(bos, **options):
        return load_evaluation(EvaluationText(str(path), 32, bos=bos, **options), tokenizer)

    none, one, every, own = (load(bos) for bos in ("none", "stream", "window", "tokenizer"))
    assert ids_of(none) == whole(stream, 32)
    assert ids_of(one) == whole([BOS, *stream], 32)
    assert ids_of(every) == [[BOS, *window] for window in whole(stream, 32)]
    assert ids_of(own) == ids_of(one if add_bos else none)
    assert [found.bos for found in (none, one, every, own)] == [
        "none",
        "stream",
        "window",
        "stream" if add_bos else "none",
    ]
    # One BOS in front of each window: all its tokens are targets.
    assert every.targets == 32 * len(every)
    assert one.targets == 31 * len(one)
    assert every.sequence_length == 32
    # A BOS counts as a token of the stream.
    assert ids_of(load("stream", max_tokens=100)) == whole([BOS, *stream][:100], 32)
    assert ids_of(load("window", max_tokens=100)) == [[BOS, *window] for window in whole(stream[:100], 32)]


def test_special_tokens_that_are_no_bos_are_named_as_the_tokenizers():
    from tokenizers import processors

    tokenizer = pico_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> <s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    found = load_evaluation(EvaluationText(sequence_length=16, max_tokens=64, bos="tokenizer"), tokenizer)
    assert found.ids[0][:2].tolist() == [1, 0]
    assert (found.bos, found.text_tokens) == ("tokenizer", 62)


def test_tail_is_kept(tmp_path, tokenizer):
    path = text_file(tmp_path)
    stream = tokenizer(path.read_text()).input_ids
    text = EvaluationText(str(path), 32, tail="keep", max_tokens=32 + 9)
    assert ids_of(load_evaluation(text, tokenizer)) == [stream[:32], stream[32:41]]
    # A single token has nothing to be predicted from, unless a BOS stands before it.
    text = replace(text, max_tokens=32 + 1)
    assert ids_of(load_evaluation(text, tokenizer)) == [stream[:32]]
    assert ids_of(load_evaluation(replace(text, bos="window"), tokenizer))[1:] == [[BOS, stream[32]]]
    assert ids_of(load_evaluation(replace(text, max_tokens=64), tokenizer)) == whole(stream[:64], 32)


@pytest.mark.parametrize("bos", ["none", "stream", "window"])
@pytest.mark.parametrize("total", [32, 33, 40, 47, 48, 49, 64, 100])
@pytest.mark.parametrize("stride", [1, 8, 31])
def test_a_stride_scores_every_token_once(tmp_path, tokenizer, bos, total, stride):
    path = text_file(tmp_path)
    stream = [*([BOS] if bos == "stream" else []), *tokenizer(path.read_text()).input_ids][:total]
    text = EvaluationText(str(path), 32, max_tokens=total, bos=bos, stride=stride)
    found = load_evaluation(text, tokenizer)
    front = [BOS] if bos == "window" else []
    scored = []
    for number, (ids, context) in enumerate(zip(ids_of(found), found.context, strict=True)):
        assert ids == front + stream[number * stride : number * stride + 32]
        scored += ids[context:]
        if number:
            assert context >= len(front) + 32 - stride  # so much is read before the first target
    assert scored == (stream if bos == "window" else stream[1:])
    assert found.targets == len(scored)
    assert (found.stride, found.tail) == (stride, "keep")
    assert found.text_tokens == total - (bos == "stream")
    dropped = load_evaluation(replace(text, tail="drop"), tokenizer)
    assert {len(ids) for ids in dropped.ids} == {32 + len(front)}
    assert len(dropped) == (total - 32) // stride + 1


def test_words_are_those_that_the_windows_cover(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("alpha beta  gamma\n\ndelta")
    count = len(tokenizer(path.read_text()).input_ids)
    for bos in ("none", "stream", "window"):
        found = load_evaluation(EvaluationText(str(path), 4, bos=bos, tail="keep"), tokenizer)
        assert (found.words, found.text_tokens) == (4, count)
    overlapping = load_evaluation(EvaluationText(str(path), 4, stride=2), tokenizer)
    assert (overlapping.words, overlapping.text_tokens) == (4, count)
    # What the dropped tail holds does not count.
    length = len(tokenizer("alpha beta").input_ids)
    found = load_evaluation(EvaluationText(str(path), length, max_tokens=length), tokenizer)
    assert (found.words, found.text_tokens) == (2, length)


def test_recorded_ids(tmp_path, tokenizer):
    path = tmp_path / "ids.json"
    stream = list(range(10, 31))
    path.write_text(json.dumps({"note": "x", "input_ids": stream}))
    text = EvaluationText(str(path), sequence_length=8)
    found = load_evaluation(text, tokenizer)
    assert ids_of(found) == whole(stream, 8)
    assert found.text_tokens == 16
    assert ids_of(load_evaluation(replace(text, bos="stream"), tokenizer))[0] == [BOS, *stream[:7]]
    # A BOS that is there already is enough.
    path.write_text(json.dumps([BOS, *stream]))
    found = load_evaluation(replace(text, bos="stream"), tokenizer)
    assert ids_of(found) == whole([BOS, *stream], 8)
    assert found.text_tokens == 15
    assert load_evaluation(replace(text, bos="tokenizer"), tokenizer).bos == "stream"

    path.write_text(json.dumps(whole(stream, 8)))
    found = load_evaluation(text, tokenizer)
    assert ids_of(found) == whole(stream, 8)
    assert (found.words, found.text_tokens) == (None, None)
    with pytest.raises(UsageError, match="holds ready windows, number 1 of 8 token ids, but sequence_length is 16"):
        load_evaluation(replace(text, sequence_length=16), tokenizer)
    with pytest.raises(UsageError, match="holds ready windows, not one stream, .* bos is 'stream'"):
        load_evaluation(replace(text, bos="stream"), tokenizer)
    with pytest.raises(UsageError, match="holds ready windows, not one stream, .* stride is 2"):
        load_evaluation(replace(text, stride=2), tokenizer)


@pytest.mark.parametrize("bos", ["stream", "window"])
def test_tokenizer_without_bos(bos):
    tokenizer = pico_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match=f"bos is '{bos}', but this tokenizer has no BOS token"):
        load_evaluation(EvaluationText(bos=bos), tokenizer)
    assert load_evaluation(EvaluationText(bos="tokenizer"), tokenizer).bos == "none"


# The presets, each stated again as its program cuts the text.


def shortened_llama(rows, tokenizer, length, bos_in_front_of_each=False):
    ids = tokenizer("\n\n".join(rows), add_special_tokens=False).input_ids
    if not bos_in_front_of_each:
        ids = [tokenizer.bos_token_id, *ids]
    count = len(ids) // length
    samples = [ids[i * length : (i + 1) * length] for i in range(count)]
    return [[tokenizer.bos_token_id, *sample] for sample in samples] if bos_in_front_of_each else samples


def sleb(rows, tokenizer, length, corpus="wikitext2"):
    if corpus == "c4":
        ids = tokenizer(" ".join(rows[:1100]), return_tensors="pt").input_ids[:, : 256 * length]
    else:
        ids = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids
    return [ids[0, i * length : (i + 1) * length].tolist() for i in range(ids.numel() // length)]


@pytest.mark.parametrize("add_bos", [False, True])
def test_shortened_llama(tmp_path, add_bos):
    tokenizer = pico_tokenizer(add_bos=add_bos)
    rows = ["", " = Title = \n", "", *(words(150, n) + "\n" for n in range(4))]
    for name, split, column in (("wikitext2", "test", "text"), ("ptb", "validation", "sentence")):
        local = stored(tmp_path, name, split, rows, column)
        text = EvaluationText(preset="shortened_llama", source=name)
        found = load_evaluation(text, tokenizer, local)
        assert ids_of(found) == shortened_llama(rows, tokenizer, 128)
        assert (found.sequence_length, found.bos, found.tail, found.stride) == (128, "stream", "drop", None)
        every = load_evaluation(replace(text, bos="window"), tokenizer, local)
        assert ids_of(every) == shortened_llama(rows, tokenizer, 128, bos_in_front_of_each=True)
    assert text.protocol().label == "ptb"
    assert EvaluationText(preset="shortened_llama").protocol().label == "wikitext2"


@pytest.mark.parametrize("add_bos", [False, True])
def test_sleb(tmp_path, add_bos):
    tokenizer = pico_tokenizer(add_bos=add_bos)
    rows = [words(40, n) for n in range(200)]
    local = stored(tmp_path, "wikitext2", "test", rows)
    found = load_evaluation(EvaluationText(preset="sleb"), tokenizer, local)
    assert ids_of(found) == sleb(rows, tokenizer, 2048)
    assert (len(found) > 1, found.bos, found.tail) == (True, "stream" if add_bos else "none", "drop")
    # FLAP's, and the special case.
    shorter = load_evaluation(EvaluationText(preset="sleb", sequence_length=128), tokenizer, local)
    assert ids_of(shorter) == sleb(rows, tokenizer, 128)


@pytest.mark.parametrize("words_each", [2, 60])
def test_sleb_on_c4(tmp_path, tokenizer, words_each):
    """With short documents all 1100 are read; with long ones, 256 windows."""
    rows = [words(words_each, n) for n in range(1200)]
    local = stored(tmp_path, "c4", "validation", rows)
    text = EvaluationText(preset="sleb", source="c4", sequence_length=64)
    found = ids_of(load_evaluation(text, tokenizer, local))
    assert found == sleb(rows, tokenizer, 64, "c4")
    assert (len(found) == 256) == (words_each == 60)
    fewer = load_evaluation(replace(text, documents=700, max_tokens=640), tokenizer, local)
    assert ids_of(fewer) == found[:10]


def test_what_is_given_comes_before_the_preset_and_before_the_defaults():
    plain, preset = EvaluationText().protocol(), EvaluationText(preset="sleb").protocol()
    assert (plain.source, plain.sequence_length, plain.bos, plain.tail) == ("embedded", 128, "none", "drop")
    assert (preset.source, preset.sequence_length, preset.bos) == ("wikitext2", 2048, "tokenizer")
    given = EvaluationText(
        "a.txt", 64, 640, "window", "n", "s", "c", "sleb", stride=16, tail="drop", documents=3, separator="|"
    ).protocol()
    assert asdict(given) == {
        "source": "a.txt",
        "name": "n",
        "corpus": {
            "hub": "a.txt",
            "name": "n",
            "revision": None,
            "data_files": None,
            "split": "s",
            "column": "c",
            "separator": "\n\n",
            "keeps_line_ends": False,
        },
        "separator": "|",
        "documents": 3,
        "sequence_length": 64,
        "bos": "window",
        "stride": 16,
        "tail": "drop",
        "max_tokens": 640,
    }
    assert EvaluationText(source="c4").protocol().separator == " "
    assert EvaluationText(source="c4", preset="shortened_llama").protocol().separator == "\n\n"
    assert EvaluationText(source="c4").protocol().max_tokens is None
    assert set(PRESETS) == {"shortened_llama", "sleb"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "sequence_length of the evaluation text is 0"),
        ({"max_tokens": 127}, "max_tokens is 127, but one window alone has sequence_length = 128"),
        ({"bos": "every"}, "bos of the evaluation text is 'every'; allowed are none, stream, window, tokenizer"),
        ({"tail": "pad"}, "tail of the evaluation text is 'pad'; allowed are drop, keep"),
        ({"preset": "sled"}, "preset is 'sled'; allowed are 'shortened_llama', 'sleb'"),
        ({"stride": 128}, "stride is 128; allowed are whole numbers from 1 to 127"),
        ({"stride": 0}, "stride is 0; allowed are"),
        ({"documents": 0}, "documents of the evaluation text is 0; allowed are whole numbers from 1"),
        ({"preset": "sleb", "max_tokens": 128}, "has sequence_length = 2048"),
    ],
)
def test_ranges(options, message):
    with pytest.raises(UsageError, match=message):
        EvaluationText(**options)


# Named corpora.


def test_rows_of_a_raw_file_are_those_of_the_hub(tmp_path, tokenizer):
    """Its rows, as the library datasets makes them: a line with its end, or nothing for a line of white space."""
    directory = tmp_path / "wikitext2"
    directory.mkdir()
    (directory / "test.txt").write_text(" \n = A = \n \n one\u2028two \n \nlast")
    found = load_evaluation(EvaluationText("wikitext2", 2), tokenizer, str(tmp_path))
    text = "\n\n".join(["", " = A = \n", "", " one\u2028two \n", "", "last"])
    assert torch.cat(found.ids).tolist() == [i for w in whole(tokenizer(text).input_ids, 2) for i in w]
    # Those of PTB have no end.
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "validation.txt").write_text(" aer banknote \n pierre n \n")
    found = load_evaluation(EvaluationText("ptb", 2), tokenizer, str(tmp_path))
    stream = tokenizer("aer banknote\n\npierre n").input_ids
    assert torch.cat(found.ids).tolist() == [i for w in whole(stream, 2) for i in w]


def test_local_files_are_looked_for_in_order(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    def read():
        return tokenizer.decode(torch.cat(load_evaluation(EvaluationText("c4", 4), tokenizer, str(tmp_path)).ids))

    directory = tmp_path / "c4"
    with pytest.raises(UsageError) as raised:
        read()
    for suffix in ("jsonl", "parquet", "txt"):
        assert str(directory / f"validation.{suffix}") in str(raised.value)
    directory.mkdir()
    (directory / "validation.txt").write_text("the merge of a layer in txt")
    assert "layer in" in read()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["the window is parquet"]}), directory / "validation.parquet")
    assert "window" in read()
    stored(tmp_path, "c4", "validation", ["a similar layer of jsonl"])
    assert "similar" in read()
    with pytest.raises(UsageError, match=r"looked for .*c4/train\.jsonl"):
        load_evaluation(EvaluationText("c4", split="train"), tokenizer, str(tmp_path))


def test_what_is_asked_of_the_hub(monkeypatch, tokenizer):
    import datasets

    asked = []

    def load_dataset(source, name, split, **options):
        asked.append((source, name, split, options))
        column = "sentence" if "ptb" in source else "text"
        return datasets.Dataset.from_dict({column: [words(40, 1), words(40, 2)], "url": ["", ""]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in CORPORA:
        found = load_evaluation(EvaluationText(name, 8), tokenizer)
        assert ids_of(found) == whole(
            tokenizer(CORPORA[name].separator.join([words(40, 1), words(40, 2)])).input_ids, 8
        )
        assert list(hub_rows(CORPORA[name])) == [words(40, 1), words(40, 2)]
    c4 = {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}}
    expected = [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", {}),
        ("ptb-text-only/ptb_text_only", None, "validation", {"revision": "refs/convert/parquet"}),
        ("allenai/c4", None, "validation", c4),
    ]
    assert asked == [one for one in expected for _ in range(2)]
    documents = load_evaluation(EvaluationText("wikitext2", 8, documents=1), tokenizer)
    assert ids_of(documents) == whole(tokenizer(words(40, 1)).input_ids, 8)


def test_a_corpus_that_cannot_be_fetched_may_be_local(monkeypatch, tokenizer):
    import datasets

    def load_dataset(source, name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UsageError, match=r"no network.*local_data may name a directory with wikitext2/test\.jsonl"):
        load_evaluation(EvaluationText("wikitext2"), tokenizer)


@pytest.mark.shared
@needs_shared
def test_wikitext2_of_the_shared_data(tokenizer):
    """Numbers counted with coreutils: `wc -lc`, and `grep -c '^ *$'` for the lines that are empty rows."""
    from slm_pl.data.named_corpora import corpus_rows

    rows = corpus_rows("wikitext2", CORPORA["wikitext2"], str(SHARED / "data"))
    raw = (SHARED / "data" / "wikitext2" / "test.txt").read_bytes()
    assert len(rows) == 4358
    empty = rows.count("")
    assert empty == 4358 - 2891
    assert (rows[0], rows[1]) == ("", " = Robert Boulter = \n")
    joined = "\n\n".join(rows)
    # The lines as they are, without the two bytes (a space and its end) of each empty one, and the separators.
    assert len(raw) == 1_290_590
    assert len(joined.encode()) == 1_290_590 - 2 * empty + 2 * 4357
    assert len(joined.split()) == len(raw.split()) == 241_211


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize("tokens", [8192, 16384])
def test_preset_cuts_the_recorded_stream_as_the_authors_program(tokens):
    path = SHARED / "reference" / "golden" / "wikitext2_ids.json"
    stream = json.loads(path.read_text())["input_ids"]
    tokenizer = pico_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(49152 - len(tokenizer))])  # SmolLM2's vocabulary size
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(1)  # as SmolLM2's
    text = EvaluationText(preset="shortened_llama", source=str(path), max_tokens=tokens)
    found = load_evaluation(text, tokenizer)
    assert torch.stack(found.ids).tolist() == torch.tensor(stream[:tokens]).view(-1, 128).tolist()
    golden = json.loads((SHARED / "reference" / "golden" / "eval.json").read_text())
    assert golden["protocol"]["ppl"].startswith("shortened-llm eval_ppl: exp(mean CE over all 127 shifted targets")
    assert found.targets == tokens // 128 * 127
    if tokens == 16384:
        assert found.targets == golden["dense"]["scored_tokens"]
