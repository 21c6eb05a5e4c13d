"""What is done about steps that were skipped since their numbers were not finite."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lit_modules.runs.errors import RunError
from lit_modules.runs.logs import write_if_possible


@dataclass
class _Step:
    """An optimizer step, of which it is not known yet whether it was made."""

    number: int = 0
    batches: list[Any] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    grad_norm: Tensor | None = None
    skipped: Tensor | None = None  # on the host, once `copied` has come
    copied: torch.cuda.Event | None = None


class NonFinite(Callback):
    """Stops a run whose loss or gradients become NaN or infinite, or skips a few such steps.

    The weights, the optimizer's state and the average (EMA) never see such a step (:mod:`lit_modules.optim.skip_step`);
    step count, schedule and data move on. What it did is read on the host one step later, so that the device always
    has work, and before anything is saved. A run that stops leaves the batches of the step in
    `nonfinite-step-STEP-rank-RANK.pt`, for `torch.load`. In 16-mixed steps that the GradScaler skips to find its
    scale don't count, only losses do.

    Args:
        skip: so many steps in a row may be skipped; one more stops the run. 0: stop at the first.
    """

    def __init__(self, skip: int = 0) -> None:
        if skip < 0:
            raise ValueError(f"nonfinite.skip={skip}: must be at least 0")
        self.skip = skip
        self.in_a_row = 0
        self._now = _Step()
        self._before: _Step | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._now, self._before = _Step(trainer.global_step), None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self._now
        step.batches.append(batch)
        if trainer.global_step == step.number or getattr(pl_module, "skipped", None) is None:  # still accumulating
            return
        step.losses, step.grad_norm = list(pl_module._losses), pl_module._grad_norm
        on_gpu = pl_module.skipped.is_cuda
        step.skipped = torch.empty((), pin_memory=on_gpu).copy_(pl_module.skipped, non_blocking=True)
        if on_gpu:
            step.copied = torch.cuda.Event()
            step.copied.record()  # type: ignore[no-untyped-call]
        self._judge(trainer)
        self._now, self._before = _Step(trainer.global_step), step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._judge(trainer)
        if "callbacks" in checkpoint:
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge(trainer)

    def _judge(self, trainer: Trainer) -> None:
        """Stop, or count, if the step before was skipped."""
        step, self._before = self._before, None
        if step is None or step.skipped is None:
            return
        if step.copied is not None:
            step.copied.synchronize()
        if not step.skipped.numpy():
            self.in_a_row = 0
            return
        self.in_a_row += 1
        what = f"loss or gradients of step {step.number} are not finite"
        if self.in_a_row <= self.skip:
            rank_zero_warn(f"{what}: it is skipped ({self.in_a_row} in a row, nonfinite.skip={self.skip})")
            return
        file = Path(trainer.default_root_dir) / f"nonfinite-step-{step.number:08d}-rank-{trainer.global_rank}.pt"
        losses = [loss.item() for loss in step.losses]
        found = {"step": step.number, "rank": trainer.global_rank, "losses": losses, "batches": step.batches}
        found = apply_to_collection(found | {"grad_norm": step.grad_norm}, Tensor, lambda t: t.cpu())

        def keep() -> None:
            with file.open("wb") as out:
                torch.save(found, out)

        where = f"its batches are in {file}" if write_if_possible(file, keep) else "its batches could not be kept"
        raise RunError(
            f"{what}, of {self.in_a_row} in a row (losses of this process: {', '.join(f'{loss:g}' for loss in losses)}"
            f"). The weights are as before it; {where}. Resume with --ckpt_path last and a lower "
            "model.optim.lr, or leave up to N such steps in a row out: nonfinite.skip=N"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.in_a_row = state_dict["in_a_row"]
