import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slm_pl.evaluation.generation import (
    Examples,
    GenerationProtocol,
    ModelCompletions,
    complete,
    markdown,
    safe_cell,
    to_json,
)
from tests.helpers.run import logits_of

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "A decoder layer that does"


@pytest.fixture
def model(pico_dir):
    return AutoModelForCausalLM.from_pretrained(pico_dir)


@pytest.fixture(scope="module")
def tokenizer(pico_dir):
    return AutoTokenizer.from_pretrained(pico_dir)


def most_likely(model, tokenizer, prompt: str, count: int) -> list[int]:
    """The tokens of the highest logits, found without `generate`."""
    ids = torch.tensor([tokenizer(prompt).input_ids])
    start = ids.shape[1]
    while ids.shape[1] < start + count:
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0, start:].tolist()


def test_takes_the_most_likely_token_each_time(model, tokenizer):
    ids = most_likely(model, tokenizer, PROMPT, 6)
    assert tokenizer.eos_token_id not in ids
    assert complete(model, tokenizer, PROMPT, 6) == tokenizer.decode(ids)
    output = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert complete(model, tokenizer, PROMPT, 6) == tokenizer.decode(output[0]).removeprefix(PROMPT)


def test_settings_of_the_checkpoint_do_not_change_the_protocol(model, tokenizer):
    plain = complete(model, tokenizer, PROMPT, 12)
    settings = model.generation_config
    settings.do_sample, settings.num_beams = True, 3
    settings.repetition_penalty, settings.no_repeat_ngram_size = 9.0, 1
    other = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(other[0]).removeprefix(PROMPT) != plain  # they would
    assert complete(model, tokenizer, PROMPT, 12) == plain


def test_ends_at_the_end_of_the_text_and_leaves_special_tokens_out(model, tokenizer):
    ids = most_likely(model, tokenizer, PROMPT, 6)
    end = next(n for n in range(1, 6) if ids[n] not in ids[:n])
    model.generation_config.eos_token_id = ids[end]
    assert complete(model, tokenizer, PROMPT, 6) == tokenizer.decode(ids[: end + 1])
    with torch.no_grad():  # a tokenizer's own end token is not shown
        head = torch.zeros_like(model.lm_head.weight)
        head[tokenizer.eos_token_id] = 1
        model.lm_head.weight.copy_(head * model.model(tokenizer(PROMPT, return_tensors="pt").input_ids)[0][0, -1])
    assert complete(model, tokenizer, PROMPT, 1) == ""


def test_leaves_every_module_in_the_mode_it_was(model, tokenizer):
    model.train()
    model.model.layers[2].eval()
    before = [module.training for module in model.modules()]
    complete(model, tokenizer, PROMPT, 1)
    assert [module.training for module in model.modules()] == before


def make_examples(*completions: tuple[str, ...], labels: tuple[str, ...] = ("dense", "pruned")) -> Examples:
    prompts = (
        {"prompt": "Below is: Add.\n1 2", "instruction": "Add.", "input": "1 2"},
        {"prompt": "Once upon", "instruction": "", "input": ""},
    )
    plans = (None, "0123456789abcdef")
    models = (
        ModelCompletions(label, f"models/{label}", 2_000_000 - n, plans[n], texts)
        for n, (label, texts) in enumerate(zip(labels, completions, strict=True))
    )
    return Examples(GenerationProtocol(5, "float32", "32-true"), prompts, tuple(models))


def test_table_has_a_row_for_each_prompt_and_a_column_for_each_model():
    text = markdown(make_examples(("three", "a time"), ("3\n", "")))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table == [
        "| Prompt | dense | pruned |",
        "|---|---|---|",
        "| Add.<br>1 2 | three | 3 |",
        "| Once upon | a time | *(nothing)* |",
    ]
    assert "at most 5 new tokens, float32" in text
    assert "- dense: models/dense, 2.0 M parameters, no plan" in text
    assert "- pruned: models/pruned, 2.0 M parameters, plan 0123456789ab" in text


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a | b", "a &#124; b"),
        (" one\ntwo\r\n\nthree\n", "one<br>two<br><br>three"),
        ("<script> & </td>", "&lt;script&gt; &amp; &lt;/td&gt;"),
        ("`code` \\| *b* _i_ ~~s~~ [x](y) $m$", None),
        ("x\u2028y\x0bz", "x<br>y<br>z"),
        ("bell\x07 \x1b[31mred\x00", "bell\ufffd \ufffd&#91;31mred\ufffd"),
        ("naïve 日本 👩‍💻", "naïve 日本 👩‍💻"),
    ],
)
def test_cells_are_text_and_no_markup(text, cell):
    import html

    shown = safe_cell(text)
    assert cell is None or shown == cell
    assert not set(shown) & set("\\`*_[]~|$\n\r")
    # What a reader sees is what was written.
    if "\n" not in text and text.isprintable():
        assert html.unescape(shown) == text


def test_a_hostile_completion_and_label_leave_the_table_whole():
    hostile = "| x |\n|---|\n```\n</table><img src=x onerror=y>"
    text = markdown(make_examples((hostile, "a"), ("b", "c"), labels=("den|se", "<b>")))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert {line.count("|") for line in table} == {4}
    assert "<img" not in text
    assert "```" not in text
    assert table[0] == "| Prompt | den&#124;se | &lt;b&gt; |"


def test_json_holds_everything_as_it_was():
    hostile = '| "x" |\n日本 \x1b'
    record = json.loads(to_json(make_examples((hostile, "a"), ("b", "c"))))
    assert list(record) == ["schema_version", "protocol", "prompts", "models"]
    assert record["schema_version"] == 1
    assert record["protocol"] == {
        "max_new_tokens": 5,
        "dtype": "float32",
        "precision": "32-true",
        "decoding": "greedy",
    }
    assert record["prompts"][0] == {"prompt": "Below is: Add.\n1 2", "instruction": "Add.", "input": "1 2"}
    assert record["models"][0] == {
        "label": "dense",
        "source": "models/dense",
        "num_parameters": 2_000_000,
        "plan_sha256": None,
        "completions": [hostile, "a"],
    }
    assert record["models"][1]["plan_sha256"] == "0123456789abcdef"
