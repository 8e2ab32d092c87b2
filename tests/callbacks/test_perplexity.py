import json
import math

import pytest
import torch
import yaml

from callbacks import Perplexity
from slm_pl.cli import main
from slm_pl.data import EvaluationText, load_evaluation
from slm_pl.errors import UsageError
from tests.helpers.run import Drop, alpaca_data, make_module, make_trainer
from tests.helpers.tokenizer import pico_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = "the calibration set is a handful of short pieces of ordinary English prose that layers merge "


@pytest.fixture
def local_data(tmp_path):
    for name, split in (("wikitext2", "test"), ("c4", "validation")):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / f"{split}.txt").write_text((WORDS * 20 + "\n") * 60)
    return str(tmp_path / "data")


def records(run):
    return json.loads((run / "results.json").read_text())


def loss_of(module, windows):
    """Mean over all targets, from the logits of each window."""
    losses = []
    with torch.no_grad():
        for ids, context in zip(windows.ids, windows.context, strict=True):
            logits = module.load_model().eval()(ids[None]).logits[0].double()
            losses += [
                float(torch.logsumexp(logits[i - 1], 0) - logits[i - 1, ids[i]]) for i in range(context, len(ids))
            ]
    return sum(losses) / len(losses)


def test_texts_of_a_yaml_file(pico_dir, tmp_path, local_data):
    """As users write them: the quickstart's, presets with and without other settings, a sliding window."""
    texts = [
        {"source": "embedded", "sequence_length": 128, "max_tokens": 4096},
        {"preset": "sleb", "source": "wikitext2", "sequence_length": 64, "max_tokens": 256},
        {"preset": "shortened_llama", "max_tokens": 512},
        {"source": "c4", "documents": 2, "sequence_length": 64, "max_tokens": 200, "stride": 48, "bos": "window"},
    ]
    config = {
        "model": {"pretrained": str(pico_dir)},
        "data": {"path": "embedded"},
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [
                {"class_path": "callbacks.Perplexity", "init_args": {"texts": texts, "local_data": local_data}}
            ],
        },
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config", str(tmp_path / "test.yaml")])
    found = records(tmp_path / "run")
    names = ("corpus", "sequence_length", "bos", "tokens", "stride", "tail")
    assert [tuple(one[name] for name in names) for one in found["perplexity"]] == [
        ("embedded", 128, "none", 32 * 127, None, "drop"),
        ("wikitext2", 64, "none", 4 * 63, None, "drop"),
        ("wikitext2", 128, "stream", 4 * 127, None, "drop"),
        ("c4", 64, "window", 200, 48, "keep"),
    ]
    assert found["missing"] == {}
    for one, text in zip(found["perplexity"], texts, strict=True):
        windows = load_evaluation(EvaluationText(**text), pico_tokenizer(), local_data)
        loss = loss_of(make_module(pico_dir), windows)
        assert one["value"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert one["word_value"] == pytest.approx(math.exp(loss * windows.text_tokens / one["words"]), rel=1e-4)
        assert one["sha256"] == windows.sha256


def test_text_that_is_not_there_is_found_before_the_search(pico_dir, tmp_path, local_data):
    method, hook = Drop([1]), Perplexity([EvaluationText("ptb")], local_data=local_data)
    with pytest.raises(UsageError, match=r"lacks the text 'ptb'; looked for .*ptb/validation\.jsonl"):
        make_trainer(tmp_path, method, hook).test(make_module(pico_dir), alpaca_data(tmp_path), verbose=False)
    assert method.searches == 0
    assert not (tmp_path / "results.json").exists()


def test_texts_are_not_read_where_nothing_is_measured(pico_dir, tmp_path, local_data):
    hook = Perplexity([EvaluationText("ptb")], local_data=local_data)
    make_trainer(tmp_path, Drop([1]), hook).prune(make_module(pico_dir), alpaca_data(tmp_path))
    assert (tmp_path / "plan.json").exists()


def test_broken_model_has_a_reason_instead_of_a_value(pico_dir, tmp_path):
    module = make_module(pico_dir)
    with torch.no_grad():
        module.load_model().model.norm.weight[0] = math.nan
    hook = Perplexity([EvaluationText(sequence_length=16, max_tokens=64)])
    make_trainer(tmp_path, hook).test(module, alpaca_data(tmp_path), verbose=False)
    found = records(tmp_path)
    assert found["perplexity"] == []
    assert "not finite" in found["missing"]["perplexity embedded @ 16"]


def test_batch_size_zero():
    with pytest.raises(UsageError, match="batch_size 0"):
        Perplexity(batch_size=0)
