import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from slm_pl.errors import UsageError
from slm_pl.evaluation import OutputHead, Windows, drift, reference_states
from slm_pl.evaluation.windows import cut
from tests.helpers.pico import pico_model
from tests.helpers.ranks import in_two_processes

pytestmark = pytest.mark.usefixtures("one_thread")

STREAM = torch.randint(512, (150,), generator=torch.Generator().manual_seed(3)).tolist()


def plain(count=6, length=20):
    return torch.tensor(STREAM[: count * length]).view(count, length)


def overlapping():
    ids, context, _ = cut(STREAM, 32, 20, "keep")
    return Windows(ids, context, 32, stride=20, tail="keep")


@torch.no_grad()
def naive(dense, model, windows):
    """KL and agreement, position by position, of the logits of both models' own forward pass."""
    kl, same = [], []
    for ids, context in zip(windows.ids, windows.context, strict=True):
        p, q = (one(ids[None]).logits[0].double() for one in (dense, model))
        for position in range(context - 1, len(ids) - 1):
            kl.append(float(kl_divergence(Categorical(logits=p[position]), Categorical(logits=q[position]))))
            same.append(float(p[position].argmax() == q[position].argmax()))
    return sum(kl) / len(kl), sum(same) / len(same), len(kl)


# Gemma caps its logits, Granite scales them, OPT projects its last state, BLOOM's layers are elsewhere.
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "opt", "bloom", "gpt_neox"])
def test_drift_is_that_of_the_models_own_logits(model_type):
    extra = {"final_logit_softcapping": 3.0} if model_type == "gemma2" else {}
    dense, model = (pico_model(model_type, seed, **extra) for seed in (0, 1))
    with torch.no_grad():  # near enough for some agreement
        for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
            ours.copy_(theirs + 0.5 * ours)
    for windows in (plain(), overlapping()):
        reference = reference_states(dense, windows, "dense", show_progress=False)
        result = drift(model, windows, reference, "words", show_progress=False)
        kl, same, count = naive(dense, model, Windows.of(windows, "words"))
        assert result.kl == pytest.approx(kl, rel=1e-4, abs=2e-7)  # of float32 logarithms
        assert result.top1_agreement == pytest.approx(same, rel=1e-12)
        assert (result.tokens, result.reference, result.corpus) == (count, "dense", "words")
        assert 0 < same < 1


def test_protocol_and_errors():
    dense, model = pico_model(seed=0), pico_model(seed=1)
    windows = overlapping()
    result = drift(model, windows, reference_states(dense, windows, "dense"), "words")
    assert (result.sequence_length, result.bos, result.stride, result.tail) == (32, "none", 20, "keep")
    assert (result.tokens, result.sha256) == (149, windows.sha256)
    # Equal windows: the plain standard error of their means.
    each = [drift(model, row[None], reference_states(dense, row[None], "d"), "w") for row in plain()]
    assert math.isnan(each[0].kl_stderr)
    result = drift(model, plain(), reference_states(dense, plain(), "dense"), "words")
    for name in ("kl", "top1"):
        values = torch.tensor([getattr(one, "kl" if name == "kl" else "top1_agreement") for one in each]).double()
        assert getattr(result, f"{name}_stderr") == pytest.approx(float(values.std()) / math.sqrt(6), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_unchanged_model_has_not_moved(dtype):
    model = pico_model().to(dtype)
    reference = reference_states(model, overlapping(), "dense")
    assert {states.dtype for states in reference.states} == {dtype}
    result = drift(model, overlapping(), reference, "words")
    assert (result.kl, result.top1_agreement, result.kl_stderr, result.top1_stderr) == (0, 1, 0, 0)


def test_reference_stays_when_the_model_changes():
    dense, model = pico_model(seed=0), pico_model(seed=1)
    expected = drift(model, plain(), reference_states(dense, plain(), "dense"), "words")
    head = OutputHead.of(dense)
    reference = reference_states(dense, plain(), "dense", head)
    assert reference.head is head
    with torch.no_grad():
        for p in dense.parameters():
            p.zero_()
    dense.config.final_logit_softcapping = 1e-3
    assert drift(model, plain(), reference, "words") == expected


def test_slices_do_not_matter(monkeypatch):
    dense, model = pico_model(seed=0), pico_model(seed=1)
    reference = reference_states(dense, plain(), "dense")
    whole = drift(model, plain(), reference, "words")
    monkeypatch.setattr(sys.modules["slm_pl.evaluation.drift"], "_SLICE_BYTES", 4 * 512 * 3)  # three positions
    sliced = drift(model, plain(), reference, "words")
    assert sliced.kl == pytest.approx(whole.kl, rel=1e-6)
    assert sliced.top1_agreement == whole.top1_agreement


def test_model_keeps_its_modes():
    model = pico_model().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    drift(model, plain(), reference_states(model, plain(), "dense"), "words")
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("broken", ["dense", "model"])
def test_broken_weights(broken):
    models = {"dense": pico_model(seed=0), "model": pico_model(seed=1)}
    with torch.no_grad():
        models[broken].model.norm.weight[0] = math.nan
    reference = reference_states(models["dense"], plain(), "dense")
    with pytest.raises(FloatingPointError, match="divergence from dense on window 0 of 'words' is not finite"):
        drift(models["model"], plain(), reference, "words")


def test_what_cannot_be_compared():
    reference = reference_states(pico_model(vocab_size=520), plain(), "dense")
    with pytest.raises(UsageError, match="vocabulary of dense has 520 tokens, that of the compared model 512"):
        drift(pico_model(), plain(), reference, "words")
    reference = reference_states(pico_model(), plain(), "dense")
    with pytest.raises(UsageError, match="batch_size 0"):
        drift(pico_model(), plain(), reference, "words", batch_size=0)
    with pytest.raises(UsageError, match="at least one window of two"):
        reference_states(pico_model(), torch.zeros((0, 16), dtype=torch.int64), "dense")


def on_each_rank(rank: int, directory: str) -> None:
    dense, model = pico_model(seed=0), pico_model(seed=1)
    reference = reference_states(dense, overlapping(), "dense", batch_size=1)
    found: dict[str, object] = {"result": asdict(drift(model, overlapping(), reference, "words", batch_size=1))}
    if rank == 1:
        with torch.no_grad():
            model.model.norm.weight[0] = math.nan
    try:
        drift(model, overlapping(), reference, "words", batch_size=1)
    except FloatingPointError as error:
        found["error"] = str(error)
    (Path(directory) / f"{rank}.json").write_text(json.dumps(found))
    (Path(directory) / f"{rank}.windows").write_text(str(len(reference.states)))


@pytest.mark.long
def test_processes_share_the_windows(tmp_path):
    in_two_processes(on_each_rank, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    dense, model = pico_model(seed=0), pico_model(seed=1)
    reference = reference_states(dense, overlapping(), "dense", batch_size=1)
    assert ranks[0]["result"] == asdict(drift(model, overlapping(), reference, "words", batch_size=1))
    assert "on window 1 of 'words'" in ranks[0]["error"]
    kept = [int((tmp_path / f"{rank}.windows").read_text()) for rank in range(2)]
    assert sum(kept) == len(overlapping())
    assert max(kept) - min(kept) <= 1
