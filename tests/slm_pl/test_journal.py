"""Finished figures of a test that was killed."""

import json
import math

import pytest

from callbacks import Perplexity
from slm_pl.data import EvaluationText, load_evaluation
from slm_pl.evaluation.perplexity import PerplexityResult
from slm_pl.journal import NAME, Journal
from slm_pl.module import LoRA
from slm_pl.results import Results
from tests.helpers.run import make_module, make_trainer

TEXTS = [EvaluationText(sequence_length=length, max_tokens=256) for length in (16, 32)]
FIGURE = PerplexityResult("text", 16, "none", 240, 2.5, math.nan)


def test_figures_are_found_for_the_same_question_model_and_content(tmp_path):
    journal = Journal(tmp_path, {"model": "a"}).open()
    assert journal.find(["text", 16], PerplexityResult) is None
    journal.keep(["text", 16], FIGURE)
    again = Journal(tmp_path, {"model": "a"}).open()
    found = again.find(["text", 16], PerplexityResult)
    assert (found.value, found.tokens, again.found) == (2.5, 240, 1)
    assert math.isnan(found.stderr)
    assert again.find(["text", 32], PerplexityResult) is None
    assert Journal(tmp_path, {"model": "b"}).open().find(["text", 16], PerplexityResult) is None
    path = tmp_path / NAME
    whole = path.read_text()
    for damaged in (whole.replace("2.5", "3.5"), whole[:-9], "[]", ""):
        path.write_text(damaged)
        assert Journal(tmp_path, {"model": "a"}).open().find(["text", 16], PerplexityResult) is None
    path.write_text(whole)
    again.close()
    assert not path.exists()


def test_a_test_that_was_broken_off_measures_only_what_is_missing(pico_dir, tmp_path, monkeypatch):
    import callbacks.perplexity as hook

    measured, real = [], hook.perplexity

    def measure(model, windows, corpus, batch_size):
        measured.append(windows.sequence_length)
        if len(measured) == 2:
            raise KeyboardInterrupt  # the second text is not finished
        return real(model, windows, corpus, batch_size=batch_size)

    monkeypatch.setattr(hook, "perplexity", measure)

    def test(run, overwrite=False):
        make_trainer(run, Perplexity(TEXTS), overwrite=overwrite).test(
            make_module(pico_dir), dataloaders=[0], verbose=False
        )

    with pytest.raises(SystemExit):
        test(tmp_path)
    assert measured == [16, 32]
    assert len(json.loads((tmp_path / NAME).read_text())["parts"]) == 1
    test(tmp_path)
    assert measured == [16, 32, 32]
    assert not (tmp_path / NAME).exists()
    found = Results.load(tmp_path / "results.json").perplexity
    test(tmp_path / "whole")
    assert found == Results.load(tmp_path / "whole" / "results.json").perplexity
    assert measured == [16, 32, 32, 16, 32]


def test_overwrite_and_other_settings_measure_anew(pico_dir, tmp_path):
    def leave(**options):
        """What a killed test leaves: a figure that is wrong, so that its use would show."""
        module = make_module(pico_dir, **options)
        trainer = make_trainer(tmp_path, overwrite=True)
        trainer.test(module, dataloaders=[0], verbose=False)
        journal = module.journal
        windows = load_evaluation(TEXTS[0], module.tokenizer)
        corpus = TEXTS[0].protocol().label
        journal.keep([corpus, windows.sha256, windows.protocol, 4], FIGURE)
        (tmp_path / "results.json").unlink()

    def value(overwrite=False, **options):
        trainer = make_trainer(tmp_path, Perplexity(TEXTS[:1]), overwrite=overwrite)
        trainer.test(make_module(pico_dir, **options), dataloaders=[0], verbose=False)
        found = Results.load(tmp_path / "results.json").perplexity[0].value
        (tmp_path / "results.json").unlink()
        return found

    leave()
    assert value() == FIGURE.value  # else the rest shows nothing
    leave()
    assert value(overwrite=True) != FIGURE.value
    leave()
    assert value(lora=LoRA(r=2, alpha=32)) != FIGURE.value


def test_a_disk_that_takes_no_journal_costs_no_figure(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="is not kept for the case that this test is stopped"):
        Journal(tmp_path / "file", {}).keep(["text"], FIGURE)
