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

from tokenformer.operator import autocast_dtype

IGNORE = -100  # a target that does not count

# Logits of one block: 128 MiB in float32. And its rows: their gradients must not add up past float16's range.
BLOCK_LOGITS, BLOCK_ROWS = 2**25, 2**13


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of ``softmax(hidden @ weight.T)`` over the targets that are not IGNORE.

    Holds at most BLOCK_LOGITS logits at a time in float32, in the backward pass too. Follows autocast.

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
        for rows in _blocks(len(targets), len(weight)):
            target = targets[rows]
            counts = target != IGNORE
            index = target.where(counts, 0).unsqueeze(1)
            log_probs = (hidden[rows] @ weight.T).to(wide).log_softmax(-1)
            total -= log_probs.gather(1, index).squeeze(1).where(counts, 0).sum()
            if not (needs_hidden or needs_weight):
                continue
            grad = log_probs.exp_()  # (rows, V), in place: softmax - one-hot where the target counts
            grad.scatter_add_(1, index, grad.new_full((1, 1), -1.0).expand_as(index))
            grad = grad.mul_(counts.unsqueeze(1)).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
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


@torch.no_grad()
def token_nats_and_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target and entropy of each prediction, both (T), in nats; 0 where the target is IGNORE."""
    nats, entropies = [], []
    for rows in _blocks(len(targets), len(weight)):
        logits = F.linear(hidden[rows], weight)
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        counts = targets[rows] != IGNORE
        index = targets[rows].where(counts, 0).unsqueeze(1)
        nats.append(-log_probs.gather(1, index).squeeze(1).where(counts, 0))
        entropies.append(-(log_probs.exp() * log_probs).sum(-1).where(counts, 0))
    return torch.cat(nats), torch.cat(entropies)


def _blocks(num_rows: int, vocab_size: int) -> list[slice]:
    size = max(1, min(BLOCK_LOGITS // vocab_size, BLOCK_ROWS))
    return [slice(start, start + size) for start in range(0, num_rows, size)]
