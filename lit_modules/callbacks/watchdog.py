"""No process of a job outlives another: whoever is left would wait in a collective operation for ever.

For processes that Lightning starts itself; srun and torchrun watch over theirs.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from lit_modules.runs.errors import RunError

INTERVAL = 1.0  # seconds
GRACE = 10.0  # for an error that tells more


def end_with(parent: int) -> None:
    """End this process when its parent has ended, which may have been before this call."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(INTERVAL)
        time.sleep(GRACE)
        sys.stderr.write(f"error: pid {os.getpid()} ends: the first process of the job (pid {parent}) is gone\n")
        sys.stderr.flush()
        os._exit(1)  # no exception would reach a main thread that hangs in a collective operation

    threading.Thread(target=watch, daemon=True, name="follow").start()


class Watchdog(Callback):
    """Says which process of a job was killed, before Lightning's launcher ends the others, within 5 seconds."""

    _children: Sequence[subprocess.Popen[bytes]] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._children = getattr(trainer.strategy.launcher, "procs", ())
        for thread in threading.enumerate():
            if self._children and isinstance(thread, _ChildProcessObserver):
                thread._terminate_all = partial(self._terminate_all, thread._terminate_all)  # type: ignore[method-assign]

    def _terminate_all(self, terminate_all: Callable[[], None]) -> None:
        if killed := self._killed():
            sys.stderr.write(f"error: {killed}\n")
            sys.stderr.flush()
        terminate_all()

    def _killed(self) -> str | None:
        for rank, child in enumerate(self._children, 1):
            if (code := child.poll()) is not None and code < 0:
                how = signal.Signals(-code).name
                return f"process {rank} (pid {child.pid}) was ended by {how}. Resume with --ckpt_path last"
        return None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the cause of a connection that was closed."""
        if isinstance(exception, RuntimeError):
            time.sleep(INTERVAL if self._children else 0)  # the system may have news of the connection first
            if killed := self._killed():
                raise RunError(killed) from exception
