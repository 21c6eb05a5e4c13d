"""Tokens and FLOPs spent so far, tokens per second, MFU."""

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lit_modules.hardware import device_name, peak_flops
from lit_modules.loggers import is_log_step


class Throughput(Callback):
    """Logs `train/tokens`, `train/flops` (cumulative, over all ranks and resumes), `train/tokens_per_second` and `mfu`.

    FLOPs are those of matrix products, forward and backward, at the size the model has at that step; what activation
    checkpointing computes again does not count. Validation and checkpointing are left out of the speed. MFU is FLOP/s
    over the devices' peak, and is not logged where the peak is unknown.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.flops = 0
        self._restart()

    def _restart(self) -> None:
        """Forget the present interval: what follows must not be timed with what came before."""
        self._since: float | None = None
        self._tokens_since = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()
        self._peak = peak_flops(device_name(pl_module.device), str(trainer.precision))
        self._step = trainer.global_step

    def on_train_batch_start(self, *_: Any) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        tokens = batch[0].numel() * trainer.world_size
        self.tokens += tokens
        self.flops += tokens * pl_module.flops_per_token
        self._tokens_since += tokens
        if trainer.global_step == self._step or not is_log_step(trainer):
            return
        self._step = trainer.global_step
        assert self._since is not None
        speed = self._tokens_since / (time.perf_counter() - self._since)
        metrics = {"train/tokens": float(self.tokens), "train/flops": float(self.flops)}
        metrics["train/tokens_per_second"] = speed
        if self._peak is not None:
            metrics["train/mfu"] = speed * pl_module.flops_per_token / (self._peak * trainer.world_size)
        pl_module.log_dict(metrics)
        self._restart()

    def on_validation_start(self, *_: Any) -> None:
        self._restart()

    def on_save_checkpoint(self, *_: Any) -> None:
        self._restart()

    def state_dict(self) -> dict[str, int]:
        return {"tokens": self.tokens, "flops": self.flops}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.tokens, self.flops = state_dict["tokens"], state_dict["flops"]
