import math

import pytest
import torch

from slm_pl.compression.scores import CKA, FlattenedCosine, centered_gram
from slm_pl.errors import UsageError


def states(seed: int, tokens: int = 12, channels: int = 7) -> torch.Tensor:
    return torch.randn(3, tokens, channels, generator=torch.Generator().manual_seed(seed))


def kernel_matrix(x: torch.Tensor, kernel: str) -> torch.Tensor:
    """From the definition, entry by entry."""
    n = len(x)
    if kernel == "linear":
        return torch.stack([torch.stack([(a * b).sum() for b in x]) for a in x])
    distance = torch.tensor([[math.dist(a.tolist(), b.tolist()) for b in x] for a in x], dtype=torch.float64)
    pairs = sorted(distance[i, j].item() for i in range(n) for j in range(i))
    sigma = pairs[(len(pairs) - 1) // 2]
    return torch.exp(-(distance**2) / (2 * sigma**2))


def hsic_of_song(k: torch.Tensor, l: torch.Tensor) -> float:  # noqa: E741
    """The unbiased estimator in the form of Song et al. 2012, equation 5: traces and sums, nothing is centered."""
    n = len(k)
    k, l = k.clone().fill_diagonal_(0), l.clone().fill_diagonal_(0)  # noqa: E741
    one = torch.ones(n, dtype=torch.float64)
    value = torch.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return ((value - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))).item()


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_statistics_are_the_unbiased_hsic(kernel):
    x, y = states(1) + 5, states(2, channels=4) - states(1)[..., :4]
    found = CKA(kernel).statistics(x, y)
    for row, a, b in zip(found.tolist(), x.double(), y.double(), strict=True):
        k, l = kernel_matrix(a, kernel), kernel_matrix(b, kernel)  # noqa: E741
        expected = [hsic_of_song(k, l), hsic_of_song(k, k), hsic_of_song(l, l)]
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_similarity_averages_hsic_before_the_ratio(kernel):
    x, y = states(3), states(3) + states(4)
    x[1] *= 9  # a sample that counts more, so that the mean of ratios would be another number
    rows = CKA(kernel).statistics(x, y)
    cross, first, second = rows.mean(0).tolist()
    assert CKA(kernel).combine([cross, first, second]) == pytest.approx(cross / math.sqrt(first * second), rel=1e-12)
    ratios = (rows[:, 0] / (rows[:, 1] * rows[:, 2]).sqrt()).mean().item()
    assert kernel == "rbf" or abs(ratios - cross / math.sqrt(first * second)) > 1e-3


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_blind_to_rotation_shift_and_scale(kernel):
    x = states(5)
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(6))).Q
    means = CKA(kernel).statistics(x, 3 * x @ rotation + 2).mean(0).tolist()
    assert CKA(kernel).combine(means) == pytest.approx(1, abs=1e-6)
    assert FlattenedCosine().statistics(x, x @ rotation).max() < 0.9  # which the cosine is not


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_unrelated_states_have_no_similarity_on_average(kernel):
    """The biased estimator would give about tokens / (tokens + channels) here; the unbiased one scatters about 0."""
    values = torch.cat([CKA(kernel).statistics(states(2 * s, 10, 40), states(2 * s + 1, 10, 40)) for s in range(200)])
    cross = values[:, 0]
    assert abs(cross.mean()) < 4 * cross.std() / math.sqrt(len(cross))
    assert values[:, 1:].min() > 0


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_large_common_offset_does_not_drown_the_differences(kernel):
    """Residual streams have channels of size 1e4 that are the same for all tokens."""
    x = states(7)
    offset = torch.zeros(7)
    offset[2] = 2.0**14
    near, far = CKA(kernel).statistics(x, x * 2), CKA(kernel).statistics(x, (x + offset) * 2)
    assert CKA(kernel).combine(far.mean(0).tolist()) == pytest.approx(
        CKA(kernel).combine(near.mean(0).tolist()), abs=1e-3
    )


def test_equal_tokens_have_nothing_to_align():
    x = states(8)
    for kernel in ("linear", "rbf"):
        means = CKA(kernel).statistics(x, torch.ones_like(x)).mean(0).tolist()
        assert CKA(kernel).combine(means) == pytest.approx(0, abs=1e-9)


def test_too_few_tokens_are_refused():
    with pytest.raises(UsageError, match="samples of 3 tokens; .* at least 4"):
        centered_gram(states(1, tokens=3), "linear")
