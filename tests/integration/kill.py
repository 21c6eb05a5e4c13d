"""Callbacks that do harm to a run, for tests."""

import os
import signal

from lightning import Callback


class KillAt(Callback):
    """SIGKILL after an optimizer step, or in the middle of the validation that follows it."""

    def __init__(self, step: int, validating: bool = False) -> None:
        self.step, self.validating = step, validating

    def on_train_batch_end(self, trainer, *_) -> None:
        self.kill(trainer, now=not self.validating)

    def on_validation_batch_end(self, trainer, *_) -> None:
        self.kill(trainer, now=self.validating)

    def kill(self, trainer, now: bool) -> None:
        if now and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Diverge(Callback):
    """One process changes a weight of its model, or of its average, on its own."""

    def __init__(self, average: bool = False) -> None:
        self.average = average

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 5:
            averages = [c._average_model.module for c in trainer.callbacks if hasattr(c, "_average_model")]
            module = averages[0] if self.average else pl_module
            module.model.embedding.weight.data[0, 0] += 1
