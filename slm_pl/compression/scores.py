"""Pure score functions: tensors in, numbers out."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from slm_pl.compression.architecture import logits
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOGITS_BYTES = 48 * 2**20  # of one slice, in float32

Kernel = Literal["linear", "rbf"]
"""Of centered kernel alignment: inner products, or a Gaussian of the distance."""


LEAST_TOKENS = 4
"""In a sample, for the unbiased estimator: it divides by n − 3."""


class Similarity(Protocol):
    """How alike the final hidden states of two models are.

    A similarity is formed from statistics of single samples, averaged over all samples, so that neither the batch size
    nor the way samples are spread over processes matters.
    """

    @property
    def best(self) -> float:
        """That of a model with itself, or what none exceeds."""

    def statistics(self, reference: Tensor, candidate: Tensor, ids: Tensor) -> Tensor:
        """Looks at some samples.

        Args:
            reference: Final hidden states of the dense model, ``[batch, tokens, hidden]``.
            candidate: Those of the candidate, same shape.
            ids: The tokens, ``[batch, tokens]``.

        Returns:
            Numbers for each sample, ``[batch, n]``, float64.
        """

    def combine(self, means: list[float]) -> float:
        """From the means over the samples of these n numbers to the similarity; greater is more alike."""


@dataclass(frozen=True)
class FlattenedCosine:
    """The mean over the samples of :func:`flattened_cosine`."""

    best: float = 1.0

    def statistics(self, reference: Tensor, candidate: Tensor, ids: Tensor | None = None) -> Tensor:
        """One cosine for each sample."""
        return flattened_cosine(reference, candidate)[:, None]

    def combine(self, means: list[float]) -> float:
        """Their mean."""
        return means[0]


@dataclass(frozen=True)
class TokenCosine:
    """The mean over the tokens of the cosine of their final hidden states, without the first token of each sample.

    In the flattened cosine the first token, whose state may be a hundred times as long, outweighs all others.
    """

    best: float = 1.0

    def statistics(self, reference: Tensor, candidate: Tensor, ids: Tensor | None = None) -> Tensor:
        """The mean of each sample."""
        return _cosine(reference[:, 1:], candidate[:, 1:]).mean(1, keepdim=True)

    def combine(self, means: list[float]) -> float:
        """Their mean."""
        return means[0]


@dataclass(frozen=True)
class _OfDistributions:
    """Minus a mean over the samples of something in nats.

    Attributes:
        model: Lends its language-model head.
    """

    model: "PreTrainedModel"
    best: float = 0.0

    def combine(self, means: list[float]) -> float:
        """Minus their mean."""
        return -means[0]


class Divergence(_OfDistributions):
    """Minus KL(dense || candidate) of the next token, in nats, averaged over the tokens."""

    def statistics(self, reference: Tensor, candidate: Tensor, ids: Tensor) -> Tensor:
        """The mean of each sample."""
        rows = []
        for theirs, own in zip(_slices(self.model, reference), _slices(self.model, candidate), strict=True):
            p, q = (logits(self.model, part).float().log_softmax(-1) for part in (theirs, own))
            rows.append(torch.where(p == -math.inf, 0, p.exp() * (p - q)).sum(-1))  # p log p is 0 where p is
        return torch.cat(rows).view(len(ids), -1).double().mean(1, keepdim=True)


class Likelihood(_OfDistributions):
    """Minus the cross-entropy of the text under the candidate, in nats per token; the dense model is not asked."""

    def statistics(self, reference: Tensor, candidate: Tensor, ids: Tensor) -> Tensor:
        """The mean of each sample."""
        return next_token_losses(self.model, candidate[:, :-1], ids).double().mean(1, keepdim=True)


def next_token_losses(
    model: "PreTrainedModel", final: Tensor, ids: Tensor, logits_bytes: int = _LOGITS_BYTES
) -> Tensor:
    """Cross-entropy of every next token, in nats, from final hidden states.

    The logits of a slice of the tokens at a time are in memory, in float32.

    Args:
        model: Lends its language-model head.
        final: Of the positions that predict a token, ``[batch, tokens - 1, hidden]``.
        ids: Token ids, ``[batch, tokens]``.
        logits_bytes: Most bytes of the logits of one slice.

    Returns:
        ``[batch, tokens - 1]``, float32 (float64 of a float64 model).
    """
    parts = _slices(model, final, logits_bytes)
    targets = ids[:, 1:].flatten().split([len(part) for part in parts])
    wide = torch.promote_types(final.dtype, torch.float32)
    losses = [
        torch.nn.functional.cross_entropy(logits(model, part).to(wide), wanted, reduction="none")
        for part, wanted in zip(parts, targets, strict=True)
    ]
    return torch.cat(losses).view(len(ids), -1)


def _slices(model: "PreTrainedModel", final: Tensor, logits_bytes: int = _LOGITS_BYTES) -> tuple[Tensor, ...]:
    """Final hidden states of few tokens at a time, ``[tokens, hidden]``, so that their logits take little memory."""
    size = max(1, logits_bytes // (4 * model.config.get_text_config().vocab_size))
    return final.flatten(0, 1).split(size)


@dataclass(frozen=True)
class CKA:
    """Centered kernel alignment of the tokens' hidden states, with the minibatch estimator.

    The unbiased HSIC of each sample is averaged over the samples, then one ratio is formed (Nguyen et al. 2021,
    arXiv 2010.15327; a minibatch is the tokens of one sample)::

        CKA = mean HSIC(K, L) / sqrt(mean HSIC(K, K) · mean HSIC(L, L))

    Attributes:
        kernel: See :func:`centered_gram`.
    """

    kernel: Kernel = "linear"
    best: float = 1.0

    def statistics(self, reference: Tensor, candidate: Tensor, ids: Tensor | None = None) -> Tensor:
        """HSIC(K, L), HSIC(K, K) and HSIC(L, L) of each sample."""
        k, l = centered_gram(reference, self.kernel), centered_gram(candidate, self.kernel)  # noqa: E741
        return torch.stack([(a * b).sum((1, 2)) for a, b in ((k, l), (k, k), (l, l))], dim=1)

    def combine(self, means: list[float]) -> float:
        """The ratio; 0 if the tokens of one side do not differ at all, so that there is nothing to align."""
        return aligned(*means)


def flattened_cosine(reference: Tensor, candidate: Tensor) -> Tensor:
    """Cosine of two hidden states, each flattened over all tokens and channels into one vector.

    This is the similarity of Sliding-Window Merging (arXiv 2502.19159, section 3; in the authors' program
    ``cos(flatten(H_dense), flatten(H_merged))``), for each sample by itself, so that the batch size does not matter.
    Accumulated in float64: differences between windows are as small as 1e-4.

    Args:
        reference: Final hidden states of the dense model, ``[batch, tokens, hidden]``.
        candidate: Those of the candidate, same shape.

    Returns:
        ``[batch]`` cosines in [-1, 1], float64.
    """
    a = reference.flatten(1).double()
    b = candidate.flatten(1).double()
    # Rounding may give 1 + 2e-16, which no threshold could be compared with.
    return torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)


def centered_gram(hidden: Tensor, kernel: Kernel) -> Tensor:
    """Kernel matrix of the tokens of each sample, centered so that inner products are the unbiased HSIC.

    With K the n × n kernel matrix with a zero diagonal, k its row sums and s their sum, the entries off the diagonal
    are ``K_ij − (k_i + k_j)/(n − 2) + s/((n − 1)(n − 2))`` (U-centering, Székely and Rizzo 2014, definition 2), here
    over ``sqrt(n(n − 3))``. The sum of the products of two such matrices is HSIC₁, the unbiased estimator of the
    Hilbert-Schmidt independence criterion (Song et al. 2012, equation 5). It is an inner product, so that
    HSIC₁(K, K) is never negative and the alignment lies in [-1, 1].

    Args:
        hidden: ``[batch, tokens, hidden]``, at least :data:`LEAST_TOKENS` tokens.
        kernel: ``linear``: inner products. ``rbf``: exp(−d²/(2σ²)) with σ the median distance between two tokens of the
            sample (Kornblith et al. 2019, arXiv 1905.00414, with their bandwidth fraction 1).

    Returns:
        ``[batch, tokens, tokens]``, float64, zero on the diagonal.

    Raises:
        UsageError: If there are fewer tokens.
    """
    n = hidden.shape[1]
    if n < LEAST_TOKENS:
        raise UsageError(
            f"CKA got samples of {n} tokens; its unbiased estimator needs at least {LEAST_TOKENS}. Give longer samples."
        )
    # Differences between tokens are small beside what they have in common; it cancels in both kernels.
    states = hidden.double()
    states = states - states.mean(1, keepdim=True)
    gram = states @ states.transpose(1, 2)
    if kernel == "rbf":
        norms = gram.diagonal(dim1=1, dim2=2)
        squared = (norms[:, :, None] + norms[:, None, :] - 2 * gram).clamp_min(0)
        rows, columns = torch.triu_indices(n, n, offset=1, device=hidden.device)
        median = squared[:, rows, columns].median(dim=1).values
        gram = torch.exp(-squared / (2 * median).clamp_min(torch.finfo(torch.float64).tiny)[:, None, None])
    diagonal = torch.eye(n, dtype=torch.bool, device=hidden.device)
    gram = gram.masked_fill(diagonal, 0)
    rows_sum = gram.sum(2)
    total = rows_sum.sum(1)[:, None, None] / ((n - 1) * (n - 2))
    centered = gram - (rows_sum[:, :, None] + rows_sum[:, None, :]) / (n - 2) + total
    return centered.masked_fill(diagonal, 0) / math.sqrt(n * (n - 3))


def aligned(cross: float, first: float, second: float) -> float:
    """``cross / sqrt(first · second)``, within [-1, 1]; 0 where one of the two is 0."""
    if first <= 0 or second <= 0:
        return 0.0
    return max(-1.0, min(1.0, cross / (math.sqrt(first) * math.sqrt(second))))


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """How much a layer turns each token's hidden state: 1 − cosine (ShortGPT, arXiv 2403.03853).

    Args:
        before: Input of the layer, ``[batch, tokens, hidden]``.
        after: Its output, same shape.

    Returns:
        ``[batch, tokens]`` in [0, 2], float64.
    """
    return 1 - _cosine(before, after)


def angular_distance(before: Tensor, after: Tensor) -> Tensor:
    """Angle between hidden states as a share of a half turn (Gromov et al., arXiv 2403.17887).

    Args:
        before: ``[batch, hidden]``.
        after: Same shape.

    Returns:
        ``[batch]`` in [0, 1], float64.
    """
    return _cosine(before, after).acos() / math.pi


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    # Rounding may give 1 + 2e-16, which has no angle.
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).clamp(-1, 1)
