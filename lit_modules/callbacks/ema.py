"""Exponential moving average of the weights, with warm-up."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor


class EMA(WeightAveraging):
    """Averages the weights after every step; validation, test and the saved `state_dict` use the average.

    With warm-up the decay after n averaged steps is min(decay, (1 + n) / (10 + n)), so that the average of a short run
    is not its initialisation.

    Args:
        decay: of the average, per optimizer step.
        warmup: start with less.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay={decay}: must be at least 0 and below 1")
        super().__init__(multi_avg_fn=self._average)
        self.decay, self.warmup = decay, warmup

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average, on the device and in the precision that the model is about to have."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError("EMA: a sharded model can't be averaged; use trainer.strategy=ddp, or no EMA")
        if trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"EMA with trainer.precision={trainer.precision}: the steps of an average are lost in 16-bit weights; "
                "use bf16-mixed or 16-mixed"
            )
        self._device = trainer.strategy.root_device
        with trainer.precision_plugin.module_init_context():
            pl_module.configure_model()
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:  # the count stays on the CPU: it is read every step
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give the average the size of the saved one, then load it."""
        if self._average_model is not None:
            self._average_model.module.restore_growth(checkpoint["state_dict"], checkpoint.get("growths", []))  # type: ignore[operator]
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _average(self, averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        assert self._average_model is not None
        n = int(self._average_model.n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:
            torch._foreach_copy_(averaged, current)
