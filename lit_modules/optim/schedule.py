"""Learning-rate schedules that depend on the step alone."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from lit_modules.optim.config import OptimConfig


class LearningRate:
    """The learning rate of a run: a peak, times a factor that depends on the step alone.

    Attributes:
        config: peak and schedule.
        peak: `config.lr`, for as many samples as a step has if `config.lr_batch` is given.
        max_steps: of the whole training.
        span: first step of the present schedule and the step after its last; None for the whole training.
        restarts: steps at which it begins anew all the same, those of the phases of the data.
        scheduler: moves the optimizer's rates; None before :meth:`attach`, and with an optimizer of somebody else's.
    """

    def __init__(self, config: OptimConfig) -> None:
        self.config, self.peak = config, config.lr
        self.max_steps = 0
        self.span: tuple[int, int] | None = None
        self.restarts: list[int] = []
        self.scheduler: LambdaLR | None = None

    def factor(self, step: int) -> float:
        """Learning rate of a step over its peak."""
        start, end = self.span or (0, self.max_steps)
        start = max([start, *(restart for restart in self.restarts if restart <= step)])
        end = min([end, *(restart for restart in self.restarts if restart > step)])
        return lr_factor(self.config, end - start)(step - start)

    def attach(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """A scheduler, to be stepped after every optimizer step."""
        self.scheduler = LambdaLR(optimizer, lambda step: self.factor(step))
        return self.scheduler

    def apply(self, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        """Let the configured rates hold from this step on, whatever the optimizer has, say from a checkpoint."""
        if self.scheduler is None:
            return
        self.scheduler.base_lrs = [self.peak * wanted["lr_scale"] for wanted in groups]
        # A checkpoint may have had another number of groups. (Lambdas, since a scheduler would save a method's state.)
        self.scheduler.lr_lambdas = [lambda step: self.factor(step) for _ in groups]
        factor = self.factor(self.scheduler.last_epoch)
        for group, wanted, rate in zip(optimizer.param_groups, groups, self.scheduler.base_lrs, strict=True):
            group |= {"lr": rate * factor, "initial_lr": rate, "betas": self.config.betas, "eps": self.config.eps}
            group |= {name: wanted[name] for name in ("weight_decay", "lr_scale")}


def lr_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    """The schedule, to be stepped after every optimizer step. Raises as :func:`check_schedule` does."""
    check_schedule(config, max_steps, f"trainer.max_steps={max_steps}")
    return LambdaLR(optimizer, lr_factor(config, max_steps))


def check_schedule(config: OptimConfig, steps: int, what: str) -> None:
    """Whether warm-up and decay fit into so many steps.

    Raises:
        ValueError: when they don't; `what` says which steps are meant.
    """
    decay = decay_steps(config, steps) if config.schedule == "wsd" else 0
    if config.schedule != "constant" and config.warmup_steps + decay >= steps + (decay > 0):
        rest = f" and the {decay} steps of optim.decay_fraction={config.decay_fraction}" if decay else ""
        raise ValueError(
            f"optim.warmup_steps={config.warmup_steps}{rest} don't fit into {what}: lower optim.warmup_steps"
        )


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
            progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))  # a plateau may leave too few steps
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        decay = decay_steps(config, max_steps)
        progress = min(1.0, max(0.0, (step - (max_steps - decay)) / decay))
        return 1 - (1 - floor) * progress

    return factor
