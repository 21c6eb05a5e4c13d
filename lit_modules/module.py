"""What the modules for language and vision share: optimizer, schedule, clipping, the history of growth."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lit_modules.optim import OptimConfig, adamw, check_schedule, lr_factor, param_groups, regroup
from tokenformer.config import BackboneConfig
from tokenformer.growth import anneal_taus, pattention_layers


class TokenFormerModule(LightningModule, ABC):
    """Base of a module that trains one model, `self.model`, with AdamW, and whose model may grow.

    Attributes:
        config: of the model before any growth.
        growths: one record of each growth so far, oldest first; goes into the checkpoint.
        lr_span: first step of the present schedule and the step after its last; None for the whole training.
        old_lr_scale: rate of the parameters from before the last growth, over that of the new ones.
    """

    config: BackboneConfig

    def __init__(self, optim: OptimConfig) -> None:
        super().__init__()
        self.optim = optim
        self.model: Any = None
        self.growths: list[dict[str, Any]] = []
        self.lr_span: tuple[int, int] | None = None
        self.old_lr_scale = 1.0
        self._scheduler: LambdaLR | None = None
        self._grad_norm: Tensor | None = None
        self._lr = 0.0  # of this optimizer step; its scheduler moves on before the log is written

    @abstractmethod
    def build_model(self, width: int = 1) -> nn.Module:
        """The model before any growth, `width` times as wide."""

    @abstractmethod
    def probe_loss(self, batch: Any) -> Tensor:
        """What growth must not change: the loss of a batch."""

    def twin(self) -> "TokenFormerModule":
        """A module of the same config with a model of its own, sharded alike; to hold an average."""
        other = copy.copy(self)  # without its trainer
        other._modules = {}
        other.model = None
        other.configure_model()
        return other

    @abstractmethod
    def install(self, model: nn.Module) -> None:
        """Make this the model: as it is to be trained, checkpointed, compiled and sharded."""

    def configure_model(self) -> None:
        """Build the model; here and not before, so that it is made on its device and in its precision."""
        if self.model is None:
            self.install(self.build_model())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the history."""
        checkpoint["growths"] = self.growths

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the size of the saved model, before its weights are loaded and anything is wrapped around it."""
        self._refuse_average_without_ema(checkpoint)
        if "state_dict" in checkpoint:  # else the strategy, which has loaded the weights already, has done it
            self.restore_growth(checkpoint["state_dict"], checkpoint.get("growths", []))

    def restore_growth(self, saved: Mapping[str, Any], growths: list[dict[str, Any]]) -> None:
        """Give the model the segments of a saved one, and freeze what was frozen in its last growth.

        Args:
            saved: what the module's state dict has, by name; anything with a shape.
            growths: the saved history.
        """
        self.growths = growths
        width = math.prod(record["width"] for record in growths)
        if self.model.config.dim != width * self.config.dim:  # a baseline; its contents come with the checkpoint
            self.install(self.build_model(width).to(self.model.embedding.weight))
        prefix = "model."
        shapes = {name.removeprefix(prefix): t.shape for name, t in saved.items() if name.startswith(prefix)}
        for name, layer in pattention_layers(self.model).items():
            layer.match(shapes, f"{name}.")
        self.freeze_old()

    def freeze_old(self) -> None:
        """Freeze what is older than the last growth, if that growth says so, and nothing else."""
        only_new = self.growths and self.growths[-1]["train"] == "new" and self._trainer is not None
        new = set(self.growths[-1]["new"]) if only_new else None
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(new is None or name in new)

    def _refuse_average_without_ema(self, checkpoint: dict[str, Any]) -> None:
        """The optimizer state of the weights is of no use to their average."""
        if "current_model_state" not in checkpoint or self._trainer is None or not self.trainer.training:
            return
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, WeightAveraging) for callback in callbacks):
            raise ValueError("the checkpoint was trained with EMA, this run is not: add --trainer.callbacks+=EMA")

    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups for the model as it is now; as many before growth as after it."""
        if self.old_lr_scale == 1:
            return param_groups(self, self.optim.weight_decay)
        new = {f"model.{name}" for name in self.growths[-1]["new"]} if self.growths else set()
        return param_groups(
            self, self.optim.weight_decay, lambda name: bool(new) and name not in new, self.old_lr_scale
        )

    def regroup_optimizer(self) -> None:
        """Tell the optimizer of parameters that have come, or that are frozen now."""
        (optimizer,) = self.trainer.optimizers
        regroup(optimizer, self.param_groups())
        self.zero_grad()  # a frozen parameter's last gradient would count when gradients are clipped

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its per-step schedule."""
        self._max_steps = self.trainer.max_steps
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # a step of the warm-up is all it makes
            self._max_steps = self.optim.warmup_steps + 1
        if self._max_steps < 1:
            raise ValueError(
                f"trainer.max_steps={self._max_steps}: the learning rate schedule needs the number of steps"
            )
        check_schedule(self.optim, self._max_steps, f"trainer.max_steps={self._max_steps}")
        # The fused update does its own unscaling in 16-mixed, where gradients must be unscaled before clipping.
        optimizer = adamw(self.param_groups(), self.optim, fused=self.trainer.precision != "16-mixed")
        self._scheduler = LambdaLR(optimizer, lambda step: self.rate_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler, "interval": "step"}}

    def rate_factor(self, step: int) -> float:
        """Learning rate of a step over its peak."""
        start, end = self.lr_span or (0, self._max_steps)
        return lr_factor(self.optim, end - start)(step - start)

    def apply_rates(self) -> None:
        """Let the configured rates hold from this step on, whatever the optimizer has."""
        if self._scheduler is None:  # a subclass has its own optimizer
            return
        (optimizer,) = self.trainer.optimizers
        groups = self.param_groups()
        self._scheduler.base_lrs = [self.optim.lr * wanted["lr_scale"] for wanted in groups]
        # A checkpoint may have had another number of groups. (Lambdas, since a scheduler would save a method's state.)
        self._scheduler.lr_lambdas = [lambda step: self.rate_factor(step) for _ in groups]
        factor = self.rate_factor(self._scheduler.last_epoch)
        for group, wanted, rate in zip(optimizer.param_groups, groups, self._scheduler.base_lrs, strict=True):
            group |= {"lr": rate * factor, "initial_lr": rate, "betas": self.optim.betas, "eps": self.optim.eps}
            group |= {name: wanted[name] for name in ("weight_decay", "lr_scale")}

    def on_train_start(self) -> None:
        """After a resume the configured rates hold, not those that the checkpoint brought along."""
        self._step = self.trainer.global_step
        self.apply_rates()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Move annealed taus on, once an optimizer step."""
        if self.growths and batch_idx % self.trainer.accumulate_grad_batches == 0:
            left = self.growths[-1]["anneal_until"] - self.trainer.global_step
            if left > 0:
                anneal_taus(self.model, left)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the total norm, and keep it for the log: measuring it again would be another pass."""
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(f"trainer.gradient_clip_algorithm={gradient_clip_algorithm!r}: only 'norm' is supported")
        self._lr = optimizer.param_groups[0]["lr"]
        limit = gradient_clip_val or math.inf
        self._grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
