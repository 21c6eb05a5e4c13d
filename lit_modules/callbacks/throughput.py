"""Tokens and FLOPs spent so far, tokens per second, MFU."""

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lit_modules.hardware import device_name, peak_flops
from lit_modules.loggers import is_log_step


class Throughput(Callback):
    """Logs `train/tokens`, `train/flops` (cumulative, over all ranks and resumes), `train/tokens_per_second` and `mfu`.

    FLOPs are those of matrix products, forward and backward, at the size the model has at that step; what activation
    checkpointing computes again does not count. An interval runs from one line of the log to the next, waiting for data
    included, validation and saving left out; the device is waited for at its end, and at no other step. MFU is FLOP/s
    over the devices' peak, and is not logged where the peak is unknown.
    """

    def __init__(self) -> None:
        self.tokens = self.flops = 0
        self._paused_at: float | None = None
        self._paused = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._peak = peak_flops(device_name(pl_module.device), str(trainer.precision))
        self._step = trainer.global_step
        self._start = (time.perf_counter(), self.tokens, self.flops)
        self._paused_at, self._paused = None, 0.0

    def on_validation_start(self, *_: Any) -> None:
        self._pause()

    def on_save_checkpoint(self, *_: Any) -> None:
        self._pause()

    def _pause(self) -> None:
        self._paused_at = self._paused_at or time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        if self._paused_at is not None:
            self._paused += time.perf_counter() - self._paused_at
            self._paused_at = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tokens += batch[0].numel() * trainer.world_size
        self.flops += pl_module.training_flops(batch) * trainer.world_size
        if trainer.global_step == self._step or not is_log_step(trainer):
            return
        self._step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now, (then, tokens, flops) = time.perf_counter(), self._start
        seconds = now - then - self._paused
        metrics = {"train/tokens": float(self.tokens), "train/flops": float(self.flops)}
        metrics["train/tokens_per_second"] = (self.tokens - tokens) / seconds
        if self._peak is not None:
            metrics["train/mfu"] = (self.flops - flops) / seconds / (self._peak * trainer.world_size)
        pl_module.log_dict(metrics)
        self._start, self._paused = (now, self.tokens, self.flops), 0.0

    def state_dict(self) -> dict[str, int]:
        return {"tokens": self.tokens, "flops": self.flops}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.tokens, self.flops = state_dict["tokens"], state_dict["flops"]
