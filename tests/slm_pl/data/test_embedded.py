import collections
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slm_pl.data import embedded

TOPIC_SPLITS = ("calibration", "train", "heldout")


def long_paragraphs(text):
    """Independent of the module: paragraphs as runs of non-blank lines."""
    found, lines = set(), []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line.strip())
            continue
        paragraph = re.sub(r"\s+", " ", " ".join(lines))
        lines = []
        if len(paragraph) >= 80:
            found.add(paragraph)
    return found


def test_topic_splits_are_all_of_the_topics_once():
    from pydoc_data.topics import topics

    together = [text for split in TOPIC_SPLITS for text in embedded.topic_texts(split)]
    assert sorted(together) == sorted(topics.values())


def test_no_paragraph_occurs_in_two_topic_splits():
    paragraphs = {s: set().union(*map(long_paragraphs, embedded.topic_texts(s))) for s in TOPIC_SPLITS}
    assert all(len(found) > 50 for found in paragraphs.values())
    for one, other in (("calibration", "train"), ("calibration", "heldout"), ("train", "heldout")):
        assert not paragraphs[one] & paragraphs[other]


def test_no_stretch_of_a_hundred_characters_occurs_in_two_topic_splits():
    def stretches(split):
        text = "\0".join(" ".join(text.split()) for text in embedded.topic_texts(split))
        return {piece for start in range(len(text) - 99) if "\0" not in (piece := text[start : start + 100])}

    calibration, train, heldout = map(stretches, TOPIC_SPLITS)
    assert len(heldout) > 40_000
    shared = (calibration & train) | (calibration & heldout) | (train & heldout)
    assert shared == set()


def test_topic_splits_have_usable_sizes():
    assert sum(map(len, embedded.topic_texts("heldout"))) >= 60_000
    assert sum(len(text) >= 1000 for text in embedded.topic_texts("calibration")) >= 20


def test_topic_rule_is_the_documented_one():
    """Stated again for topics that share text with no other."""
    from hashlib import sha256
    from pydoc_data.topics import topics

    for name in ("debugger", "string-methods", "types", "formatstrings", "import"):
        bucket = int(sha256(f"17:{name}".encode()).hexdigest(), 16) % 10
        expected = "calibration" if bucket < 4 else "train" if bucket < 7 else "heldout"
        assert [split for split in TOPIC_SPLITS if topics[name] in embedded.topic_texts(split)] == [expected]


def test_rows_hold_the_docstring_that_the_interpreter_shows():
    rows = {row["name"]: row for split in ("train", "heldout") for row in embedded.docstring_rows(split)}
    for module, name in (("shutil", "copytree"), ("textwrap", "dedent"), ("heapq", "merge"), ("bisect", "bisect_left")):
        row = rows[f"{module}.{name}"]
        assert row["instruction"] == f"Describe `{module}.{name}`."
        assert row["input"] == ""
        if name != "bisect_left":  # replaced by a C function at run time
            assert row["output"] == inspect.getdoc(getattr(importlib.import_module(module), name))


def test_row_splits_do_not_overlap():
    train, heldout = embedded.docstring_rows("train"), embedded.docstring_rows("heldout")
    outputs = [" ".join(row["output"].split()) for row in train + heldout]
    names = [row["name"] for row in train + heldout]
    assert len(set(outputs)) == len(outputs)
    assert len(set(names)) == len(names)
    assert 0.7 < len(train) / len(names) < 0.9
    assert len(train) > 1000
    assert min(len(row["output"]) for row in train + heldout) >= 40
    assert not any(name.rpartition(".")[2].startswith("_") for name in names)


def test_training_rows_share_no_paragraph_with_heldout_topics():
    heldout = set().union(*map(long_paragraphs, embedded.topic_texts("heldout")))
    train = set().union(*(long_paragraphs(row["output"]) for row in embedded.docstring_rows("train")))
    assert len(train) > 500
    assert not heldout & train


def test_training_row_with_a_heldout_paragraph_is_left_out(monkeypatch):
    victim = next(row for row in embedded.docstring_rows("train") if long_paragraphs(row["output"]))
    monkeypatch.setattr(embedded, "topic_texts", lambda split: [victim["output"]])
    names = embedded._docstrings_of.__wrapped__("train").keys()
    assert victim["name"] not in names
    assert len(names) > 1000


def test_choices_have_one_right_answer():
    questions = embedded.docstring_choices()
    rows = {row["name"]: " ".join(row["output"].split()) for row in embedded.docstring_rows("heldout")}
    assert len(questions) >= 100
    for question in questions:
        description, choices = question["description"], question["choices"]
        right = choices[question["label"]]
        assert len(choices) == len(set(choices)) == 4
        assert rows[right].startswith(description)
        assert not re.search(rf"\b{right.split('.')[-1]}\b", description, re.IGNORECASE)
        for wrong in set(choices) - {right}:
            assert not rows[wrong].startswith(description)
            assert wrong.split(".")[-1] != right.split(".")[-1]


def test_choices_cannot_be_guessed_from_position_or_frequency():
    questions = embedded.docstring_choices()
    positions = collections.Counter(question["label"] for question in questions)
    assert set(positions) == {0, 1, 2, 3}
    assert max(positions.values()) - min(positions.values()) <= 1
    offered = collections.Counter(choice for question in questions for choice in question["choices"])
    assert max(offered.values()) <= 3 * min(offered.values())
    assert len({question["choices"][question["label"]] for question in questions[:25]}) == 25


def test_another_process_finds_the_same_quickly_and_imports_no_module_of_the_list():
    code = (
        "import importlib.util, json, sys, time\n"
        # by its file: the package would bring torch
        "spec = importlib.util.spec_from_file_location('embedded', 'slm_pl/data/embedded.py')\n"
        "embedded = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(embedded)\n"
        "before = set(sys.modules)\n"
        "start = time.perf_counter()\n"
        "fingerprint = embedded.fingerprint()\n"
        "seconds = time.perf_counter() - start\n"
        "imported = sorted((set(sys.modules) - before) & set(embedded._MODULES))\n"
        "print(json.dumps([fingerprint, seconds, imported]))\n"
    )
    # PYTHONHASHSEED: the order of sets must not matter
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    root = Path(__file__).parents[3]
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, env=environment
    )
    fingerprint, seconds, imported = json.loads(run.stdout)
    assert fingerprint == embedded.fingerprint()
    assert imported == []
    assert seconds < 15, "about 1.5 seconds on an idle core"


def test_fingerprint_depends_on_the_text(monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{64}", embedded.fingerprint())
    monkeypatch.setattr(embedded, "topic_texts", lambda split: ["other text"])
    assert embedded.fingerprint.__wrapped__() != embedded.fingerprint()


def test_a_module_that_is_absent_is_skipped():
    assert embedded._source_of("no_such_module_anywhere") is None
    assert embedded._source_of("shutil.no_such_part") is None
    assert "def copytree" in embedded._source_of("shutil")


def test_topics_are_quick():
    embedded._topics_by_split.cache_clear()
    start = time.perf_counter()
    embedded.topic_texts("train")
    assert time.perf_counter() - start < 5, "about a tenth of a second on an idle core"


def test_python_without_topics_is_named(monkeypatch):
    from slm_pl.errors import UsageError

    embedded._topics.cache_clear()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    try:
        with pytest.raises(UsageError, match="without `pydoc_data`.*give a text of your own"):
            embedded._topics()
    finally:
        embedded._topics.cache_clear()
