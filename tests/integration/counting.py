"""Counts, per training step, the operations and those that copy a value to the host."""

from typing import ClassVar

import torch
from lightning import Callback
from torch.utils._python_dispatch import TorchDispatchMode

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default}


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        self.reads += func in READS
        return func(*args, **(kwargs or {}))


class CountReads(Callback):
    """From the first batch on; a step is counted from the end of the one before to its own end."""

    ops_of_steps: ClassVar[list[int]] = []
    reads_of_steps: ClassVar[list[int]] = []

    def on_train_start(self, *_) -> None:
        self.ops_of_steps.clear()
        self.reads_of_steps.clear()
        self.counter = _Counter()
        self.counter.__enter__()

    def on_train_batch_end(self, *_) -> None:
        self.ops_of_steps.append(self.counter.ops)
        self.reads_of_steps.append(self.counter.reads)
        self.counter.ops = self.counter.reads = 0

    def on_train_end(self, *_) -> None:
        self.counter.__exit__(None, None, None)
