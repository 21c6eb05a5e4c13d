"""Gradient clipping by the total norm, whatever devices the gradients are sharded over."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """Torch's clip_grad_norm_, also for gradients on several meshes of devices; returns the total norm, one element."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            by_mesh.setdefault(getattr(p.grad, "device_mesh", None), []).append(p)
    norms = [nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]) for params in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)
    if limit < math.inf:
        for params in by_mesh.values():
            nn.utils.clip_grads_with_norm_(params, limit, total)
    return total


def weigh_short_step(parameters: Iterable[nn.Parameter], batches: int, accumulate: int) -> None:
    """Let gradients be the mean of a step's batches, if an epoch ended before all came that it accumulates.

    Lightning has divided each by as many as there should have been.
    """
    for parameter in parameters if 0 < batches < accumulate else ():
        if parameter.grad is not None:
            parameter.grad.mul_(accumulate / batches)
