"""What the processes of a group send each other when they share a layer's parameter tokens."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


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
