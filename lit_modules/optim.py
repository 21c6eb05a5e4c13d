"""AdamW with decay groups, and learning rate schedules that depend on the step alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule; defaults are the published ones (Pile and OpenWebText runs).

    Attributes:
        lr: peak learning rate.
        betas: AdamW's decay rates of the first and second moment.
        eps: AdamW's epsilon.
        weight_decay: of parameter tokens, linear weights and embeddings; norms and learned taus have none.
        schedule: cosine (warm-up, then down to `min_lr_ratio` when all steps are done), wsd (warm-up, stable, then
            linearly down over the last `decay_fraction` of all steps) or constant (warm-up, then level).
        warmup_steps: steps over which the rate rises linearly from 0.
        min_lr_ratio: rate over `lr` when all steps are done, for cosine and wsd.
        decay_fraction: part of all steps in which wsd goes down.
    """

    lr: float = 6e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 2000
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr={self.lr}: must be above 0")
        if self.schedule not in ("cosine", "wsd", "constant"):
            raise ValueError(f"optim.schedule={self.schedule!r}: choose cosine, wsd or constant")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps={self.warmup_steps}: must be at least 0")
        for name in ("min_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must lie between 0 and 1")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, always, in the order of `named_parameters`: matrices with weight decay, vectors without.

    Growth calls it again, so the number of groups must not depend on the model's size.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in trained if p.ndim >= 2]
    vectors = [(name, p) for name, p in trained if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def adamw(model: nn.Module, config: OptimConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over `param_groups`. `fused` does each group's update in one pass."""
    groups = param_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def lr_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    """The schedule, to be stepped after every optimizer step.

    Raises:
        ValueError: when warm-up and decay don't fit into `max_steps`.
    """
    decay = decay_steps(config, max_steps) if config.schedule == "wsd" else 0
    if config.schedule != "constant" and config.warmup_steps + decay >= max_steps + (decay > 0):
        rest = f" and the {decay} steps of optim.decay_fraction={config.decay_fraction}" if decay else ""
        raise ValueError(
            f"optim.warmup_steps={config.warmup_steps}{rest} don't fit into trainer.max_steps={max_steps}: "
            "lower optim.warmup_steps"
        )
    return LambdaLR(optimizer, lr_factor(config, max_steps))


def decay_steps(config: OptimConfig, max_steps: int) -> int:
    """Steps in which wsd goes down."""
    return max(1, round(config.decay_fraction * max_steps))


def lr_factor(config: OptimConfig, max_steps: int) -> Callable[[int], float]:
    """Step (0 is the first) -> learning rate over its peak."""
    warmup, floor = config.warmup_steps, config.min_lr_ratio

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "cosine":
            progress = min(1.0, (step - warmup) / (max_steps - warmup))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        decay = decay_steps(config, max_steps)
        progress = min(1.0, max(0.0, (step - (max_steps - decay)) / decay))
        return 1 - (1 - floor) * progress

    return factor
