"""Callbacks that send a run a signal, or wait for one, for tests."""

import os
import signal
import time
from pathlib import Path

from lightning import Callback

from lit_modules.runs import signals


class SignalAt(Callback):
    """A signal to its own process, once, after an optimizer step."""

    def __init__(self, step: int, name: str) -> None:
        self.step, self.name, self.sent = step, name, False

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.Signals[self.name])


class Hold(Callback):
    """The first process waits after an optimizer step, until it is told to stop.

    The others go on, and wait for it in the middle of the next step. Each says by a file in the run's folder that it is
    there. A run that is resumed does not wait.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer, *_) -> None:
        self.fresh = trainer.global_step == 0

    def on_train_batch_end(self, trainer, *_) -> None:
        if self.fresh and trainer.global_step == self.step:
            Path(trainer.default_root_dir, f"held-{trainer.global_rank}").touch()
            end = time.monotonic() + 120
            while trainer.is_global_zero and not signals.requested():
                assert time.monotonic() < end, "nobody sent a signal"
                time.sleep(0.05)
