"""Callbacks that do harm to a run, for tests."""

import os
import signal
import time
from pathlib import Path

from lightning import Callback

from lit_modules import preemption


class KillAt(Callback):
    """A signal after an optimizer step, or in the middle of the validation that follows it."""

    def __init__(self, step: int, validating: bool = False, number: int = signal.SIGKILL) -> None:
        self.step, self.validating, self.number = step, validating, number

    def on_train_batch_end(self, trainer, *_) -> None:
        self.kill(trainer, now=not self.validating)

    def on_validation_batch_end(self, trainer, *_) -> None:
        self.kill(trainer, now=self.validating)

    def kill(self, trainer, now: bool) -> None:
        if now and trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class Diverge(Callback):
    """One process changes a weight of its model, or of its average, on its own."""

    def __init__(self, average: bool = False) -> None:
        self.average = average

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 5:
            averages = [c._average_model.module for c in trainer.callbacks if hasattr(c, "_average_model")]
            module = averages[0] if self.average else pl_module
            module.model.embedding.weight.data[0, 0] += 1


class Hold(Callback):
    """The first process waits after an optimizer step, until it is told to stop; it says so by a file in its folder.

    The others go on, and wait for it in the middle of the next step. A run that is resumed does not wait.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer, *_) -> None:
        self.fresh = trainer.global_step == 0

    def on_train_batch_end(self, trainer, *_) -> None:
        if self.fresh and trainer.is_global_zero and trainer.global_step == self.step:
            Path(trainer.default_root_dir, "held").touch()
            end = time.monotonic() + 60
            while not preemption.asked():
                assert time.monotonic() < end, "nobody sent a signal"
                time.sleep(0.05)
