"""How far a compressed model moved from the dense one: divergence of their next-token distributions."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DriftResult:
    """Distance of a model from the dense one on text, which needs no labels, and the protocol it was measured with.

    Args:
        corpus: Name of the text.
        sequence_length: Tokens of one window.
        bos: As in :class:`~slm_pl.evaluation.perplexity.PerplexityResult`.
        tokens: Positions that were compared.
        reference: The dense model.
        kl: Mean over positions of KL(dense || this model), in nats.
        kl_stderr: Its standard error over windows; not a number for a single window.
        top1_agreement: Share of positions where both models think the same token likeliest, 0 to 1.
        top1_stderr: Its standard error over windows; not a number for a single window.
        sha256: Hash of the token ids.
        stride: As in PerplexityResult.
        tail: As in PerplexityResult.
    """

    corpus: str
    sequence_length: int
    bos: str
    tokens: int
    reference: str
    kl: float
    kl_stderr: float
    top1_agreement: float
    top1_stderr: float
    sha256: str | None = None
    stride: int | None = None
    tail: str = "drop"
