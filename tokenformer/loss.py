"""Cross-entropy of a large vocabulary in blocks of rows, so that the full logits never exist.

`torch.nn.functional.linear_cross_entropy` has such a path too; on a CPU it takes 1.6 (float32) to 4 times (bfloat16) as
long as the plain loss (2048 x 50304 x 512, torch 2.15), and it is missing in torch 2.11. This one does the three matrix
products of the plain loss and no more: the gradient of a block is computed while its logits are there.
T tokens, D channels, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenformer.fused import uses_kernels
from tokenformer.operator import autocast_dtype

IGNORE = -100  # a target that does not count

# Logits of one block: 128 MiB in float32. And its rows: their gradients must not add up past float16's range.
BLOCK_LOGITS, BLOCK_ROWS = 2**25, 2**13
# On a GPU there is nothing but the logits themselves, and each block costs a pass over the gradient of the weights.
KERNEL_BLOCK_BYTES = 2**29


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of ``softmax(hidden @ weight.T)`` over the targets that are not IGNORE.

    Holds at most BLOCK_LOGITS logits at a time in float32, in the backward pass too; on a GPU at most
    KERNEL_BLOCK_BYTES of them in the precision of `hidden`. Follows autocast.

    Args:
        hidden: (T, D).
        weight: (V, D).
        targets: (T), ids of the vocabulary or IGNORE.

    Returns:
        A scalar, float32 (float64 for float64 inputs); nan if no target counts, as in torch.
    """
    if (dtype := autocast_dtype(hidden.device)) is not None:
        with torch.autocast(hidden.device.type, enabled=False):
            return _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), targets)
    return _LinearCrossEntropy.apply(hidden, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, as of a sum; the backward pass multiplies them by the incoming one.

    They are kept as of a sum, and multiplied in float32, because in float16 a mean's would vanish before the loss
    scale could lift them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        num_targets = (targets != IGNORE).sum().to(wide)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        block = KERNEL_BLOCK_BYTES // hidden.itemsize if uses_kernels(hidden) else BLOCK_LOGITS
        for rows in _blocks(len(targets), len(weight), block):
            needs_grad = needs_hidden or needs_weight
            nats, grad = _nats_and_grad(hidden[rows] @ weight.T, targets[rows], needs_grad)
            total += nats
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
            del grad  # or two blocks would be there at once
        ctx.save_for_backward(grad_hidden, grad_weight, num_targets)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total / num_targets

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *grads, num_targets = ctx.saved_tensors
        factor = grad_loss / num_targets
        scaled = (
            None if grad is None else (grad.to(factor.dtype) * factor).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        )
        return *scaled, None


def _nats_and_grad(logits: Tensor, targets: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of logits (T, V); its gradient for them, where needed. They may be written over."""
    if uses_kernels(logits):
        from tokenformer.kernels import cross_entropy

        return cross_entropy(logits, targets, IGNORE, needs_grad).sum(), logits
    counts = targets != IGNORE
    index = targets.where(counts, 0).unsqueeze(1)
    dtype, wide = logits.dtype, logits.to(torch.promote_types(logits.dtype, torch.float32))
    del logits  # large, as all of them
    log_probs = wide.log_softmax(-1)
    del wide
    nats = -log_probs.gather(1, index).squeeze(1).where(counts, 0).sum()
    if not needs_grad:
        return nats, log_probs
    grad = log_probs.exp_()  # softmax - one-hot where the target counts, in place
    grad.scatter_add_(1, index, grad.new_full((1, 1), -1.0).expand_as(index))
    return nats, grad.mul_(counts.unsqueeze(1)).to(dtype)


@torch.no_grad()
def token_nats_and_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target and entropy of each prediction, both (T), in nats; 0 where the target is IGNORE."""
    nats, entropies = [], []
    for rows in _blocks(len(targets), len(weight), BLOCK_LOGITS):
        logits = F.linear(hidden[rows], weight)
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        counts = targets[rows] != IGNORE
        index = targets[rows].where(counts, 0).unsqueeze(1)
        nats.append(-log_probs.gather(1, index).squeeze(1).where(counts, 0))
        entropies.append(-(log_probs.exp() * log_probs).sum(-1).where(counts, 0))
    return torch.cat(nats), torch.cat(entropies)


def _blocks(num_rows: int, vocab_size: int, num_logits: int) -> list[slice]:
    size = max(1, min(num_logits // vocab_size, BLOCK_ROWS))
    return [slice(start, start + size) for start in range(0, num_rows, size)]
