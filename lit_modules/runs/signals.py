"""SIGUSR1, SIGTERM and SIGINT (Ctrl-C) while a run trains: the handler sets a flag and does nothing else.

A handler runs between any two lines of one process, while the others may be waiting in a reduction: saving there would
wait for them without end. callbacks/preemption.py reads the flag between two optimizer steps.

A second SIGINT ends the process at once: what is on the disk is whole at any moment.

Nothing heavy is imported here, so that `tokenformer fit` listens before it imports torch, which takes seconds.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What the process ends with. 75 is the system's own code for "try again later"; a shell reports SIGTERM and SIGINT so.
EXIT_CODES = {signal.SIGUSR1: 75, signal.SIGTERM: 143, signal.SIGINT: 130}

_requested = 0  # the signal that came, 0 for none
_training = False


@contextmanager
def listening() -> Iterator[None]:
    """Take note of the signals; restores the handlers that were there. What is ignored, as by nohup, still is."""
    global _requested, _training
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield
        return
    heard = [number for number in EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN]
    old = {number: signal.signal(number, _note) for number in heard}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        _requested, _training = 0, False


def _note(number: int, frame: Any) -> None:
    global _requested
    if number != signal.SIGUSR1 and not _training:  # nothing is there that a checkpoint does not have
        raise SystemExit(EXIT_CODES[signal.Signals(number)])
    if number == signal.SIGINT and _requested == signal.SIGINT:
        os._exit(EXIT_CODES[signal.SIGINT])
    if number == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"\nCtrl-C: this step is finished and saved; once more ends at once, without saving\n")
    # Slurm follows SIGUSR1 by SIGTERM, when time is up: the first one says what is wanted.
    _requested = _requested or number


def set_training(training: bool) -> None:
    """Whether there is something to save, so that SIGTERM and SIGINT have to wait for the end of a step."""
    global _training
    _training = training


def requested() -> int:
    """The number of the signal that came first; 0 if none did."""
    return _requested
