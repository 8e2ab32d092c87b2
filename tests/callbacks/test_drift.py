import json
import math
import shutil
import weakref

import pytest
import torch
import yaml
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM

import callbacks.drift
from callbacks import Drift, ExportCheckpoint
from slm_pl.cli import main
from slm_pl.data import EvaluationText, load_evaluation
from slm_pl.errors import UsageError
from slm_pl.results import Results
from tests.helpers.pico import pico_model
from tests.helpers.run import Drop, alpaca_data, make_module, make_trainer, without
from tests.helpers.tokenizer import pico_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [
    EvaluationText(sequence_length=32, max_tokens=5 * 32),
    EvaluationText(sequence_length=24, stride=8, max_tokens=60),
]


def record_of(run, pretrained, *callbacks, **options):
    """The record of a test run."""
    trainer = make_trainer(run, *callbacks)
    trainer.test(make_module(pretrained, **options), alpaca_data(run / "data"), verbose=False)
    return Results.load(run / "results.json")


def exported(pretrained, directory, *methods):
    export = ExportCheckpoint(str(directory / "export"))
    make_trainer(directory, *methods, export).prune(make_module(pretrained), alpaca_data(directory / "data"))
    return directory / "export"


@torch.no_grad()
def naive(dense, model, text):
    windows = load_evaluation(text, pico_tokenizer())
    kl, same = [], []
    for ids, context in zip(windows.ids, windows.context, strict=True):
        p, q = (one.eval()(ids[None]).logits[0, context - 1 : -1].double() for one in (dense, model))
        kl += kl_divergence(Categorical(logits=p), Categorical(logits=q)).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).double().tolist()
    return sum(kl) / len(kl), sum(same) / len(same), len(kl)


def test_the_dense_model_is_asked_before_it_is_compressed(pico_dir, tmp_path, monkeypatch):
    loaded = []
    load = callbacks.drift.loading.load_model
    monkeypatch.setattr(callbacks.drift.loading, "load_model", lambda *a: loaded.append(a) or load(*a))
    in_run = record_of(tmp_path / "in_run", pico_dir, Drop([1]), Drop([2]), Drift(TEXTS))
    assert len(loaded) == 1  # of the module itself
    dense, model = AutoModelForCausalLM.from_pretrained(pico_dir), without(pico_dir, 1, 3)
    for text, one in zip(TEXTS, in_run.drift, strict=True):
        kl, same, tokens = naive(dense, model, text)
        assert one.kl == pytest.approx(kl, rel=1e-4)
        assert one.top1_agreement == pytest.approx(same, rel=1e-12)
        assert (one.tokens, one.reference, one.corpus) == (tokens, str(pico_dir), "embedded")
    assert 0 < in_run.drift[0].top1_agreement < 1
    assert in_run.missing == {}

    # The same of the export, with the dense model loaded, and of the dense model as an explicit reference.
    export = exported(pico_dir, tmp_path / "prune", Drop([1]), Drop([2]))
    later = record_of(tmp_path / "later", export, Drift(TEXTS))
    explicit = record_of(tmp_path / "explicit", export, Drift(TEXTS, reference=str(pico_dir)))
    first = record_of(tmp_path / "first", pico_dir, Drift(TEXTS), Drop([1]), Drop([2]))
    assert len(loaded) == 1 + 2 + 2 + 1 + 1  # the pruned module's, and the two of each test but the last
    for other in (later, explicit, first):
        for ours, theirs in zip(other.drift, in_run.drift, strict=True):
            for name in ("kl", "kl_stderr", "top1_agreement", "top1_stderr"):
                assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-6)
            assert (ours.sha256, ours.stride, ours.tokens) == (theirs.sha256, theirs.stride, theirs.tokens)


def test_trust_in_a_model_is_not_trust_in_the_one_that_its_plan_names(pico_dir, tmp_path, monkeypatch):
    export = exported(pico_dir, tmp_path / "prune", Drop([1]))
    seen = []
    load = callbacks.drift.loading.load_model
    monkeypatch.setattr(callbacks.drift.loading, "load_model", lambda *a: seen.append(a[0]) or load(*a))
    for name, reference in (("plans", None), ("ours", str(pico_dir))):
        with pytest.warns(UserWarning, match="trust_remote_code is on"):
            record_of(tmp_path / name, export, Drift(TEXTS[:1], reference=reference), trust_remote_code=True)
    tested, plans, again, ours = seen
    assert (tested.pretrained, plans.pretrained, ours.pretrained) == (str(export), str(pico_dir), str(pico_dir))
    assert [one.trust_remote_code for one in (tested, plans, again, ours)] == [True, False, True, True]


def test_the_loaded_dense_model_is_freed_before_the_measurement(pico_dir, tmp_path, monkeypatch):
    seen, alive = [], []
    load, measure = callbacks.drift.loading.load_model, callbacks.drift.drift

    def load_model(*arguments):
        model = load(*arguments)
        seen.append(weakref.ref(model))
        return model

    def drift(*arguments, **options):
        alive.append([ref() is not None for ref in seen])
        return measure(*arguments, **options)

    export = exported(pico_dir, tmp_path / "prune", Drop([1]))
    monkeypatch.setattr(callbacks.drift.loading, "load_model", load_model)
    monkeypatch.setattr(callbacks.drift, "drift", drift)
    record = record_of(tmp_path / "test", export, Drift(TEXTS[:1]))
    assert record.drift[0].kl > 0
    assert alive == [[True, False]]  # the tested model, and the dense one


def test_compression_of_a_compressed_model_is_compared_with_the_first(pico_dir, tmp_path):
    export = exported(pico_dir, tmp_path / "prune", Drop([1]))
    moved = tmp_path / "another"
    shutil.copytree(export, moved)

    class Second(Drop):
        """A method of another name acts on what the first has left."""

    record = record_of(tmp_path / "test", moved, Second([2]), Drift(TEXTS[:1]))
    kl, _, _ = naive(AutoModelForCausalLM.from_pretrained(pico_dir), without(pico_dir, 1, 3), TEXTS[0])
    assert record.drift[0].kl == pytest.approx(kl, rel=1e-4)
    assert record.drift[0].reference == str(pico_dir)


def test_dense_model_has_nothing_to_be_compared_with(pico_dir, tmp_path):
    record = record_of(tmp_path / "none", pico_dir, Drift(TEXTS))
    assert (record.drift, record.missing) == ([], {"drift": "the dense model itself"})
    record = record_of(tmp_path / "itself", pico_dir, Drift(TEXTS, reference=str(pico_dir)))
    assert [(one.kl, one.top1_agreement, one.kl_stderr) for one in record.drift] == [(0, 1, 0)] * 2


@pytest.mark.parametrize("problem", ["gone", "other"])
def test_base_that_is_no_longer_there_costs_this_figure_only(tmp_path, problem, recwarn):
    dense = tmp_path / "dense"
    pico_model(bos_token_id=0, eos_token_id=1, pad_token_id=2).save_pretrained(dense)
    pico_tokenizer().save_pretrained(dense)
    export = exported(dense, tmp_path / "prune", Drop([1]))
    shutil.rmtree(dense)
    if problem == "other":
        pico_model(num_hidden_layers=4).save_pretrained(dense)
    record = record_of(tmp_path / "test", export, Drift(TEXTS))
    assert record.drift == []
    expected = (
        "the model that was compressed cannot be loaded. There is no directory"
        if problem == "gone"
        else f"{dense} is another model now: it has 4 layers"
    )
    assert record.missing["drift"].startswith(expected)
    assert any("Drift was not measured" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("problem", ["absent", "vocabulary"])
def test_wrong_reference_is_found_before_the_search(pico_dir, tmp_path, problem):
    other = tmp_path / "other"
    if problem == "vocabulary":
        pico_model(vocab_size=520).save_pretrained(other)
    method = Drop([1])
    message = (
        "There is no directory" if problem == "absent" else "has 520 tokens, that of .* 512; it has to be the same"
    )
    with pytest.raises(UsageError, match=message):
        record_of(tmp_path / "test", pico_dir, method, Drift(TEXTS, reference=str(other)))
    assert method.searches == 0


def test_broken_model_has_a_reason_instead_of_a_value(pico_dir, tmp_path):
    class Breaks(Drop):
        def setup(self, trainer, pl_module, stage):
            super().setup(trainer, pl_module, stage)
            with torch.no_grad():
                pl_module.load_model().model.norm.weight[0] = math.nan

    record = record_of(tmp_path, pico_dir, Breaks([1]), Drift(TEXTS))
    assert record.drift == []
    assert set(record.missing) == {"drift embedded @ 32", "drift embedded @ 24"}
    assert "not finite" in record.missing["drift embedded @ 32"]


def test_it_is_idle_where_nothing_is_measured(pico_dir, tmp_path):
    hook = Drift([EvaluationText("ptb")], local_data=str(tmp_path / "nothing"), reference="no/such/model")
    make_trainer(tmp_path, Drop([1]), hook).prune(make_module(pico_dir), alpaca_data(tmp_path / "data"))
    assert (tmp_path / "plan.json").exists()
    with pytest.raises(UsageError, match="batch_size 0"):
        Drift(batch_size=0)


def test_from_yaml(pico_dir, tmp_path):
    text = {"source": "embedded", "sequence_length": 32, "max_tokens": 160}
    config = {
        "model": {"pretrained": str(pico_dir)},
        "data": {"path": "embedded"},
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [
                {"class_path": "callbacks.Drift", "init_args": {"texts": [text]}},
                {"class_path": "callbacks.LayerRemoval", "init_args": {"layers": [1]}},
            ],
        },
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config", str(tmp_path / "test.yaml")])
    (one,) = json.loads((tmp_path / "run" / "results.json").read_text())["drift"]
    kl, same, tokens = naive(AutoModelForCausalLM.from_pretrained(pico_dir), without(pico_dir, 1), TEXTS[0])
    assert (one["kl"], one["top1_agreement"]) == (pytest.approx(kl, rel=1e-4), pytest.approx(same))
    assert (one["tokens"], one["reference"], one["bos"]) == (tokens, str(pico_dir), "none")
