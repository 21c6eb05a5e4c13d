"""Tokens and FLOPs spent so far, tokens per second, MFU, waiting for data."""

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lit_modules.runs.logs import is_log_step
from lit_modules.strategies.ranks import data_parallel_rank
from tokenformer.hardware import device_name, peak_flops


class Throughput(Callback):
    """Logs what the training has cost and how fast it is.

    `train/tokens`, `train/flops`, `train/seconds` and the number of samples (`train/sequences` or `train/images`) are
    cumulative, over all ranks, resumes and growth; `train/stage` is how often the model has grown, `train/stage_tokens`
    and `train/stage_flops` count from the last time on. Then `train/tokens_per_second`, the same of samples,
    `train/mfu`, and `train/data_wait`, the share of the time that this rank has waited for its loader.

    FLOPs are those of matrix products, forward and backward, at the size the model has at that step; what activation
    checkpointing computes again does not count, nor what a teacher does (`model.distill`), and what frozen parameters
    save is not subtracted. An interval runs from one line of the log to the next, waiting for data included,
    validation, growth and saving left out; the device is waited for at its end, and at no other step. MFU is FLOP/s
    over the devices' peak, and is not logged where the peak is unknown.
    """

    def __init__(self) -> None:
        self.samples = self.tokens = self.flops = 0
        self.seconds = 0.0  # as `train/seconds` counts them, validation and saving left out
        self._paused_at: tuple[float, float] | None = None  # the clock, and what the loader had been waited for
        self._paused = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._peak = peak_flops(device_name(pl_module.device), str(trainer.precision))
        self._step = trainer.global_step
        self._start = self._now(trainer)
        self._paused_at, self._paused = None, 0.0

    def _now(self, trainer: Trainer) -> tuple[float, int, int, int, float]:
        return time.perf_counter(), self.samples, self.tokens, self.flops, _waited(trainer)

    def exclude(self, seconds: float) -> None:
        """Do not count so many seconds that have just passed as training."""
        if self._paused_at is None:
            self._paused += seconds

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self._pause(trainer)

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self._pause(trainer)

    def _pause(self, trainer: Trainer) -> None:
        self._paused_at = self._paused_at or (time.perf_counter(), _waited(trainer))

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._paused_at is not None:
            since, waited = self._paused_at
            self._paused += time.perf_counter() - since - (_waited(trainer) - waited)  # its batch came after the pause
            self._paused_at = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        _, batches = data_parallel_rank(trainer)
        self.samples += len(batch[0]) * batches
        self.tokens += pl_module.num_tokens(batch) * batches
        self.flops += pl_module.training_flops(batch) * batches
        if trainer.global_step == self._step or not is_log_step(trainer):
            return
        self._step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = self._now(trainer)
        seconds, samples, tokens, flops, waited = (new - old for new, old in zip(now, self._start, strict=True))
        seconds -= self._paused
        self.seconds += seconds
        grown = pl_module.growths[-1] if pl_module.growths else {"tokens": 0, "flops": 0}
        metrics = {"train/tokens": float(self.tokens), "train/flops": float(self.flops), "train/seconds": self.seconds}
        metrics["train/stage"] = float(len(pl_module.growths))
        metrics["train/stage_tokens"] = float(self.tokens - grown["tokens"])
        metrics["train/stage_flops"] = float(self.flops - grown["flops"])
        metrics[f"train/{pl_module.samples}"] = float(self.samples)
        metrics[f"train/{pl_module.samples}_per_second"] = samples / seconds
        metrics["train/tokens_per_second"] = tokens / seconds
        metrics["train/data_wait"] = waited / seconds
        if self._peak is not None:
            metrics["train/mfu"] = flops / seconds / (self._peak * trainer.world_size)
        pl_module.log_dict(metrics)
        self._start, self._paused = now, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "tokens": self.tokens, "flops": self.flops, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples, self.tokens, self.flops = (state_dict[name] for name in ("samples", "tokens", "flops"))
        self.seconds = state_dict["seconds"]


def _waited(trainer: Trainer) -> float:
    return getattr(trainer.train_dataloader, "waited", 0.0)
