"""What the modules for language and vision share: optimizer, schedule, clipping, the history of growth."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.models import group_parameters
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lit_modules.loggers import is_log_step
from lit_modules.nonfinite import guard, spoil
from lit_modules.optim import (
    OptimConfig,
    adamw,
    check_schedule,
    clip_grad_norm,
    lr_factor,
    param_groups,
    regroup,
)
from lit_modules.resume import check_resumed
from lit_modules.strategies import data_parallel
from tokenformer.config import BackboneConfig
from tokenformer.growth import anneal_taus, pattention_layers
from tokenformer.interop import start_from


class TokenFormerModule(LightningModule, ABC):
    """Base of a module that trains one model, `self.model`, with AdamW, and whose model may grow.

    Logs `train/loss`, `train/lr` and `train/grad_norm` every `trainer.log_every_n_steps` optimizer steps, the loss
    averaged over the batches of the step and over all ranks. What is random in a step depends on the seed, the step
    and the rank alone, so a resumed run draws the same.

    Attributes:
        config: of the model before any growth.
        checkpoint_activations: whether only each block's input is kept for the backward pass.
        recompute_scores: whether Pattention layers keep no scores for it.
        growths: one record of each growth so far, oldest first; goes into the checkpoint.
        lr_span: first step of the present schedule and the step after its last; None for the whole training.
        old_lr_scale: rate of the parameters from before the last growth, over that of the new ones.
        skipped: float32 (), 1 if the last optimizer step was left out since it was not finite, else 0.
    """

    config: BackboneConfig
    checkpoint_activations: bool
    recompute_scores: bool
    samples: ClassVar[str]  # what a batch consists of, for the log
    predict_option: ClassVar[str]  # what `tokenformer predict` needs, to be shown to the user

    def __init__(self, optim: OptimConfig, init_from: str | None = None) -> None:
        super().__init__()
        self.optim, self.init_from = optim, init_from
        self.model: Any = None
        self.growths: list[dict[str, Any]] = []
        self.lr_span: tuple[int, int] | None = None
        self.old_lr_scale = 1.0
        self._seed = torch.initial_seed()
        self._losses: list[Tensor] = []  # of the batches of this optimizer step
        self._scheduler: LambdaLR | None = None
        self._grad_norm: Tensor | None = None
        self.skipped: Tensor | None = None
        self._lr = 0.0  # of this optimizer step; its scheduler moves on before the log is written

    @abstractmethod
    def build_model(self, width: int = 1) -> nn.Module:
        """The model before any growth, `width` times as wide."""

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """What is minimised: the mean loss of a training batch."""

    @abstractmethod
    def num_tokens(self, batch: Any) -> int:
        """Input tokens of a training batch."""

    @abstractmethod
    def training_flops(self, batch: Any) -> int:
        """FLOPs that a batch costs at the model's present size: forward, and twice that for backward."""

    @abstractmethod
    def tokens_per_batch(self, data: Any) -> int | None:
        """Training tokens of a batch of this datamodule on one device; None where it does not say."""

    @abstractmethod
    def start_evaluation(self) -> None:
        """Begin a validation or test: nothing has been seen."""

    @abstractmethod
    def evaluate(self, batch: Any) -> dict[str, Tensor]:
        """Take a batch into account; what callbacks may want to know of it."""

    @abstractmethod
    def evaluation(self, trainer: Any, stage: str) -> dict[str, Tensor]:
        """Metrics over all batches of all ranks since :meth:`start_evaluation`, by name; `stage` is val or test."""

    @abstractmethod
    def probe_loss(self, batch: Any) -> Tensor:
        """What growth must not change: the loss of a batch."""

    def twin(self) -> "TokenFormerModule":
        """A module of the same config with a model of its own, sharded alike; to hold an average."""
        other = copy.copy(self)  # without its trainer
        other._modules = copy.deepcopy({name: part for name, part in self._modules.items() if name != "model"})
        other.model = None
        other.configure_model()
        return other

    @abstractmethod
    def install(self, model: nn.Module) -> None:
        """Make this the model: as it is to be trained, checkpointed, compiled and sharded."""

    def check_recomputing(self) -> None:
        """Refuse `recompute_scores` where it would do nothing."""
        if not self.recompute_scores:
            return
        if self.checkpoint_activations:
            raise ValueError(
                "model.recompute_scores=true, model.checkpoint_activations=true: the second keeps no scores; choose one"
            )
        if self.config.baseline is not None:
            raise ValueError(f"model.recompute_scores=true: config.baseline={self.config.baseline!r} has no scores")
        if self.config.score_norm != "l2_norm_gelu":
            raise ValueError(
                f"model.recompute_scores=true: needs config.score_norm=l2_norm_gelu, not {self.config.score_norm}"
            )

    def setup(self, stage: str) -> None:
        """Refuse settings under which a resumed run could not be exact."""
        if stage != "fit":
            return
        trainer: Any = self.trainer
        every, accumulate = trainer.val_check_interval, trainer.accumulate_grad_batches
        if isinstance(every, int) and every % accumulate:
            raise ValueError(
                f"trainer.val_check_interval={every} counts batches and is no multiple of "
                f"trainer.accumulate_grad_batches={accumulate}: validations would come in the middle of a step"
            )
        if trainer.reload_dataloaders_every_n_epochs:
            raise ValueError(
                "trainer.reload_dataloaders_every_n_epochs: a new loader would repeat the same samples; leave it out"
            )

    def configure_model(self) -> None:
        """Build the model; here and not before, so that it is made on its device and in its precision."""
        if self.model is None:
            model = self.build_model()
            if self.init_from is not None:  # a checkpoint that is resumed from comes later, and wins
                start_from(model, self.init_from)
            self.install(model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the history."""
        checkpoint["growths"] = self.growths

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the size of the saved model, before its weights are loaded and anything is wrapped around it."""
        check_resumed(checkpoint, self)
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
        dim = width * self.config.dim
        if getattr(getattr(self.model, "config", None), "dim", dim) != dim:  # its contents come with the checkpoint
            self.install(self.build_model(width).to(next(self.model.parameters())))
        prefix = "model."
        shapes = {name.removeprefix(prefix): t.shape for name, t in saved.items() if name.startswith(prefix)}
        for name, layer in pattention_layers(self.model).items():
            layer.match(shapes, f"{name}.")
        self.freeze_old()

    def freeze_old(self) -> None:
        """Freeze what is older than the last growth, if that growth says so, and nothing else."""
        if not pattention_layers(self.model):
            return  # a timm model may have parameters that are never trained
        only_new = self.growths and self.growths[-1]["train"] == "new" and self._trainer is not None
        new = set(self.growths[-1]["new"]) if only_new else None
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(new is None or name in new)

    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups for the model as it is now; as many before growth as after it."""
        groups: dict[str, Any] = {"undecayed": [f"model.{name}" for name in self._undecayed()]}
        if self.old_lr_scale != 1:
            new = {f"model.{name}" for name in self.growths[-1]["new"]} if self.growths else set()
            groups["is_old"] = lambda name: bool(new) and name not in new
            groups["old_lr_scale"] = self.old_lr_scale
        if self.optim.layer_decay != 1:
            groups["layer_scale"] = self._layer_scales().__getitem__
        return param_groups(self, self.optim.weight_decay, **groups)

    def _undecayed(self) -> set[str]:
        """Matrices without weight decay; a timm model names them."""
        return self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else set()

    def _layer_scales(self) -> dict[str, float]:
        """Learning rate of each parameter over the optimizer's; a timm model says which layer it belongs to."""
        if not hasattr(self.model, "group_matcher"):
            raise ValueError(f"optim.layer_decay={self.optim.layer_decay}: this model does not name its layers")
        layers = group_parameters(self.model, self.model.group_matcher(coarse=False), reverse=True)
        last = max(layers.values())
        return {f"model.{name}": self.optim.layer_decay ** (last - layer) for name, layer in layers.items()}

    def regroup_optimizer(self) -> None:
        """Tell the optimizer of parameters that have come, or that are frozen now."""
        (optimizer,) = self.trainer.optimizers
        regroup(optimizer, self.param_groups())
        self.zero_grad()  # a frozen parameter's last gradient would count when gradients are clipped

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its per-step schedule."""
        self._max_steps = self.trainer.max_steps
        if self._max_steps < 1:
            raise ValueError(
                f"trainer.max_steps={self._max_steps}: the learning rate schedule needs the number of steps"
            )
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # a step of the warm-up is all it makes
            check_schedule(self.optim, self._max_steps, f"trainer.max_steps={self._max_steps}")
        self._scale_lr()
        # The fused update does its own unscaling in 16-mixed, where gradients must be unscaled before clipping.
        optimizer = adamw(self.param_groups(), self.optim, fused=self.trainer.precision != "16-mixed")
        self._scheduler = LambdaLR(optimizer, lambda step: self.rate_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler, "interval": "step"}}

    def _scale_lr(self) -> None:
        """The peak rate for as many samples as an optimizer step has."""
        self._peak_lr = self.optim.lr
        if self.optim.lr_batch is not None:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            if data is None:
                raise ValueError(f"optim.lr_batch={self.optim.lr_batch}: needs a datamodule, for its batch_size")
            batch = data.batch_size * data_parallel(self.trainer)[1] * self.trainer.accumulate_grad_batches
            self._peak_lr *= batch / self.optim.lr_batch
            rank_zero_info(
                f"peak learning rate {self._peak_lr:.3g}: optim.lr={self.optim.lr:g} for {self.optim.lr_batch} "
                f"{self.samples} a step, and a step has {batch}"
            )

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
        self._scheduler.base_lrs = [self._peak_lr * wanted["lr_scale"] for wanted in groups]
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
        """Seed what is random in this step; move annealed taus on, once an optimizer step."""
        part = batch_idx % self.trainer.accumulate_grad_batches
        place = (self._seed, data_parallel(self.trainer)[0], self.trainer.global_step, part)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
        if self.growths and part == 0:
            left = self.growths[-1]["anneal_until"] - self.trainer.global_step
            if left > 0:
                anneal_taus(self.model, left)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean loss of the batch."""
        loss = self.batch_loss(batch)
        self._losses.append(loss.detach())
        return spoil(loss)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, when an optimizer step is done and it is time; other steps read nothing from the device."""
        if self.trainer.global_step == self._step:  # still accumulating
            return
        self._step = self.trainer.global_step
        if is_log_step(self.trainer):
            loss = torch.stack(self._losses).mean()
            self.log("train/loss", loss, sync_dist=True)
            self.log("train/lr", self._lr)
            if self._grad_norm is not None:
                self.log("train/grad_norm", self._grad_norm)
        self._losses.clear()

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self.start_evaluation()

    def on_test_epoch_start(self) -> None:
        """Forget the last test."""
        self.start_evaluation()

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Take a batch into account."""
        return self.evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Take a batch into account."""
        return self.evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self.log_dict({f"val/{name}": value for name, value in self.evaluation(self.trainer, "val").items()})

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self.log_dict({f"test/{name}": value for name, value in self.evaluation(self.trainer, "test").items()})

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the total norm, and keep it for the log: measuring it again would be another pass.

        A step that is not finite is left out. In 16-mixed that is the GradScaler's doing, and gradients may overflow
        while it looks for its scale: there only losses tell that something is wrong.
        """
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(f"trainer.gradient_clip_algorithm={gradient_clip_algorithm!r}: only 'norm' is supported")
        self._lr = optimizer.param_groups[0]["lr"]  # with layer_decay: that of the last layers
        limit = gradient_clip_val or math.inf
        self._grad_norm = clip_grad_norm(self.parameters(), limit)
        finite = self._grad_norm.isfinite()
        if self.trainer.precision == "16-mixed":
            finite = torch.stack(self._losses).isfinite().all().float()
            finite = self.trainer.strategy.reduce(finite, reduce_op="min").bool()
        self.skipped = guard(optimizer, self.parameters(), finite)
