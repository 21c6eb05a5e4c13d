"""Whether the checkpoints of a run will fit on its disk, before it starts."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from lit_modules.callbacks.grow_tokens import GrowParameterTokens
from lit_modules.growth.recipe import rehearse
from lit_modules.optim.muon import Muon
from lit_modules.runs.length import num_steps
from tokenformer.backbone import block_matrices


class FreeSpace(Callback):
    """Refuses a run whose checkpoints, at the largest size that the model grows to, need more than the disk has free.

    Counted are those that are kept, and one that is being written while its predecessor is still there.

    Raises:
        ValueError: before the first step.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        problem = None
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            problem = _problem(trainer, pl_module)
        if problem := trainer.strategy.broadcast(problem):
            raise ValueError(problem)


def _problem(trainer: Any, module: Any) -> str | None:
    folder = Path(trainer.default_root_dir)
    number = 1 + sum(_kept(saver, trainer) for saver in trainer.checkpoint_callbacks)
    size = checkpoint_bytes(trainer, module)
    written = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if number * size - written <= free:
        return None
    there = f", of which {_gib(written)} are there" if written else ""
    return (
        f"the disk of {folder} has {_gib(free)} free; {number} checkpoints of {_gib(size)} (those kept, and one being "
        f"written) take {_gib(number * size)}{there}: make room, choose another run_dir, or lower "
        "checkpoint.save_top_k or best.save_top_k"
    )


def _kept(saver: ModelCheckpoint, trainer: Any) -> int:
    if saver.save_top_k >= 0:
        return saver.save_top_k + bool(saver.save_last)
    steps = num_steps(trainer)  # -1, without a limit: nobody knows how many
    return max(1, steps // (saver._every_n_train_steps or max(1, steps)))


def checkpoint_bytes(trainer: Any, module: Any) -> int:
    """Size of a checkpoint with two moments, of Muon's matrices one, and the average (EMA) if there is one."""
    copies = 3 + any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
    muon = any(isinstance(optimizer, Muon) for optimizer in trainer.optimizers)

    def numbers(model: Any) -> int:
        matrices = block_matrices(model) if muon else []
        return copies * sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in matrices)

    largest = numbers(module.model if muon else module)
    growth = next((c for c in trainer.callbacks if isinstance(c, GrowParameterTokens)), None)
    if growth is not None:
        with torch.device("meta"):
            largest = max(largest, *map(numbers, rehearse(module.build_model(), growth.stages, growth.recipe)))
    return largest * next(module.parameters()).element_size()


def _gib(number: int) -> str:
    return f"{number / 2**30:.3g} GiB"
