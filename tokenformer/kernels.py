"""Triton kernels over rows: norm and GELU of scores (T, N), cross-entropy of logits (T, V).

T input tokens, N parameter tokens, V vocabulary.

Passes over a buffer of T x N elements in a GPU's memory, beside the matrix products:

             these kernels                     an MLP's GELU
    forward  1 read (A), 1 write (weights)     1 read, 1 write
    backward 2 reads (A, dL/dweights),         2 reads, 1 write
             2 writes (dL/dA, weights)

The one more is the price of keeping A alone, where the MLP keeps both sides of its GELU. Norms belong to whole rows, so
each row is read a second time, by the program that has just read it: from the cache. So are rows of logits, of which
the gradient takes the place: 1 read, 1 write.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenformer.fused import TINY_TAU, smallest_norm

TINY, SMALLEST_NORM = tl.constexpr(TINY_TAU), tl.constexpr(smallest_norm(torch.float32))
CROSS_ENTROPY_TILE = 2048  # eight logits a thread


def empty_scores(like: Tensor, N: int) -> Tensor:
    """A buffer (T, N) for the T rows of `like`. Rows begin at multiples of 16 elements: wide loads and stores."""
    return like.new_empty(len(like), -(-N // 16) * 16)[:, :N]


def norm_gelu(scores: Tensor, tau: Tensor, factor: Tensor, norm_tokens: int) -> Tensor:
    """Weights gelu(tau A / |A|) of scores A (T, N). Writes tau / |A|, 0 for a zero row, to `factor` (T, 1).

    |A| is the norm of the first `norm_tokens` columns. All (T, N) here are from :func:`empty_scores`.
    """
    weights = empty_scores(scores, scores.shape[1])
    largest = torch.finfo(scores.dtype).max
    with torch.cuda.device_of(scores):
        _norm_gelu[(len(scores),)](scores, tau, weights, factor, *_row(scores), norm_tokens, largest, **_tiles(scores))
    return weights


def norm_gelu_backward(
    grad: Tensor, scores: Tensor, tau: Tensor, factor: Tensor, norm_tokens: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Turn `grad` (T, N) from dL/dweights to dL/dA, in place.

    Args:
        grad: the gradient of what :func:`norm_gelu` returned.
        scores: A, which it had and left.
        tau: as it had it.
        factor: what it wrote.
        norm_tokens: as it had it.

    Returns:
        The weights again (T, N); r / N (T, 1) in float32, where r is the dot product of z = tau A / |A| and dL/dz; what
        rows are still to be multiplied by: `factor` in float16, whose range dL/dA may leave, else None.
    """
    outside = scores.dtype == torch.float16
    weights = empty_scores(scores, scores.shape[1])
    r = torch.empty_like(factor, dtype=torch.float32)
    with torch.cuda.device_of(scores):
        _norm_gelu_backward[(len(scores),)](
            grad, scores, tau, factor, weights, r, *_row(scores), norm_tokens, outside, **_tiles(scores)
        )
    return weights, r, factor if outside else None


def cross_entropy(logits: Tensor, targets: Tensor, ignore: int, needs_grad: bool) -> Tensor:
    """Cross-entropy of each row of logits (T, V) in nats, (T) in float32; 0 where the target is `ignore`.

    With `needs_grad` the gradient of their sum takes the place of the logits.
    """
    T, V = logits.shape
    nats = torch.empty(T, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _cross_entropy[(T,)](
            logits, targets, nats, V, logits.stride(0), ignore, needs_grad, TILE=CROSS_ENTROPY_TILE, num_warps=8
        )
    return nats


def _row(scores: Tensor) -> tuple[int, int]:
    """N, and elements from one row to the next."""
    return scores.shape[1], scores.stride(0)


def _tiles(scores: Tensor) -> dict[str, int]:
    """A row in a few tiles, eight elements a thread. The longer the rows, the fewer at a time: they share a cache."""
    tile = min(max(triton.next_power_of_2(scores.shape[1]) // 4, 512), 8192)
    return {"TILE": tile, "num_warps": tile // 256}


@triton.jit
def _norm_gelu(scores, tau, weights, factor, N, stride, norm_tokens, LARGEST, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # T x N may be more than 2^31
    scores += row * stride
    weights += row * stride
    squares = tl.zeros([TILE], tl.float32)
    for start in range(0, norm_tokens, TILE):
        columns = start + tl.arange(0, TILE)
        a = tl.load(scores + columns, mask=columns < stride, eviction_policy="evict_last").to(tl.float32)
        squares += tl.where(columns < norm_tokens, a * a, 0)
    norm = tl.sqrt(tl.sum(squares))
    # The clamp keeps the factor of a tiny row finite in float16.
    seen = norm >= SMALLEST_NORM
    by = tl.load(tau).to(tl.float32) / tl.where(seen, norm, 1)
    by = tl.where(seen, tl.maximum(tl.minimum(by, LARGEST), -LARGEST), 0)
    by = tl.where(norm < float("inf"), by, float("nan")).to(factor.dtype.element_ty)
    tl.store(factor + row, by)
    for start in range(0, N, TILE):
        columns = start + tl.arange(0, TILE)
        a = tl.load(scores + columns, mask=columns < stride, eviction_policy="evict_first").to(tl.float32)
        z = a * by.to(tl.float32)
        cdf, _ = _normal(z)
        tl.store(weights + columns, z * cdf, mask=columns < stride)


@triton.jit
def _norm_gelu_backward(
    grad, scores, tau, factor, weights, r, N, stride, norm_tokens, OUTSIDE: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    grad += row * stride
    scores += row * stride
    weights += row * stride
    by = tl.load(factor + row).to(tl.float32)
    dots = tl.zeros([TILE], tl.float32)
    for start in range(0, N, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < stride
        z = by * tl.load(scores + columns, mask=inside, eviction_policy="evict_last").to(tl.float32)
        g = tl.load(grad + columns, mask=inside).to(tl.float32)
        cdf, pdf = _normal(z)
        g *= cdf + z * pdf
        dots += tl.where(columns < N, g * z, 0)
        tl.store(grad + columns, g, mask=inside, eviction_policy="evict_last")  # dL/dz: erf costs more than a write
        tl.store(weights + columns, z * cdf, mask=inside)
    dot = tl.sum(dots)
    tl.store(r + row, dot / N)
    scale = tl.load(tau).to(tl.float32) + TINY
    along = by * dot / (scale * scale)
    last = 1.0 if OUTSIDE else by
    tl.debug_barrier()  # what one thread has written another may read
    for start in range(0, N, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < stride
        a = tl.load(scores + columns, mask=inside, eviction_policy="evict_first").to(tl.float32)
        g = tl.load(grad + columns, mask=inside, eviction_policy="evict_first").to(tl.float32)
        tl.store(grad + columns, last * (g - tl.where(columns < norm_tokens, along * a, 0)), mask=inside)


@triton.jit
def _cross_entropy(logits, targets, nats, V, stride, IGNORE, GRAD: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    counts = target != IGNORE
    LEAST: tl.constexpr = -1e30  # in place of minus infinity, whose difference from itself is not a number
    largest = tl.full([TILE], LEAST, tl.float32)
    total = tl.zeros([TILE], tl.float32)  # of exp(logit - largest), each lane by itself
    for start in range(0, V, TILE):
        columns = start + tl.arange(0, TILE)
        a = tl.load(logits + columns, mask=columns < V, other=LEAST, eviction_policy="evict_last").to(tl.float32)
        before = largest
        largest = tl.maximum(largest, a)
        total = total * tl.exp(before - largest) + tl.exp(a - largest)
    top = tl.max(largest)
    all_of_it = tl.sum(total * tl.exp(largest - top))
    hit = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32)
    tl.store(nats + row, tl.where(counts, tl.log(all_of_it) - (hit - top), 0))
    if GRAD:
        tl.debug_barrier()  # the target's logit is read before it is written over
        for start in range(0, V, TILE):
            columns = start + tl.arange(0, TILE)
            a = tl.load(logits + columns, mask=columns < V, eviction_policy="evict_first").to(tl.float32)
            grad = tl.exp(a - top) / all_of_it - tl.where(columns == target, 1.0, 0.0)
            tl.store(logits + columns, tl.where(counts, grad, 0), mask=columns < V)


@triton.jit
def _normal(z):
    """Cumulative distribution and density of the normal distribution, to 1e-7.

    An exact erf would take longer than the memory. Here log2 of the distribution of -|z| is a polynomial of degree 8,
    fitted by weighted least squares to the least largest error on [0, 6]; beyond, it falls to minus infinity.
    """
    a = tl.abs(z)
    log2 = -2.83491283e-06 * a + 3.93776916e-05
    log2 = log2 * a - 0.000186180243
    log2 = log2 * a - 0.000136936364
    log2 = log2 * a + 0.00706342012
    log2 = log2 * a - 0.0524961783
    log2 = log2 * a - 0.459208197
    log2 = log2 * a - 1.15110521
    tail = tl.exp2(log2 * a - 1)
    return tl.where(z > 0, 1 - tail, tail), tl.exp2(-0.721347520 * z * z - 1.32574807)
