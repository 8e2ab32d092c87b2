"""Pure score functions: tensors in, numbers out."""

import torch
from torch import Tensor


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
