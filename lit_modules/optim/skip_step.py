"""Optimizer steps without finite numbers are not made, and nobody waits for the device to find out.

A loss that is NaN or infinite makes all its gradients NaN. So it shows in the norm of the gradients, which is measured
anyway, on every rank and whichever batch of the step it was, and gradients that are not finite by themselves show there
too. The norm stays on the device: a fused optimizer reads from `found_inf`, a tensor, that its update is to do nothing.
It is how GradScaler leaves steps out.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """The loss; if it is not finite, with gradients that are NaN."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def skip_if_nonfinite(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], finite: Tensor) -> Tensor:
    """Make an optimizer's next step do nothing, unless `finite`.

    Args:
        optimizer: whose step is next.
        parameters: what it trains.
        finite: bool (); the same on all ranks.

    Returns:
        float32 (), where `finite` is: 1 if the step is skipped, else 0.
    """
    skipped = (~finite).float()
    optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning's wrapper
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = skipped  # type: ignore[attr-defined,union-attr]
    elif skipped.item():  # others can't be told but by taking the gradients away, which the host has to do
        for parameter in parameters:
            parameter.grad = None
    return skipped
