"""The fused Pattention operator, `l2_norm_gelu`: what runs, forward and backward, and what torch.compile sees of it.

    scores = x @ keys.T,  weights = gelu(tau * A / |A|),  out = weights @ values      (see operator.py)

Shapes: T input tokens, D channels (D_in, D_out), N parameter tokens. Every matrix here has rows = tokens.

One file: forward and backward share every buffer, and the op that torch.compile sees is both.
"""

import math
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup
from torch.nn import functional as F

# Is added to tau where there are gradients: no bit of any usual one, and what is divided by it has its limit at 0.
TINY_TAU = 1e-16
HAS_TRITON = find_spec("triton") is not None  # what is not needed is not imported


def attend_l2_norm_gelu(
    x: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    tau: Tensor,
    group: ProcessGroup | None = None,
    recompute: bool = False,
    norm_tokens: int | None = None,
) -> Tensor:
    """Attend to parameter tokens in several segments, which are normalised together; see `operator.attend`.

    Args:
        x: (..., D_in).
        keys: of each segment, (N of it, D_in).
        values: of each segment, (N of it, D_out).
        tau: one element.
        group: processes that share the tokens.
        recompute: whether scores are computed again in the backward pass, and not kept for it.
        norm_tokens: |A| is the norm of the scores of so many tokens, the first ones; of all by default.

    Returns:
        (..., D_out).
    """
    if norm_tokens is None:
        norm_tokens = sum(len(segment) for segment in keys)
    if _exporting():
        return _plain(x, joined(keys), joined(values), tau, norm_tokens)
    x_TD, compiling = x.reshape(-1, x.shape[-1]), torch.compiler.is_compiling()
    if compiling and not _as_op(group):  # writing to columns of a buffer would break its graph
        keys, values = [joined(keys)], [joined(values)]
    tensors = (x_TD, tau, *keys, *values)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not compiling and (
        forward_ad._current_level >= 0 or (needs_grad and torch._C._are_functorch_transforms_active())
    ):
        raise ValueError("l2_norm_gelu has no derivatives in torch.func and in forward mode: use torch.autograd.grad")
    if needs_grad:
        out_TD = _L2NormGELU.apply(group, recompute, norm_tokens, *tensors)
    else:
        out_TD = _forward_or_op(group, x_TD, tau, keys, values, norm_tokens)[0]
    return out_TD.view(*x.shape[:-1], out_TD.shape[-1])


def _exporting() -> bool:
    """Whether a file is being written; `torch.compiler.is_exporting()` is true in all that torch 2.11 compiles."""
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _plain(x: Tensor, keys: Tensor, values: Tensor, tau: Tensor, norm_tokens: int) -> Tensor:
    """The operator in torch's own words, of which a file consists: no code of ours, no buffer, any batch and length."""
    scores = x @ keys.T  # (..., N)
    norm = row_norm(of_norm(scores, norm_tokens))
    weights = F.gelu(scores * norm_factor(norm, tau).to(scores.dtype))
    return weights @ values


def norm_factor(norm: Tensor, tau: Tensor | float) -> Tensor:
    """Tau / norm, (..., 1); 0 where the norm is too small to be one, without a NaN in its gradient; NaN if infinite."""
    tau = tau.to(norm.dtype) if isinstance(tau, Tensor) else tau
    seen = norm >= smallest_norm(norm.dtype)
    return torch.where(seen, tau / torch.where(seen, norm, 1), 0) + 0 * norm


def joined(segments: list[Tensor]) -> Tensor:
    """The tokens of all segments."""
    return segments[0] if len(segments) == 1 else torch.cat(segments)


def row_norm(rows: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """|row|, shape (..., 1), at least float32. With a `group`, its processes have different columns of the rows."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    # On the CPU a wide norm of bfloat16 copies all rows to float32 first; its own kernel sums in float32 anyway.
    sum_in = None if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" else wide
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=None if sum_in == rows.dtype else sum_in).to(wide)
    if group is not None:
        distributed.all_reduce(norm.square_(), group=group)
        norm.sqrt_()
    return norm


def of_norm(rows: Tensor, norm_tokens: int) -> Tensor:
    """The columns of a (T, N) buffer that define the norm."""
    return rows if norm_tokens == rows.shape[-1] else rows[..., :norm_tokens]


def smallest_norm(dtype: torch.dtype) -> float:
    """Of rows that are not taken for zeros: below it, squares lose their digits."""
    return float(torch.finfo(dtype).tiny ** 0.5)


def uses_kernels(x: Tensor, group: ProcessGroup | None = None) -> bool:
    """Whether Triton kernels do what is done to rows of scores or logits."""
    narrow = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.is_cuda and HAS_TRITON and narrow and group is None


def _as_op(group: ProcessGroup | None) -> bool:
    """Whether torch.compile sees one op, and not what is in it.

    Of what is in it, torch 2.11 makes kernels for a GPU that take four times as long as ours, and keeps two buffers.
    """
    return torch.compiler.is_dynamo_compiling() and group is None


def _empty_scores(x: Tensor, keys: Sequence[Tensor], group: ProcessGroup | None) -> Tensor:
    """A buffer (T, N)."""
    N = sum(len(segment) for segment in keys)
    if uses_kernels(x, group):
        from tokenformer.kernels import empty_scores

        return empty_scores(x, N)
    return x.new_empty(len(x), N)


def _forward(
    group: ProcessGroup | None,
    x: Tensor,
    tau: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    norm_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (T, D_out), kept (T, N), factor (T, 1) = tau / |A|). Allocates one T x N buffer that stays, `kept`.

    It holds the GELU's input z = tau A / |A|, or A where kernels multiply by the factor while they read.
    """
    kept = _scores(x, keys, group)
    if uses_kernels(x, group):
        from tokenformer.kernels import norm_gelu

        factor = x.new_empty(len(x), 1)
        weights = norm_gelu(kept, tau, factor, norm_tokens)
    else:
        # In z's own precision: a mixed-precision product costs more than a matrix product on the CPU.
        factor = row_factor(row_norm(of_norm(kept, norm_tokens), group), tau, kept.dtype)
        weights = F.gelu(kept.mul_(factor))
    return sum_of_products(weights, values), kept, factor


def row_factor(norm: Tensor, tau: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`norm_factor` without a gradient, in few calls: at one token they are what takes the time."""
    norm = torch.add(norm, norm, alpha=0)  # NaN where it is infinite, not zeros in silence
    factor = tau.to(norm.dtype) / torch.threshold(norm, smallest_norm(norm.dtype), math.inf)
    if dtype == torch.float16:  # keeps the factor of a tiny row finite
        factor = factor.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return factor.to(dtype)


def _recompute_kept(group: ProcessGroup | None, x: Tensor, keys: Sequence[Tensor], factor: Tensor) -> Tensor:
    """What :func:`_forward` keeps, bit for bit."""
    kept = _scores(x, keys, group)
    return kept if uses_kernels(x, group) else kept.mul_(factor)


def _columns(buffer: Tensor, segments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The columns of a (T, N) buffer that belong to each segment."""
    return (buffer,) if len(segments) == 1 else buffer.split([len(segment) for segment in segments], dim=1)


def _scores(x: Tensor, keys: Sequence[Tensor], group: ProcessGroup | None) -> Tensor:
    """X @ keys.T, (T, N)."""
    if len(keys) == 1 and not uses_kernels(x, group):
        return x @ keys[0].T  # which torch.export can take along, unlike `out=`
    return write_products(x, keys, _empty_scores(x, keys, group))


def write_products(left: Tensor, segments: Sequence[Tensor], buffer: Tensor) -> Tensor:
    """Write left @ segment.T to the columns of each segment."""
    for segment, columns in zip(segments, _columns(buffer, segments), strict=True):
        torch.mm(left, segment.T, out=columns)
    return buffer


def sum_of_products(buffer: Tensor, segments: Sequence[Tensor]) -> Tensor:
    """The sum of columns @ segment."""
    first, *others = zip(_columns(buffer, segments), segments, strict=True)
    out = torch.mm(*first)  # not by `out=`: what torch.compile of torch 2.11 makes of that has no gradient
    for columns, segment in others:
        torch.addmm(out, columns, segment, out=out)
    return out


def _gradients(
    buffer: Tensor, right: Tensor, segments: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """columns.T @ right of each segment, where needed."""
    columns = _columns(buffer, segments)
    return [c.T @ right if need else None for c, need in zip(columns, needed, strict=True)]


def _norm_gelu_backward(grad: Tensor, z: Tensor, tau: Tensor, group: ProcessGroup | None, norm_tokens: int) -> Tensor:
    """Turn `grad` (T, N) from dL/dweights to |A| / tau * dL/dA, in place; return r / N (T, 1), at least float32."""
    torch.ops.aten.gelu_backward.grad_input(grad, z, grad_input=grad)  # dL/dz
    wide, num_tokens = torch.promote_types(z.dtype, torch.float32), z.shape[1]
    # A batch of dot products: no T x N temporary, and dividing by N in there keeps it in float16's range.
    zero = grad.new_zeros(())
    r = torch.baddbmm(zero, grad.unsqueeze(1), z.unsqueeze(2), beta=0, alpha=1 / num_tokens).squeeze(2).to(wide)
    if group is not None:
        distributed.all_reduce(r, group=group)
    along = (r * (-num_tokens / (tau.to(r.dtype) + TINY_TAU) ** 2)).to(z.dtype)
    of_norm(grad, norm_tokens).addcmul_(of_norm(z, norm_tokens), along)
    return r


def _backward(
    group: ProcessGroup | None,
    grad_out: Tensor,
    kept: Tensor | None,
    factor: Tensor,
    x: Tensor,
    tau: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    norm_tokens: int,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, tau, keys and values, where `needed`; `kept` and `factor` are those of :func:`_forward`.

    Paper, App. A: with z = tau A / |A|, g = dL/dz and r = g . z per row,
        dL/dA = (tau / |A|) (g - z r / tau^2),    dL/dtau = sum r / tau;
    of scores that the norm is not of, dL/dA = (tau / |A|) g.
    The factor tau / |A| belongs to a row, so it is applied to T x D matrices instead of T x N ones. Kernels have it for
    nothing while they write dL/dA, except in float16, whose range that may leave.
    """
    needs_x, needs_tau, *needs_segments = needed
    needs_keys, needs_values = needs_segments[: len(keys)], needs_segments[len(keys) :]
    needs_scores = needs_x or needs_tau or any(needs_keys)
    outside: Tensor | None = factor
    if kept is None:
        kept = _recompute_kept(group, x, keys, factor)
    if uses_kernels(x, group):
        from tokenformer.kernels import norm_gelu_backward

        grad = _scores(grad_out, values, group)  # dL/dweights
        weights, r, outside = norm_gelu_backward(grad, kept, tau, factor, norm_tokens)
        grad_values = _gradients(weights, grad_out, values, needs_values)
        del weights  # before anything else is allocated
    else:
        weights = F.gelu(kept) if any(needs_values) else torch.empty_like(kept)
        grad_values = _gradients(weights, grad_out, values, needs_values)
        if needs_scores:
            grad = write_products(grad_out, values, weights)  # over the weights
            r = _norm_gelu_backward(grad, kept, tau, group, norm_tokens)
    grad_x = grad_tau = None
    grad_keys: list[Tensor | None] = [None] * len(keys)
    if needs_tau:
        grad_tau = (r.sum() * kept.shape[1] / (tau.to(r.dtype) + TINY_TAU)).to(tau.dtype).view_as(tau)
    if needs_x:
        grad_x = sum_of_products(grad, keys)
        grad_x = grad_x if outside is None else grad_x.mul_(outside)
    if any(needs_keys):
        grad_keys = _gradients(grad, x if outside is None else x * outside, keys, needs_keys)
    return [grad_x, grad_tau, *grad_keys, *grad_values]


def _forward_shapes(
    x: Tensor, tau: Tensor, keys: list[Tensor], values: list[Tensor], norm_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(len(x), values[0].shape[1]), _empty_scores(x, keys, None), x.new_empty(len(x), 1)


def _backward_op(*inputs: Any) -> list[Tensor]:
    grads = _backward(None, *inputs)
    return [inputs[0].new_empty(0) if grad is None else grad for grad in grads]  # an op returns tensors


def _backward_shapes(grad: Tensor, kept: Tensor | None, factor: Tensor, *inputs: Any) -> list[Tensor]:
    x, tau, keys, values, _, needed = inputs
    flat = (x, tau, *keys, *values)
    return [torch.empty_like(t) if need else grad.new_empty(0) for t, need in zip(flat, needed, strict=True)]


# What torch.compile sees. (`torch.library.custom_op` is shorter, and each call takes 9 us more.)
_LIBRARY = torch.library.Library("tokenformer", "DEF")
_INPUTS = "Tensor x, Tensor tau, Tensor[] keys, Tensor[] values, SymInt norm_tokens"
_LIBRARY.define(f"attend({_INPUTS}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(f"attend_backward(Tensor grad, Tensor? kept, Tensor factor, {_INPUTS}, bool[] needed) -> Tensor[]")
_LIBRARY.impl("attend", partial(_forward, None), "CompositeExplicitAutograd")
_LIBRARY.impl("attend_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("tokenformer::attend", _forward_shapes, lib=_LIBRARY)
torch.library.register_fake("tokenformer::attend_backward", _backward_shapes, lib=_LIBRARY)


def _forward_or_op(group: ProcessGroup | None, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.tokenformer.attend(*inputs) if _as_op(group) else _forward(group, *inputs)


class _L2NormGELU(torch.autograd.Function):
    """The fused operator. Keeps one T x N buffer for the backward pass, or none: what is kept is computed again then.

    Keys and values come in segments, all keys and then all values; each has its columns of that buffer, so that
    nothing is concatenated. Where a group of processes shares the tokens, the squared norm is added up over it, and so
    is r in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        group: ProcessGroup | None,
        recompute: bool,
        norm_tokens: int,
        x: Tensor,
        tau: Tensor,
        *keys_and_values: Tensor,
    ) -> Tensor:
        half = len(keys_and_values) // 2
        keys, values = list(keys_and_values[:half]), list(keys_and_values[half:])
        wide_tau = tau.to(torch.promote_types(tau.dtype, torch.float32)) + TINY_TAU
        out, kept, factor = _forward_or_op(group, x, wide_tau, keys, values, norm_tokens)
        ctx.group, ctx.norm_tokens = group, norm_tokens
        ctx.save_for_backward(x, tau, factor, None if recompute else kept, *keys_and_values)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # once_differentiable would see it only where `grad_out` has a graph too, and else return constants.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise ValueError("create_graph=True: l2_norm_gelu has no second derivatives; gelu_l2_norm and softmax have")
        x, tau, factor, kept, *keys_and_values = ctx.saved_tensors
        half = len(keys_and_values) // 2
        keys, values, needed = keys_and_values[:half], keys_and_values[half:], list(ctx.needs_input_grad[3:])
        if _as_op(ctx.group):
            found = torch.ops.tokenformer.attend_backward(
                grad_out, kept, factor, x, tau, keys, values, ctx.norm_tokens, needed
            )
            return None, None, None, *(grad if need else None for grad, need in zip(found, needed, strict=True))
        found = _backward(ctx.group, grad_out, kept, factor, x, tau, keys, values, ctx.norm_tokens, needed)
        return None, None, None, *found
