"""Sparse use of parameter tokens: of each row of scores only the k largest count. For inference.

T input tokens, N parameter tokens, k of them in use.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenformer.fused import joined, norm_factor, row_norm


def attend_to_largest(
    x: Tensor, operators: Sequence[tuple[list[Tensor], list[Tensor], Tensor, int | None]], k: int
) -> Tensor:
    """What :func:`tokenformer.operator.attend` gives, of all norms together, with the k largest scores of each row.

    Scores are normalised by all of their norm first, and compared after that. All keys are read, but only k values a
    row; where rows are many, products with zeros take less time than that.

    Args:
        x: (..., D_in).
        operators: keys, values, tau and the number of tokens that the norm is of, of each norm.
        k: at least 1; N or more is all.

    Returns:
        (..., D_out).

    Raises:
        ValueError: for a k below 1.
    """
    if k < 1:
        raise ValueError(f"top_k={k}: must be at least 1")
    normalised = []
    for keys, _, tau, norm_tokens in operators:
        scores = x @ joined(keys).T
        normalised.append(scores * norm_factor(row_norm(scores[..., :norm_tokens]), tau).to(scores.dtype))
    z = normalised[0] if len(normalised) == 1 else torch.cat(normalised, dim=-1)  # (..., N)
    values = joined([part for _, parts, _, _ in operators for part in parts])  # (N, D_out)
    N = len(values)
    if k >= N:
        return F.gelu(z).to(values.dtype) @ values
    largest, places = z.topk(k, dim=-1, sorted=False)
    weights = F.gelu(largest).to(values.dtype)  # (..., k)
    if places.numel() < N:
        return (weights.unsqueeze(-2) @ values[places]).squeeze(-2)
    return torch.zeros_like(z, dtype=values.dtype).scatter_(-1, places, weights) @ values
