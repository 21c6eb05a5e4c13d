"""Checkpoints that are whole or not there, and the newest whole one."""

import os
import time
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_modules.sharded import missing_part


class Checkpoint(ModelCheckpoint):
    """ModelCheckpoint that also saves at the last step, and after the validation of a step instead of before it.

    So a run that is killed while it validates makes that validation again, and its log has it.

    Attributes:
        asked: save this step too; set by :class:`Preemption`.
    """

    asked = False
    _deferred = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        self._deferred = trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if not self._deferred:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._deferred:
            self._deferred = False
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """Save if it is time; never between the batches of a step, whose gradients a checkpoint does not hold.

        Not by ModelCheckpoint, which at the end of an epoch waits for a validation whether one comes or not (2.6).
        """
        every, step = self._every_n_train_steps, trainer.global_step
        due = self.asked or (every > 0 and step % every == 0) or step == trainer.max_steps or self._time_is_up(trainer)
        between = trainer.fit_loop.epoch_loop._should_accumulate()
        if due and not between and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
            self._last_time_checked = time.monotonic()

    def _time_is_up(self, trainer: Trainer) -> bool:
        if self._train_time_interval is None:
            return False
        up = time.monotonic() - (self._last_time_checked or 0.0) >= self._train_time_interval.total_seconds()
        return trainer.strategy.broadcast(up)  # processes have clocks of their own


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames: a kill while saving leaves the old file, or none, but never half of one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if Path(path).is_dir():
            raise ValueError(f"{path} is a sharded checkpoint: go on with it by --trainer.strategy fsdp2")
        return super().load_checkpoint(path, *args, **kwargs)


def newest_whole(paths: Iterable[Path]) -> Path | None:
    """The newest checkpoint that is undamaged; damaged newer ones are passed over with a warning."""
    for path in sorted(paths, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        if problem := damage(path):
            warnings.warn(f"checkpoint {path} is passed over: {problem}", stacklevel=2)
        else:
            return path
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by a file's zip directory and checksums; None if nothing is."""
    if path.is_dir():
        return missing_part(path)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        return f"truncated or not a checkpoint ({error})"
    return f"its part {broken} is damaged" if broken else None
