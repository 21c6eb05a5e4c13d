"""Callbacks that do harm to a run, for tests."""

import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import ClassVar

from lightning import Callback

from lit_modules.callbacks import watchdog

HARM = "--trainer.callbacks+=tests.integration.kill"  # and .NAME


class KillAt(Callback):
    """SIGKILL after an optimizer step, or in the middle of the validation that follows it.

    Of all processes, or of one, while the others hang.
    """

    def __init__(self, step: int, validating: bool = False, rank: int | None = None) -> None:
        self.step, self.validating, self.rank = step, validating, rank

    def on_train_start(self, trainer, *_) -> None:
        if self.rank is not None:
            watchdog.GRACE = 1.0  # seconds that a test would wait
            with (Path(trainer.default_root_dir) / "pids").open("a") as file:
                file.write(f"{os.getpid()}\n")

    def on_train_batch_end(self, trainer, *_) -> None:
        self.kill(trainer, now=not self.validating)

    def on_validation_batch_end(self, trainer, *_) -> None:
        self.kill(trainer, now=self.validating)

    def kill(self, trainer, now: bool) -> None:
        if now and trainer.global_step == self.step:
            if self.rank not in (None, trainer.global_rank):
                time.sleep(600)  # as in a collective operation of NCCL
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


class NotFinite(Callback):
    """On the last rank, in the last batch of an optimizer step, for `steps` steps, loss or gradients are not finite."""

    def __init__(self, step: int, what: str = "loss", steps: int = 1) -> None:
        self.first, self.what, self.steps = step, what, steps

    def on_train_start(self, trainer, pl_module) -> None:
        self.batch_loss, pl_module.batch_loss = pl_module.batch_loss, self.loss

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        here = trainer.global_rank == trainer.world_size - 1
        self.now = last and here and 0 <= trainer.global_step - self.first < self.steps

    def loss(self, batch):
        loss = self.batch_loss(batch)
        if self.now and self.what == "gradients":
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss + math.inf if self.now and self.what == "loss" else loss  # whose gradients are finite


class FillDisk(Callback):
    """Takes all room on the disk of the run from a step on, until another one."""

    def __init__(self, step: int, until: int) -> None:
        self.step, self.until = step, until

    def on_train_batch_start(self, trainer, *_) -> None:
        filler = Path(trainer.default_root_dir) / "filler"
        if trainer.global_rank:
            return
        if trainer.global_step == self.step:
            filler.write_bytes(bytes(shutil.disk_usage(filler.parent).free))
        elif trainer.global_step == self.until:
            filler.unlink()


class RemoveFolder(Callback):
    """Before a step the run's folder is deleted."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            shutil.rmtree(trainer.default_root_dir)


class SleepAt(Callback):
    """Leaves a file and sleeps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            (Path(trainer.default_root_dir) / "asleep").touch()
            time.sleep(600)


class KillWorker(Callback):
    """SIGKILL of a process that loads data."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == self.step + 1:
            os.kill(trainer.train_dataloader._iterator._workers[0].pid, signal.SIGKILL)
            time.sleep(30)  # the signal of its death raises here, and not between a checkpoint and its row of the log


class StopAt(Callback):
    """Tells the trainer to stop after a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop |= batch_idx + 1 == self.batch


class KeepWeights(Callback):
    """Keeps the sum of the weights at the end of a training."""

    total: ClassVar[float | None] = None
    step: ClassVar[int] = 0

    def on_train_end(self, trainer, pl_module) -> None:
        KeepWeights.total = sum(p.double().abs().sum().item() for p in pl_module.parameters())
        KeepWeights.step = trainer.global_step
