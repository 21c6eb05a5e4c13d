"""Exponential moving average of the weights, with warm-up."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from lit_modules.growth.structure import match_structure
from lit_modules.modules.base import TokenFormerModule
from lit_modules.strategies.fsdp2 import FSDP2


class EMA(WeightAveraging):
    """Averages the weights after every step; validation, test and the saved `state_dict` use the average.

    The weights themselves are validated beside it: their metrics begin with `val/raw_`.

    With warm-up the decay after n averaged steps is min(decay, (1 + n) / (10 + n)), so that the average of a short run
    is not its initialisation. A step that was skipped (:class:`NonFinite`) leaves the average as it is.

    Args:
        decay: of the average, per optimizer step.
        warmup: start with less.
        validate_raw: validate the weights themselves too, which doubles the time of a validation.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True, validate_raw: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay={decay}: must be at least 0 and below 1")
        super().__init__(multi_avg_fn=self._average)
        self.decay, self.warmup, self.validate_raw = decay, warmup, validate_raw

    def check_settings(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse weights that are too coarse for an average; before any data is prepared."""
        if trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"EMA with trainer.precision={trainer.precision}: the steps of an average are lost in 16-bit weights; "
                "use bf16-mixed or 16-mixed"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average, on the device and in the precision that the model is about to have."""
        if stage != "fit":
            self._average_model = None  # of a training before: weights that are loaded now are evaluated as they are
            return
        self.check_settings(trainer, pl_module)  # a module of the user's own does not ask for it
        self._device = trainer.strategy.root_device
        self._module = pl_module
        with trainer.precision_plugin.module_init_context():
            pl_module.configure_model()
            # A sharded module can't be copied, but another one can be sharded alike.
            if isinstance(trainer.strategy, FSDP2):
                self._average_model = AveragedModel(nn.Module(), multi_avg_fn=self._average, use_buffers=True)
                self._average_model.module = pl_module.empty_copy()  # type: ignore[operator]
        if not isinstance(trainer.strategy, FSDP2):
            super().setup(trainer, pl_module, stage)
        assert self._average_model is not None
        self._average_model.n_averaged = self._average_model.n_averaged.cpu()  # it is read every step

    def _raw(self) -> Any:
        """The module that has the weights themselves while a validation has swapped them; None outside of training."""
        if self._average_model is None or self._module.trainer.state.fn != TrainerFn.FITTING:
            return None
        module = self._average_model.module
        return module if self.validate_raw and isinstance(module, TokenFormerModule) else None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the weights and their average."""
        super().on_validation_epoch_start(trainer, pl_module)
        if (raw := self._raw()) is not None:
            raw.eval()
            if trainer.world_size > 1:  # as DDP does in its forward pass: statistics are those of the first process
                for buffer in raw.buffers():
                    torch.distributed.broadcast(buffer, 0)
            raw.start_evaluation(trainer, "val")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Validate the weights themselves."""
        if (raw := self._raw()) is not None:
            with trainer.precision_plugin.val_step_context():
                raw.evaluate(batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model its own weights back."""
        if (raw := self._raw()) is not None:
            pl_module.log_dict({f"val/raw_{name}": value for name, value in raw.evaluation(trainer, "val").items()})
        if isinstance(trainer.strategy, FSDP2):
            trainer.strategy.reshard()
        super().on_validation_epoch_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the model, its own weights beside it."""
        if not isinstance(trainer.strategy, FSDP2) or self._average_model is None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            return
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = trainer.strategy.state_dict_of(self._average_model.module)
        checkpoint["averaging_state"] = {"n_averaged": self._average_model.n_averaged}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give the average the size of the saved one, then load it."""
        if self._average_model is None:
            return
        average: Any = self._average_model.module
        if not isinstance(trainer.strategy, FSDP2):
            match_structure(average, checkpoint["state_dict"], checkpoint.get("growths", []))
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            return
        match_structure(average, pl_module.state_dict(), checkpoint.get("growths", []))
        trainer.strategy.shard_new_segments()
        self._copy(pl_module, average)  # the strategy has loaded what was saved as the model, which is the average
        if "current_model_state" in checkpoint:
            trainer.strategy.load_weights(checkpoint["current_model_state"])
            self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])

    @torch.no_grad()
    def _copy(self, source: nn.Module, target: nn.Module) -> None:
        for ours, theirs in zip(chain(*_tensors(target)), chain(*_tensors(source)), strict=True):
            ours.copy_(theirs)

    def _average(self, averaged: Any, current: Any, num_averaged: Any) -> None:
        assert self._average_model is not None
        n = int(self._average_model.n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        averaged, current = (
            [t.to_local() if isinstance(t, DTensor) else t for t in tensors] for tensors in (averaged, current)
        )
        if averaged[0].is_floating_point():
            weight: Any = 1 - decay
            if (skipped := getattr(self._module, "skipped", None)) is not None:  # known on the device alone
                weight = weight * (1 - skipped.to(averaged[0].dtype))
            torch._foreach_lerp_(averaged, current, [weight] * len(averaged))
        else:
            torch._foreach_copy_(averaged, current)


def _tensors(module: nn.Module) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    return module.parameters(), module.buffers()


def averages_of(trainer: Trainer) -> list[TokenFormerModule]:
    """Modules that are averages of the one in training."""
    return [
        callback._average_model.module  # type: ignore[misc]
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None
    ]
