import hashlib
import importlib.util
import json
import logging
import math
import os
import random
import re
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from slm_pl.errors import UsageError
from slm_pl.evaluation import EMBEDDED_TASK, SEVEN_TASKS, TaskResult, zero_shot
from slm_pl.evaluation.harness import check_tasks, task_files
from slm_pl.evaluation.zero_shot import mean_of_tasks
from tests.helpers.ranks import in_two_processes
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
    connect = socket.socket.connect

    def refuse(*what):
        if isinstance(what[0], socket.socket) and what[0].family == socket.AF_UNIX:
            return connect(*what)  # to a process of this machine
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
    assert set(task.stderrs) == {"acc", "acc_norm"}
    assert (task.num_fewshot, task.version, task.data) == (0, "1.0", "local")
    assert (result.dtype, result.chat_template, result.mean_of, result.cached) == ("float32", False, ["piqa"], False)
    assert (result.mean, result.mean_stderr) == (task.value, pytest.approx(task.stderr))
    assert result.harness.startswith("lm_eval 0.4")
    assert result.batch_size == 8


def test_prompts_that_are_cut_are_told_once_and_what_concerns_nobody_is_not(tmp_path, caplog):
    rows = [{**row, "goal": f"{row['goal']} " + "with both hands " * 60} for row in PIQA]
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = pico_llama(context=64)
    zero_shot(model.eval(), pico_tokenizer(), ["piqa"], local_data=str(tmp_path), num_fewshot=0)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("lm_eval")]
    (cut,) = told
    assert re.match(r"Combined length of context .* exceeds model's maximum length \(64\)\. Truncating \d+", cut)
    assert cut.endswith("Further prompts that are cut are not told.")
    zero_shot(model.eval(), pico_tokenizer(), ["piqa"], local_data=str(tmp_path), limit=1)  # of the next call again
    assert len([record for record in caplog.records if record.name.startswith("lm_eval")]) == 2


def _harness_figures(folder, tasks, data, limit, **options):
    """lm-eval's own program in this process: its loading of an export, its task index, its own local files."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    stock = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    include = folder / "include"
    include.mkdir()
    for name in tasks:
        splits = {path.stem: str(path) for path in sorted((Path(data) / name).glob("*.jsonl"))}
        absent = [split for split in ("training", "test") if {"training": "train"}.get(split, split) not in splits]
        lines = [f"include: {stock / name / name}.yaml", f"task: {name}", "dataset_path: json", "dataset_name: null"]
        lines += [f"{split}_split: null" for split in absent]
        (include / f"{name}.yaml").write_text(
            "\n".join([*lines, f"dataset_kwargs: {{data_files: {json.dumps(splits)}}}"])
        )
    manager = TaskManager(include_path=str(include), include_defaults=False)
    arguments = f"pretrained={folder / 'model'},dtype=float32"
    return simple_evaluate(
        "hf", arguments, tasks, device="cpu", batch_size=8, limit=limit, task_manager=manager, **options
    )


def _saved(folder):
    model, tokenizer = pico_llama(), pico_tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return model, tokenizer


def test_figures_are_those_of_lm_evals_own_program_with_solved_examples(tmp_path, piqa):
    (Path(piqa) / "piqa" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA[::-1]))
    model, tokenizer = _saved(tmp_path)
    expected = _harness_figures(tmp_path, ["piqa"], piqa, 4, num_fewshot=2)
    samples = {}
    result = zero_shot(model, tokenizer, ["piqa"], local_data=piqa, limit=4, num_fewshot=2, on_samples=samples.update)
    task = result.tasks["piqa"]
    theirs = expected["results"]["piqa"]
    assert {f"{name},none": value for name, value in task.all.items()} == {
        name: theirs[name] for name in ("acc,none", "acc_norm,none")
    }
    assert task.stderr == theirs["acc_stderr,none"]
    assert (task.num_fewshot, result.num_fewshot) == (2, 2)
    # Not only how many are right: every likelihood to its last bit, and every prompt.
    assert [one["resps"] for one in samples["piqa"]] == [one["resps"] for one in expected["samples"]["piqa"]]
    assert [one["arguments"] for one in samples["piqa"]] == [one["arguments"] for one in expected["samples"]["piqa"]]
    assert samples["piqa"][0]["arguments"][0][0].count("Question:") == 3


def test_solved_examples_need_their_own_split(piqa):
    with pytest.raises(UsageError, match=r"lacks [^,]*piqa/train\.jsonl\."):
        zero_shot(pico_llama(), pico_tokenizer(), ["piqa"], local_data=piqa, num_fewshot=1)


def test_a_task_file_of_ones_own(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    (tmp_path / "mine.yaml").write_text(
        f"""task: household
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{goal}}}}:"
doc_to_choice: "{{{{[sol1, sol2]}}}}"
doc_to_target: label
metric_list: [{{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
"""
    )
    model, tokenizer = pico_llama().eval(), pico_tokenizer()
    right = 0
    for row in PIQA:
        choices = [row["sol1"], row["sol2"]]
        scores = [_log_likelihood(model, tokenizer, f"{row['goal']}:", f" {one}") / len(one) for one in choices]
        right += scores.index(max(scores)) == row["label"]
    result = zero_shot(model, tokenizer, [str(tmp_path / "mine.yaml")])
    assert list(result.tasks) == ["household"]
    task = result.tasks["household"]
    assert (task.metric, task.n, task.data) == ("acc_norm", 5, "json")
    assert task.value == pytest.approx(right / 5)


def _task_file(folder, name, rows, lines):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\n"
    (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{lines}")
    return str(folder / f"{name}.yaml")


def test_a_task_of_answers_in_words_read_in_two_ways(tmp_path):
    model, tokenizer = pico_llama().eval(), pico_tokenizer()
    rows = []
    for place, row in enumerate(PIQA):
        ids = tokenizer(row["goal"], return_tensors="pt")["input_ids"]
        written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        words = tokenizer.decode(written, skip_special_tokens=True).split()
        rows.append({"goal": row["goal"], "answer": words[0] if place < 3 else words[-1] if place < 4 else "no word"})
    lines = r"""output_type: generate_until
doc_to_text: "{{goal}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["never written"], max_gen_toks: 8, do_sample: false}
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: '(\S+)'}, {function: take_first}]}
  - {name: last, filter: [{function: regex, regex_pattern: '(\S+)', group_select: -1}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
    result = zero_shot(model, tokenizer, [_task_file(tmp_path, "words", rows, lines)], batch_size=1)
    task = result.tasks["words"]
    assert 3 / 5 <= task.all["exact_match,first"] < 1
    assert 1 / 5 <= task.all["exact_match,last"] < 1
    assert set(task.all) == {"exact_match,first", "exact_match,last"}
    assert (task.metric, task.value) == ("exact_match,first", task.all["exact_match,first"])
    assert result.mean_of == ["words"]


def test_a_task_that_is_no_share_of_right_answers_is_in_no_mean(tmp_path):
    model, tokenizer = pico_llama().eval(), pico_tokenizer()
    lines = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{goal}}"
metric_list: [{metric: word_perplexity}]
"""
    result = zero_shot(model, tokenizer, [_task_file(tmp_path, "text", PIQA, lines)])
    losses = []
    for row in PIQA:
        ids = [tokenizer.bos_token_id, *tokenizer(row["goal"])["input_ids"]]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses.append(-sum(float(scores[i - 1, ids[i]]) for i in range(1, len(ids))))
    words = sum(len(row["goal"].split()) for row in PIQA)
    assert result.tasks["text"].value == pytest.approx(math.exp(sum(losses) / words), rel=1e-4)
    assert result.mean_of == []
    assert math.isnan(result.mean)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no task file"), ("a: [", "cannot be read"), ("group: x\ntask: [y]", "no `task: NAME`")],
)
def test_task_files_that_cannot_be_used(tmp_path, text, message):
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        check_tasks([str(tmp_path / "mine.yaml")])


def test_a_group_is_one_figure_made_of_its_tasks(tmp_path):
    names = sorted(task_files(["mmlu_humanities"]))
    assert len(names) == 13
    for place, name in enumerate(names):
        (tmp_path / name).mkdir()
        for split, rows in (("test", 2 + place % 3), ("dev", 2)):
            lines = [
                {"question": f"{name} {split} {row}", "subject": name, "choices": list("abcd"), "answer": row % 4}
                for row in range(rows)
            ]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = zero_shot(
        pico_llama(),
        pico_tokenizer(),
        ["mmlu_humanities", EMBEDDED_TASK],
        local_data=str(tmp_path),
        limit=4,
        num_fewshot={"mmlu_humanities": 1},
    )
    assert list(result.tasks) == ["mmlu_humanities", EMBEDDED_TASK]
    group = result.tasks["mmlu_humanities"]
    sizes = {name: 2 + place % 3 for place, name in enumerate(names)}
    assert group.n == sum(sizes.values())
    assert group.subtasks.keys() == sizes.keys()
    # The harness weighs the tasks of this group by their questions.
    assert group.value == pytest.approx(sum(group.subtasks[name] * size for name, size in sizes.items()) / group.n)
    assert (group.num_fewshot, result.tasks[EMBEDDED_TASK].num_fewshot, result.num_fewshot) == (1, 0, None)
    assert result.mean == pytest.approx((group.value + result.tasks[EMBEDDED_TASK].value) / 2)
    (tmp_path / names[3] / "dev.jsonl").unlink()
    with pytest.raises(UsageError, match=rf"{names[3]}/dev\.jsonl"):
        check_tasks(["mmlu_humanities"], str(tmp_path), 1)
    check_tasks(["mmlu_humanities"], str(tmp_path), 0)
    with pytest.raises(UsageError, match="asked for twice"):
        check_tasks(["mmlu_humanities", names[0]])


def test_the_hash_of_what_was_asked(tmp_path, piqa):
    def asked(data=piqa, limit=4, **options):
        return zero_shot(pico_llama(), pico_tokenizer(), ["piqa"], local_data=data, limit=limit, **options)

    first = asked().tasks["piqa"].requests_sha256
    lines = []
    for row in PIQA[:4]:
        context = f"Question: {row['goal']}\nAnswer:"
        lines += [json.dumps(["loglikelihood", context, f" {row[name]}"]) + "\n" for name in ("sol1", "sol2")]
    # Both metrics ask for the same: with and without the length of a choice.
    assert first == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert asked(batch_size=1).tasks["piqa"].requests_sha256 == first
    assert asked(limit=3).tasks["piqa"].requests_sha256 != first


def test_cached_figures(piqa, monkeypatch, tmp_path):
    monkeypatch.setenv("SLM_PL_CACHE", str(tmp_path / "cache"))
    model, tokenizer = pico_llama(), pico_tokenizer()

    def ask(**options):
        seen = {}
        options = {"limit": 4, "cache": True, **options}
        return zero_shot(model, tokenizer, ["piqa"], local_data=piqa, on_samples=seen.update, **options), seen

    first, samples = ask()
    again, same = ask()
    assert (first.cached, again.cached) == (False, True)
    assert again == replace(first, cached=True)
    assert json.loads(json.dumps(samples, default=str)) == same
    assert not ask(limit=5)[0].cached  # the same questions, another protocol
    assert not ask(batch_size=2)[0].cached
    assert not ask(limit=3)[0].cached
    assert not ask(cache=False)[0].cached
    file = Path(piqa) / "piqa" / "validation.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "label": 1 - row["label"]}) + "\n" for row in rows))
    corrected, _ = ask()
    assert not corrected.cached  # the same questions, other answers
    assert corrected.tasks["piqa"].requests_sha256 == first.tasks["piqa"].requests_sha256
    assert corrected.mean == pytest.approx(1 - first.mean)
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-4
    assert not ask()[0].cached


def test_a_cache_that_cannot_be_written_costs_no_figures(piqa, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("SLM_PL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not kept for the next time.*Cannot write"):
        result = zero_shot(pico_llama(), pico_tokenizer(), ["piqa"], local_data=piqa, cache=True)
    assert result.tasks["piqa"].n == 5


def test_chat_template(piqa):
    tokenizer = pico_tokenizer()
    with pytest.raises(UsageError, match="this tokenizer has none"):
        zero_shot(pico_llama(), tokenizer, ["piqa"], local_data=piqa, chat_template=True)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    samples = {}
    result = zero_shot(
        pico_llama(), tokenizer, ["piqa"], local_data=piqa, chat_template=True, on_samples=samples.update
    )
    assert result.chat_template
    prompt = samples["piqa"][0]["arguments"][0][0]
    assert prompt.startswith(f"<user>Question: {PIQA[0]['goal']}")
    assert "<assistant>" in prompt


def _ask_together(rank, directory):
    samples = {}
    result = zero_shot(
        pico_llama(),
        pico_tokenizer(),
        ["piqa", EMBEDDED_TASK],
        local_data=directory,
        limit=5,
        num_fewshot={"piqa": 1},
        batch_size=1,
        on_samples=samples.update,
    )
    alone = zero_shot(pico_llama(), pico_tokenizer(), ["piqa"], local_data=directory, limit=1)
    record = {"result": asdict(result), "asked": {name: len(one) for name, one in samples.items()}, "one": alone.mean}
    os.environ["SLM_PL_CACHE"] = str(Path(directory, "cache"))
    seen = []
    again = [
        zero_shot(pico_llama(), pico_tokenizer(), ["piqa"], directory, cache=True, on_samples=seen.append).cached
        for _ in range(2)
    ]
    record |= {"cached": again, "seen": len(seen)}
    broken = pico_llama()
    broken.forward = None if rank else broken.forward
    try:
        zero_shot(broken, pico_tokenizer(), ["piqa"], directory)
    except Exception as error:
        record["failure"] = str(error)
    record["order"] = [one["doc_id"] for one in samples.get("piqa", [])]
    record["resps"] = [one["resps"] for one in samples.get("piqa", [])]
    Path(directory, f"rank{rank}.json").write_text(json.dumps(record))


@pytest.mark.long
def test_two_processes_share_the_questions(piqa):
    (Path(piqa) / "piqa" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA[::-1]))
    in_two_processes(_ask_together, piqa)
    first, second = (json.loads(Path(piqa, f"rank{rank}.json").read_text()) for rank in (0, 1))
    samples = {}
    alone = zero_shot(
        pico_llama(),
        pico_tokenizer(),
        ["piqa", EMBEDDED_TASK],
        local_data=piqa,
        limit=5,
        num_fewshot={"piqa": 1},
        batch_size=1,
        on_samples=samples.update,
    )
    assert first["result"] == asdict(alone)
    assert second["result"] == first["result"]
    assert first["asked"] == {"piqa": 5, EMBEDDED_TASK: 5}
    assert second["asked"] == {}
    assert first["order"] == [0, 1, 2, 3, 4]
    assert first["resps"] == json.loads(json.dumps([one["resps"] for one in samples["piqa"]]))
    assert [one["cached"] for one in (first, second)] == [[False, True]] * 2
    assert [one["seen"] for one in (first, second)] == [2, 0]
    # The failure of one process is that of all: none waits for it in vain.
    assert "not callable" in second["failure"]
    assert "not callable" in first["failure"]
    # One question for two processes.
    one = zero_shot(pico_llama(), pico_tokenizer(), ["piqa"], local_data=piqa, limit=1).mean
    assert first["one"] == second["one"] == one


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


def test_solved_examples_of_a_task_that_is_not_asked():
    with pytest.raises(UsageError, match="num_fewshot names boolq, but the tasks are piqa"):
        check_tasks(["piqa"], num_fewshot={"boolq": 1})


def test_the_usual_tasks_are_known_without_the_harness():
    """What it imports would count as memory of what is measured before."""
    code = "import sys; from slm_pl.evaluation.harness import *; check_tasks([*SEVEN_TASKS, EMBEDDED_TASK]); "
    code += "print({'lm_eval', 'datasets', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


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


def test_other_tasks_beside_the_seven_are_not_in_their_mean():
    def mean(names):
        values = {name: 0.1 * (1 + place) for place, name in enumerate(SEVEN_TASKS)} | {"gsm8k": 0.9, "wikitext": 0.5}
        results = {name: TaskResult("acc", values[name], 0.02, 10, {}) for name in names}
        results |= {name: replace(results[name], metric="word_perplexity") for name in names if name == "wikitext"}
        results |= {
            name: replace(results[name], metric="exact_match,strict-match") for name in names if name == "gsm8k"
        }
        return mean_of_tasks(results)

    names, value, stderr = mean([*SEVEN_TASKS, "gsm8k", "wikitext"])
    assert names == list(SEVEN_TASKS)
    assert value == pytest.approx(0.4)
    assert stderr == pytest.approx(0.02 / math.sqrt(7))
    assert mean(["piqa", "gsm8k", "wikitext"])[:2] == (["piqa", "gsm8k"], pytest.approx((0.2 + 0.9) / 2))
    assert mean(["wikitext"])[0] == []
