import importlib.util
import json
import logging
import math
import random
import socket

import pytest
import torch

from slm_pl.errors import UsageError
from slm_pl.evaluation import EMBEDDED_TASK, SEVEN_TASKS, zero_shot
from tests.helpers.shared import SHARED
from tests.helpers.tokenizer import pico_tokenizer
from tests.slm_pl.evaluation.pico import pico_llama

LM_EVAL_DATA = SHARED / "data" / "lm_eval"

PIQA = [
    {"goal": "Open a jar", "sol1": "turn the lid", "sol2": "turn the table and the lid", "label": 0},
    {"goal": "Warm your hands", "sol1": "rub snow on them", "sol2": "rub them", "label": 1},
    {"goal": "Keep bread fresh", "sol1": "put it in a bag", "sol2": "put it in a bath", "label": 0},
    {"goal": "Find your keys", "sol1": "sell the house", "sol2": "look in every pocket of the coat", "label": 1},
    {"goal": "Clean a window", "sol1": "use mud", "sol2": "use water", "label": 1},
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("the network is off in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def piqa(tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    return str(tmp_path)


def _log_likelihood(model, tokenizer, context, continuation):
    """Sum of the continuation's token log-probabilities, one question at a time and without padding."""
    ids = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids)))


def test_accuracy_of_local_piqa(piqa):
    model, tokenizer = pico_llama().eval(), pico_tokenizer()
    acc, acc_norm = [], []
    for row in PIQA:
        choices = [row["sol1"], row["sol2"]]
        scores = [_log_likelihood(model, tokenizer, f"Question: {row['goal']}\nAnswer:", f" {one}") for one in choices]
        by_length = [score / len(one) for score, one in zip(scores, choices, strict=True)]
        acc.append(scores.index(max(scores)) == row["label"])
        acc_norm.append(by_length.index(max(by_length)) == row["label"])
    # Only then does the comparison say anything about which metric is reported.
    assert 0 < sum(acc) < len(PIQA)
    assert sum(acc) != sum(acc_norm)

    result = zero_shot(model, tokenizer, ["piqa"], local_data=piqa)
    task = result.tasks["piqa"]
    assert (task.metric, task.n) == ("acc", 5)
    assert task.value == pytest.approx(sum(acc) / 5)
    assert task.all == {"acc": pytest.approx(sum(acc) / 5), "acc_norm": pytest.approx(sum(acc_norm) / 5)}
    p = sum(acc) / 5
    assert task.stderr == pytest.approx(math.sqrt(p * (1 - p) / 4))
    assert (result.mean, result.mean_stderr) == (task.value, pytest.approx(task.stderr))
    assert result.harness.startswith("lm_eval 0.4")
    assert result.batch_size == 8


def test_limit_and_several_tasks(piqa):
    result = zero_shot(pico_llama(), pico_tokenizer(), ["piqa", EMBEDDED_TASK], local_data=piqa, limit=4, batch_size=3)
    a, b = result.tasks["piqa"], result.tasks[EMBEDDED_TASK]
    assert list(result.tasks) == ["piqa", EMBEDDED_TASK]
    assert (a.n, b.n, b.metric) == (4, 4, "acc")
    assert result.mean == pytest.approx((a.value + b.value) / 2)
    assert result.mean_stderr == pytest.approx(math.hypot(a.stderr, b.stderr) / 2)
    assert (result.limit, result.batch_size, result.num_fewshot) == (4, 3, 0)


def test_embedded_task_asks_which_function_a_text_describes(monkeypatch):
    from slm_pl.data import embedded

    rows = embedded.docstring_choices("heldout")[:6]
    monkeypatch.setattr(embedded, "docstring_choices", lambda split: rows if split == "heldout" else [])
    model, tokenizer = pico_llama().eval(), pico_tokenizer()
    right = 0
    for row in rows:
        contexts = [f"Documentation of the Python function `{name}`:" for name in row["choices"]]
        scores = [_log_likelihood(model, tokenizer, context, f" {row['description']}") for context in contexts]
        right += scores.index(max(scores)) == row["label"]
    task = zero_shot(model, tokenizer, [EMBEDDED_TASK]).tasks[EMBEDDED_TASK]
    assert task.n == 6
    assert task.value == pytest.approx(right / 6)
    assert set(task.all) == {"acc"}


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_adapted_model_and_nothing_is_changed(piqa):
    from peft import LoraConfig, get_peft_model

    base = pico_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    plain = zero_shot(base, pico_tokenizer(), ["piqa"], local_data=piqa)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).train()
    model.base_model.model.model.layers[0].eval()
    tokenizer = pico_tokenizer()
    tokenizer.pad_token = None
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    random.seed(3)
    torch.manual_seed(3)
    states = random.getstate(), torch.random.get_rng_state()
    level = logging.getLogger("lm_eval").level

    adapted = zero_shot(model, tokenizer, ["piqa"], local_data=piqa)

    # A fresh adapter adds nothing to the base model's outputs.
    assert adapted.tasks == plain.tasks
    after = model.state_dict()
    assert {name: value.data_ptr() for name, value in after.items()} == {name: at for name, (at, _) in before.items()}
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert tokenizer.pad_token is None
    assert random.getstate() == states[0]
    assert torch.equal(torch.random.get_rng_state(), states[1])
    assert logging.getLogger("lm_eval").level == level


def test_missing_files_are_listed(piqa):
    with pytest.raises(UsageError) as caught:
        zero_shot(pico_llama(), pico_tokenizer(), ["piqa", "boolq", "arc_easy"], local_data=piqa)
    message = str(caught.value)
    assert f"{piqa}/boolq/validation.jsonl" in message
    assert f"{piqa}/arc_easy/test.jsonl" in message
    assert "piqa/validation" not in message


def test_another_split_never_stands_in_for_the_asked_one(tmp_path):
    (tmp_path / "arc_easy").mkdir()
    row = {"id": "1", "question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    (tmp_path / "arc_easy" / "validation.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=r"arc_easy/test\.jsonl"):
        zero_shot(pico_llama(), pico_tokenizer(), ["arc_easy"], local_data=str(tmp_path))


@pytest.mark.parametrize("text", ['{"goal": "Open a jar"}\n', "no json\n", ""])
def test_files_that_cannot_be_used(tmp_path, text):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text(text)
    with pytest.raises(UsageError, match=r"piqa cannot be used for the task 'piqa'"):
        zero_shot(pico_llama(), pico_tokenizer(), ["piqa"], local_data=str(tmp_path))


def test_unknown_task_names_close_ones(piqa):
    with pytest.raises(UsageError, match="Did you mean.*'hellaswag'"):
        zero_shot(pico_llama(), pico_tokenizer(), ["helaswag"], local_data=piqa)


def test_failed_download_points_to_local_data(monkeypatch):
    import datasets

    def refuse(**_):
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UsageError, match="Couldn't reach.*local_data"):
        zero_shot(pico_llama(), pico_tokenizer(), ["piqa"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "got no tasks"),
        ({"limit": 0}, "limit 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": "large"}, "'auto' or a number"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(UsageError, match=message):
        zero_shot(pico_llama(), pico_tokenizer(), **arguments)


@pytest.mark.shared
@pytest.mark.skipif(not LM_EVAL_DATA.is_dir(), reason=f"the seven tasks' data are not in {LM_EVAL_DATA}")
def test_seven_tasks():
    result = zero_shot(pico_llama(), pico_tokenizer(), SEVEN_TASKS, local_data=str(LM_EVAL_DATA), limit=2)
    assert {name: (task.metric, task.n) for name, task in result.tasks.items()} == {
        "boolq": ("acc", 2),
        "piqa": ("acc", 2),
        "hellaswag": ("acc_norm", 2),
        "winogrande": ("acc", 2),
        "arc_easy": ("acc", 2),
        "arc_challenge": ("acc_norm", 2),
        "openbookqa": ("acc_norm", 2),
    }
    assert all(task.value in (0, 0.5, 1) and task.all[task.metric] == task.value for task in result.tasks.values())
    assert result.mean == pytest.approx(sum(task.value for task in result.tasks.values()) / 7)
