"""A run that is asked to stop does so at the end of a step, in all processes, with a checkpoint."""

import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_modules.callbacks.checkpoint import Checkpoint
from lit_modules.runs import signals


class Preemption(Callback):
    """After SIGUSR1, SIGTERM or Ctrl-C in any process: finish the step, and its validation if one is due; save; end.

    The process ends with code 75 (SIGUSR1: it is to be requeued, and leaves the file `requeue` in the run's folder for
    the job's script), 143 (SIGTERM) or 130 (Ctrl-C). A run whose last step this was ends as it always does.

    Lightning's own part in this is switched off: its SIGTERM handler broadcasts wherever the process just is, which can
    hang, and its loop waits for the device before every batch, to ask whether that has happened.

    Args:
        run_dir: the run's folder.
        resumed_from: the checkpoint from which this process resumes.
    """

    def __init__(self, run_dir: str, resumed_from: str | None = None) -> None:
        self.run_dir, self.resumed_from = run_dir, resumed_from
        self._stopping = 0
        self._group: Any = None
        self._pending: tuple[Any, Tensor] | None = None  # a reduction on its way, and where its result will be

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        # Each process has looked for the newest one itself, and a network file system may show them different ones.
        first = trainer.strategy.broadcast(self.resumed_from)
        if self.resumed_from != first:
            raise RuntimeError(
                f"process {trainer.global_rank} has found the checkpoint {self.resumed_from}, the first one {first}: "
                "the file system shows them different files; start again"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        signals.set_training(True)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Runs before the callbacks that save."""
        if trainer.fit_loop.epoch_loop._should_accumulate() or self._stopping:
            return
        self._stopping = self._agree()
        if self._stopping:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, Checkpoint):
                    callback.requested = True

    def _agree(self) -> int:
        """The signal that any process has had, the same answer in all of them at the same step.

        What is read is the reduction that began a step ago, on the CPU and beside the training: nobody waits for it.
        """
        if self._group is None:
            return signals.requested()
        answer = 0
        if self._pending is not None:
            work, result = self._pending
            work.wait()
            answer = int(result)
        mine = torch.tensor(_ORDER.index(signals.requested()))
        self._pending = dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._group, async_op=True), mine
        return _ORDER[answer]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Here the step before is in the log, and nothing of this one has happened: no growth, for instance."""
        if not self._stopping:
            return
        trainer.strategy.checkpoint_io.teardown()  # waits for what is being written
        trainer.strategy.barrier()
        if self._stopping == signal.SIGUSR1 and trainer.is_global_zero:
            Path(self.run_dir, "requeue").touch()
        failed = getattr(trainer.strategy.checkpoint_io, "failure", None)  # of the first process, which writes
        if not trainer.checkpoint_callbacks:
            failed = "trainer.enable_checkpointing=false"
        what = f"stopped, NOT saved ({failed})," if failed else "saved and stopped"
        where = f"in {self.run_dir}; to go on, add --run_dir {self.run_dir} --ckpt_path last to the command"
        rank_zero_info(f"{signal.Signals(self._stopping).name}: {what} after step {trainer.global_step}, {where}")
        trainer.strategy.barrier()  # the first to end may be taken for a failure, and the others be killed
        raise SystemExit(signals.EXIT_CODES[signal.Signals(self._stopping)])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signals.set_training(False)


_ORDER = [0, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]  # the last wins, where processes have had different ones
