"""Callbacks that end a run the hard way, for tests."""

import os
import signal

from lightning import Callback


class KillAt(Callback):
    """SIGKILL after an optimizer step, while everything that the log has not flushed is lost."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
