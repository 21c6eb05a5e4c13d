"""Attention between input tokens and parameter tokens (TokenFormer, eq. 4-6): the functions.

    scores = x @ keys.T              A_ij = x_i . k_j
    weights = gelu(tau * A / |A|)    |A| is the Euclidean norm of a row, so the GELU's input has an RMS of tau / sqrt(N)
    out = weights @ values

Shapes: T input tokens, D channels (D_in, D_out), N parameter tokens. Every matrix here has rows = tokens.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from tokenformer.fused import attend_l2_norm_gelu, joined, norm_factor, row_norm

ScoreNorm = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]

# E[weight^2] of one parameter token at initialisation, where the scores of a row are close to normal.
WEIGHT_SECOND_MOMENT = {"l2_norm_gelu": 0.425, "gelu_l2_norm": 1.0, "softmax": 1.0}


def default_tau(num_tokens: int, score_norm: ScoreNorm = "l2_norm_gelu") -> float:
    """The factor after the score normalisation in the released code: sqrt(N), or N for softmax."""
    return float(num_tokens) if score_norm == "softmax" else math.sqrt(num_tokens)


def pattention(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: Tensor | float | None = None,
    score_norm: ScoreNorm = "l2_norm_gelu",
) -> Tensor:
    """Attend from input tokens to parameter tokens (paper eq. 4-6; released code, class ``Pattention``).

    Args:
        x: input tokens, (..., D_in).
        keys: key tokens, (N, D_in).
        values: value tokens, (N, D_out).
        scale: tau, the factor after the normalisation, a number or a one-element tensor (which may need a gradient).
            Default: sqrt(N), or N for softmax.
        score_norm: ``l2_norm_gelu`` (all published models), ``gelu_l2_norm`` or ``softmax``.

    Returns:
        (..., D_out). With the two L2 kinds a row whose scores are all zero, or so small that their squares leave the
        range of float32 (of float64 for float64: a norm below 1e-19, 1e-154), gives zeros and zero gradients; one
        whose squares are too large for it gives NaN.

    Raises:
        ValueError: for an unknown ``score_norm``; for ``l2_norm_gelu`` under forward mode or transforms of
            ``torch.func`` that differentiate, and for its second derivatives.
    """
    if score_norm not in WEIGHT_SECOND_MOMENT:
        raise ValueError(f"score_norm={score_norm!r}: choose one of {', '.join(WEIGHT_SECOND_MOMENT)}")
    return attend(x, [keys], [values], default_tau(len(keys), score_norm) if scale is None else scale, score_norm)


def attend(
    x: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    scale: Tensor | float,
    score_norm: ScoreNorm,
    group: ProcessGroup | None = None,
    recompute: bool = False,
    norm_tokens: int | None = None,
) -> Tensor:
    """:func:`pattention` to parameter tokens in several segments, which are normalised together.

    With a `group` of processes, these are the process's share of the tokens, as many as each other one's, x is the same
    in all of them, and the result and its gradient for x are what these tokens add. With `recompute` (only
    l2_norm_gelu) no scores are kept for the backward pass, which computes them again: a matrix product more. With
    `norm_tokens` (only l2_norm_gelu) |A| is the norm of the scores of so many tokens, the first ones.
    """
    if (dtype := autocast_dtype(x.device)) is None:
        return _as_given(x, keys, values, scale, score_norm, group, recompute, norm_tokens)
    with torch.autocast(x.device.type, enabled=False):  # the operator chooses its own precisions
        keys, values = ([tokens.to(dtype) for tokens in segments] for segments in (keys, values))
        return _as_given(x.to(dtype), keys, values, scale, score_norm, group, recompute, norm_tokens)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast wants matrix products to run in; None where it is off or not to be had (meta tensors)."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _as_given(
    x: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    scale: Tensor | float,
    score_norm: ScoreNorm,
    group: ProcessGroup | None,
    recompute: bool,
    norm_tokens: int | None,
) -> Tensor:
    if score_norm == "l2_norm_gelu":
        tau = scale if isinstance(scale, Tensor) else torch.full((1,), scale, dtype=torch.float64, device=x.device)
        return attend_l2_norm_gelu(x, keys, values, tau, group, recompute, norm_tokens)
    if group is not None:
        raise ValueError(f"score_norm={score_norm!r}: only l2_norm_gelu divides its tokens among devices")
    if recompute:
        raise ValueError(f"score_norm={score_norm!r}: only l2_norm_gelu computes its scores again")
    if norm_tokens is not None:
        raise ValueError(f"score_norm={score_norm!r}: only l2_norm_gelu has a norm of a part of the tokens")
    scores = x @ joined(keys).T  # (..., N)
    if score_norm == "softmax":
        weights = scores.softmax(-1) * scale  # subtracts the row's maximum, so it can't overflow
    else:
        weights = F.gelu(scores)
        weights = weights * norm_factor(row_norm(weights), scale)
    tokens = joined(values)
    return weights.to(tokens.dtype) @ tokens
