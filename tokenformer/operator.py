"""Attention between input tokens and parameter tokens (TokenFormer, eq. 4-6): the functions.

    scores = x @ keys.T              A_ij = x_i . k_j
    weights = gelu(tau * A / |A|)    |A| is the Euclidean norm of a row, so the GELU's input has an RMS of tau / sqrt(N)
    out = weights @ values

Shapes: T input tokens, D channels (D_in, D_out), N parameter tokens. Every matrix here has rows = tokens.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.nn import functional as F

ScoreNorm = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]

# E[weight^2] of one parameter token at initialisation, where the scores of a row are close to normal.
WEIGHT_SECOND_MOMENT = {"l2_norm_gelu": 0.425, "gelu_l2_norm": 1.0, "softmax": 1.0}

# Elements of a T x N buffer that the operator takes at a time on the CPU.
CPU_BLOCK = 2**22


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
        (..., D_out). A row whose scores are all zero gives zeros with the two L2 kinds, and zero gradients.

    Raises:
        ValueError: for an unknown ``score_norm``.
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
) -> Tensor:
    """:func:`pattention` to parameter tokens in several segments, which are normalised together.

    With a `group` of processes, these are the process's share of the tokens, as many as each other one's, x is the same
    in all of them, and the result and its gradient for x are what these tokens add.
    """
    if (dtype := autocast_dtype(x.device)) is None:
        return _as_given(x, keys, values, scale, score_norm, group)
    with torch.autocast(x.device.type, enabled=False):  # the operator chooses its own precisions
        keys, values = ([tokens.to(dtype) for tokens in segments] for segments in (keys, values))
        return _as_given(x.to(dtype), keys, values, scale, score_norm, group)


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
) -> Tensor:
    if score_norm == "l2_norm_gelu":
        tau = scale if isinstance(scale, Tensor) else torch.full((1,), scale, dtype=torch.float64, device=x.device)
        x_TD = x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling():  # writing to columns of a buffer would break its graph
            keys, values = [_joined(keys)], [_joined(values)]
        tensors = (x_TD, tau, *keys, *values)
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        out_TD = _L2NormGELU.apply(group, *tensors) if needs_grad else _forward(group, x_TD, tau, keys, values)[0]
        return out_TD.view(*x.shape[:-1], out_TD.shape[-1])
    if group is not None:
        raise ValueError(f"score_norm={score_norm!r}: only l2_norm_gelu divides its tokens among devices")
    scores = x @ _joined(keys).T  # (..., N)
    if score_norm == "softmax":
        weights = scores.softmax(-1) * scale  # subtracts the row's maximum, so it can't overflow
    else:
        weights = F.gelu(scores)
        weights = weights * _row_factor(weights, scale)
    joined = _joined(values)
    return weights.to(joined.dtype) @ joined


def _joined(segments: list[Tensor]) -> Tensor:
    return segments[0] if len(segments) == 1 else torch.cat(segments)


def _row_factor(rows: Tensor, scale: Tensor | float, group: ProcessGroup | None = None) -> Tensor:
    """Return tau / |row|, shape (..., 1), at least float32; 0 (not infinite) where a row is all zero.

    With a `group`, its processes have different columns of the rows.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    # On the CPU a wide norm of bfloat16 copies all rows to float32 first; its own kernel sums in float32 anyway.
    sum_in = None if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" else wide
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=sum_in).to(wide)
    if group is not None:
        distributed.all_reduce(norm.square_(), group=group)
        norm.sqrt_()
    scale = scale.to(wide) if isinstance(scale, Tensor) else scale
    return torch.where(norm > 0, scale / torch.where(norm > 0, norm, 1), 0)


def _forward(
    group: ProcessGroup | None, x: Tensor, tau: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (T, D_out), z (T, N) the GELU's input, factor (T, 1) = tau / |A|). Allocates one T x N buffer, z."""
    sizes = [len(segment) for segment in keys]
    T, N = x.shape[0], sum(sizes)
    z, out, factor = x.new_empty(T, N), x.new_empty(T, values[0].shape[1]), x.new_empty(T, 1)
    # On the CPU a block of rows stays in the cache, and its GELU in memory that the allocator hands out again.
    in_blocks = x.device.type == "cpu" and not torch.compiler.is_compiling()
    num_blocks = max(1, -(-T * N // CPU_BLOCK)) if in_blocks else 1
    blocks = (t.tensor_split(num_blocks) for t in (x, z, out, factor))
    for x_block, z_block, out_block, factor_block in zip(*blocks, strict=True):
        for segment, scores in zip(keys, z_block.split(sizes, dim=1), strict=True):
            torch.mm(x_block, segment.T, out=scores)
        # In z's own precision: a mixed-precision product costs more than a matrix product on the CPU. The clamp keeps
        # the factor of a tiny row finite in float16.
        factor_block.copy_(_row_factor(z_block, tau, group).clamp_max(torch.finfo(z.dtype).max))
        z_block.mul_(factor_block)
        _sum_of_products(F.gelu(z_block).split(sizes, dim=1), values, out_block)
    return out, z, factor


def _sum_of_products(lefts: Sequence[Tensor], rights: Sequence[Tensor], out: Tensor) -> Tensor:
    """Write sum_i left_i @ right_i to `out`."""
    for i, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        torch.addmm(out, left, right, beta=min(i, 1), out=out)
    return out


class _L2NormGELU(torch.autograd.Function):
    """The fused operator. Keeps one T x N buffer (z) for the backward pass; GELU is computed again from it.

    Keys and values come in segments, all keys and then all values; each has its columns of that buffer, so that
    nothing is concatenated. Where a group of processes shares the tokens, the squared norm is added up over it, and so
    is r in the backward pass.

    Backward (paper, App. A): with z = tau A / |A|, g = dL/dz and r = g . z per row,
        dL/dA = (tau / |A|) (g - z r / tau^2),    dL/dtau = sum r / tau.
    The factor tau / |A| belongs to a row, so it is applied to T x D matrices instead of T x N ones.
    """

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup | None, x: Tensor, tau: Tensor, *keys_and_values: Tensor) -> Tensor:
        half = len(keys_and_values) // 2
        out, z, factor = _forward(group, x, tau, keys_and_values[:half], keys_and_values[half:])
        ctx.group = group
        ctx.save_for_backward(x, tau, z, factor, *keys_and_values)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, tau, z, factor, *keys_and_values = ctx.saved_tensors
        half = len(keys_and_values) // 2
        keys, values = keys_and_values[:half], keys_and_values[half:]
        _, needs_x, needs_tau, *needs_segments = ctx.needs_input_grad
        needs_keys, needs_values = needs_segments[:half], needs_segments[half:]
        sizes, num_tokens = [len(segment) for segment in keys], z.shape[1]
        grad_x = grad_tau = None
        grad_keys: list[Tensor | None] = [None] * half
        weights = F.gelu(z) if any(needs_values) else torch.empty_like(z)
        columns = weights.split(sizes, dim=1)  # of the segments
        grad_values = [c.T @ grad_out if needed else None for c, needed in zip(columns, needs_values, strict=True)]
        if needs_x or needs_tau or any(needs_keys):
            for segment, column in zip(values, columns, strict=True):
                torch.mm(grad_out, segment.T, out=column)
            grad = weights  # (T, N) dL/dweights, from here on changed in place
            torch.ops.aten.gelu_backward.grad_input(grad, z, grad_input=grad)  # dL/dz
            # r / N as a batch of dot products: no T x N temporary, and dividing by N keeps it in float16's range.
            zero = grad.new_zeros(())
            r = torch.baddbmm(zero, grad.unsqueeze(1), z.unsqueeze(2), beta=0, alpha=1 / num_tokens).squeeze(2)
            wide = torch.promote_types(z.dtype, torch.float32)
            r_wide, tau_wide = r.to(wide), tau.to(wide)
            if ctx.group is not None:
                distributed.all_reduce(r_wide, group=ctx.group)
            if needs_tau:
                grad_tau = (r_wide.sum() * num_tokens / tau_wide).to(tau.dtype).view_as(tau)
            grad.addcmul_(z, (r_wide * (-num_tokens / tau_wide**2)).to(z.dtype))  # |A| / tau * dL/dA
            if needs_x:
                grad_x = _sum_of_products(columns, keys, torch.empty_like(x)).mul_(factor)
            if any(needs_keys):
                scaled = x * factor
                grad_keys = [c.T @ scaled if needed else None for c, needed in zip(columns, needs_keys, strict=True)]
        return None, grad_x, grad_tau, *grad_keys, *grad_values


def copy_to_group(x: Tensor, group: ProcessGroup) -> Tensor:
    """Give a tensor that all processes of a group have to what each does alone; the gradients are added up."""
    return _CopyToGroup.apply(x, group)


def sum_over_group(out: Tensor, group: ProcessGroup) -> Tensor:
    """Add up, in place, what the processes of a group have computed alone; each gets the gradient of the sum."""
    return _SumOverGroup.apply(out, group)


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone()
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, group: ProcessGroup) -> Tensor:
        ctx.mark_dirty(out)
        distributed.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
