import math

import pytest
import torch

from slm_pl.errors import UsageError
from slm_pl.evaluation import perplexity
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
