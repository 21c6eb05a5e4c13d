"""What the modules for language and vision share: hooks of Lightning, in the order in which it calls them.

One file: Lightning asks one class for all of them.
"""

import copy
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_modules.checkpoints.compatibility import check_resume
from lit_modules.growth.structure import anneal_tau, freeze, match_structure
from lit_modules.optim.clipping import clip_grad_norm, weigh_short_step
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.groups import groups_of, make_optimizer, module_param_groups, update_param_groups
from lit_modules.optim.schedule import LearningRate, check_schedule
from lit_modules.optim.skip_step import propagate_nonfinite, skip_if_nonfinite
from lit_modules.optim.trained import Train, as_patterns, freeze_modes, trained_names
from lit_modules.runs.length import num_steps
from lit_modules.runs.logs import is_log_step
from lit_modules.runs.options import refuse_callbacks, refuse_settings
from lit_modules.strategies.ranks import data_parallel_rank
from tokenformer.config import BackboneConfig
from tokenformer.interop import initial_structure, load_initial_weights
from tokenformer.parts import match_shapes

Model = TypeVar("Model", bound=nn.Module)


class TokenFormerModule(LightningModule, ABC):
    """Base of a module that trains one model, `self.model`, and whose model may grow.

    Logs `train/loss`, `train/lr` and `train/grad_norm` every `trainer.log_every_n_steps` optimizer steps, the loss
    averaged over the batches of the step and over all ranks. What is random in a step depends on the seed, the step
    and the rank alone, so a resumed run draws the same.

    Attributes:
        config: of the model before any growth.
        trained: which parameters are, `model.train`.
        checkpoint_activations: whether only each block's input is kept for the backward pass.
        recompute_scores: whether Pattention layers keep no scores for it.
        growths: one record of each growth so far, oldest first; goes into the checkpoint.
        learning_rate: its peak and its schedule.
        old_lr_scale: rate of the parameters from before the last growth, over that of the new ones.
        skipped: float32 (), 1 if the last optimizer step was skipped since it was not finite, else 0.
    """

    config: BackboneConfig
    checkpoint_activations: bool
    recompute_scores: bool
    samples: ClassVar[str]  # what a batch consists of, for the log
    predict_option: ClassVar[str]  # what `tokenformer predict` needs, to be shown to the user

    def __init__(self, optim: OptimConfig, init_from: str | None = None, train: Train = "all") -> None:
        super().__init__()
        self.optim, self.init_from, self.trained = optim, init_from, train
        self.model: Any = None
        self.growths: list[dict[str, Any]] = []
        self.learning_rate = LearningRate(optim)
        self.old_lr_scale = 1.0
        self.skipped: Tensor | None = None
        self._initial_shapes: dict[str, torch.Size] | None = None  # of the tensors in `init_from`
        self._head_fits = True  # whether `init_from` has the data's classes, if it says them
        self._head_is_new = False  # since `init_from` has other classes, or it is what `train` asks for
        self._overfits = False  # trains on the same few batches again and again
        self._seed = torch.initial_seed()
        self._losses: list[Tensor] = []  # of the batches of this optimizer step
        self._grad_norm: Tensor | None = None
        self._lr = 0.0  # of this optimizer step; its scheduler moves on before the log is written

    # What a module for language or vision says.

    @abstractmethod
    def build_model(self, width: int = 1) -> nn.Module:
        """The model before any growth, `width` times as wide."""

    @abstractmethod
    def set_model(self, model: nn.Module) -> None:
        """Make this the model: as it is to be trained, checkpointed, compiled and sharded."""

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """What is minimised: the mean loss of a training batch."""

    @abstractmethod
    def probe_loss(self, batch: Any) -> Tensor:
        """What growth must not change: the loss of a batch."""

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
    def start_evaluation(self, trainer: Any, stage: str) -> None:
        """Begin a validation or test (val, test): nothing has been seen."""

    @abstractmethod
    def evaluate(self, batch: Any, dataset: int = 0) -> dict[str, Tensor]:
        """Take a batch of one of the loaders into account; what callbacks may want to know of it."""

    @abstractmethod
    def evaluation(self, trainer: Any, stage: str) -> dict[str, Tensor]:
        """Metrics over all batches of all ranks since :meth:`start_evaluation`, by name; `stage` is val or test."""

    # What callbacks and strategies ask for.

    def start_structure(self, model: Model) -> Model:
        """The model with the segments of `init_from`, where it starts from a model that has grown."""
        if self.init_from is not None:
            if self._initial_shapes is None:
                self._initial_shapes = initial_structure(self.init_from)[1]
            match_shapes(model, self._initial_shapes)
        return model

    def empty_copy(self) -> "TokenFormerModule":
        """A module of the same config with a model of its own, sharded alike; to hold an average."""
        other = copy.copy(self)  # without its trainer
        other._modules = copy.deepcopy({name: part for name, part in self._modules.items() if name != "model"})
        other.model = None
        other.configure_model()
        return other

    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups for the model as it is now; as many before growth as after it."""
        return module_param_groups(self)

    def update_optimizer(self) -> None:
        """Tell the optimizer of parameters that have come, or that are frozen now."""
        own = self.learning_rate.scheduler is None  # it was made by the `configure_optimizers` of a subclass
        update_param_groups(self.trainer.optimizers[0], groups_of(self) if own else self.param_groups())
        self.zero_grad()  # a frozen parameter's last gradient would count when gradients are clipped

    def apply_learning_rate(self) -> None:
        """Let the configured rates hold from this step on, whatever the optimizer has."""
        self.learning_rate.apply(self.trainer.optimizers[0], self.param_groups())

    # Lightning's hooks: the start.

    def configure_callbacks(self) -> list[Callback]:
        """Have none, but refuse what can be refused: no other hook comes before the data is prepared."""
        if self.trainer.training:
            self.setup("fit")
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if hasattr(callback, "check_settings"):
                    callback.check_settings(self.trainer, self)
        return []

    def setup(self, stage: str) -> None:
        """Refuse what can't work, for a trainer that no command line has looked at."""
        trainer: Any = self.trainer
        if stage == "fit":
            refuse_settings(trainer, trainer.world_size)
            refuse_callbacks(type(c) for c in trainer.callbacks if not isinstance(c, Timer))  # that of `max_time`
            if self.trained != "all":
                with torch.device("meta"):
                    trained_names(self.build_model(), self.trained)
            own = type(self).configure_optimizers is not TokenFormerModule.configure_optimizers
            if trainer.max_steps >= 0 and not own:  # else its epochs say, when the loaders are known
                self._set_num_steps(trainer.max_steps, f"trainer.max_steps={trainer.max_steps}")
        if getattr(trainer, "overfit_batches", 0) and hasattr(getattr(trainer, "datamodule", None), "order"):
            if self.learning_rate.restarts:
                raise ValueError("trainer.overfit_batches: the first batches are of one phase: give other data")
            # Lightning has limited the batches by it, and would give the loaders samplers; ours have no use for one.
            self._overfits, trainer.overfit_batches = True, 0.0

    def configure_model(self) -> None:
        """Build the model; here and not before, so that it is made on its device and in its precision."""
        if self.model is None:
            model = self.build_model()
            if self.init_from is not None:  # a checkpoint that is resumed from comes later, and wins
                self._head_is_new = load_initial_weights(model, self.init_from, self._head_fits)
            if "head" in as_patterns(self.trained):
                model.reset_classifier(self.config.num_classes)  # type: ignore[operator, attr-defined]
                self._head_is_new = True
            self.set_model(model)
            freeze(self)

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which what is frozen by `model.train` stays in eval mode."""
        super().train(mode)
        if mode and self.trained != "all" and self.model is not None:
            freeze_modes(self.model, self.trained)
        return self

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the size of the saved model, before its weights are loaded and anything is wrapped around it."""
        check_resume(checkpoint, self)
        self._head_is_new = False
        if "state_dict" in checkpoint:  # else the strategy, which has loaded the weights already, has done it
            match_structure(self, checkpoint["state_dict"], checkpoint.get("growths", []))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or Muon, and its per-step schedule."""
        self.learning_rate.peak = self._peak_lr()
        # The fused update does its own unscaling in 16-mixed, where gradients must be unscaled before clipping.
        optimizer = make_optimizer(self.param_groups(), self.optim, fused=self.trainer.precision != "16-mixed")
        schedule: Any = {"scheduler": self.learning_rate.attach(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _set_num_steps(self, steps: int, what: str) -> None:
        """Fit the schedule into so many steps; -1: without a limit."""
        if steps == 0 or (steps < 0 and self.optim.schedule != "constant"):
            raise ValueError(
                f"{what}: optim.schedule={self.optim.schedule} needs the number of steps: give trainer.max_steps or "
                "trainer.max_epochs, or optim.schedule=constant"
            )
        starts = getattr(getattr(self.trainer, "datamodule", None), "phase_starts", {})
        self.learning_rate.restarts, self.learning_rate.max_steps = list(starts.values()), steps
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # a step of the warm-up is all it makes
            return
        check_schedule(self.optim, steps, what)
        for (name, start), end in zip(starts.items(), [*starts.values(), steps][1:], strict=False):
            check_schedule(self.optim, end - start, f"the {end - start} steps of phase {name}")

    def _peak_lr(self) -> float:
        """The peak rate for as many samples as an optimizer step has."""
        lr, meant_for = self.optim.lr, self.optim.lr_batch
        if meant_for is None:
            return lr
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise ValueError(f"optim.lr_batch={meant_for}: needs a datamodule, for its batch_size")
        batch = data.batch_size * data_parallel_rank(self.trainer)[1] * self.trainer.accumulate_grad_batches
        peak = lr * batch / meant_for
        rank_zero_info(
            f"peak learning rate {peak:.3g}: optim.lr={lr:g} for {meant_for} {self.samples} a step, "
            f"and a step has {batch}"
        )
        return peak

    def on_train_start(self) -> None:
        """After a resume the configured rates hold, not those that the checkpoint brought along."""
        self._step = self.trainer.global_step
        if self.trainer.max_steps < 0 and self.learning_rate.scheduler is not None:
            steps = num_steps(self.trainer)
            of_epochs = f"trainer.max_epochs={self.trainer.max_epochs}, {steps} steps"
            self._set_num_steps(steps, of_epochs if steps >= 0 else "trainer.max_steps=-1")
        self.apply_learning_rate()

    def on_train_epoch_start(self) -> None:
        """With `overfit_batches` the first batches come again, their augmentations too."""
        loader: Any = self.trainer.train_dataloader
        if self._overfits and self.trainer.current_epoch > 0:
            loader.load_state_dict({"position": 0})

    # A training step.

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what is random in this step; move annealed taus on, once an optimizer step."""
        part = batch_idx % self.trainer.accumulate_grad_batches
        place = (self._seed, data_parallel_rank(self.trainer)[0], self.trainer.global_step, part)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
        if part == 0:
            anneal_tau(self, self.trainer.global_step)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean loss of the batch."""
        loss = self.batch_loss(batch)
        self._losses.append(loss.detach())
        return propagate_nonfinite(loss)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the total norm, and keep it for the log: measuring it again would be another pass.

        A step that is not finite is skipped. In 16-mixed that is the GradScaler's doing, and gradients may overflow
        while it looks for its scale: there only losses tell that something is wrong.
        """
        weigh_short_step(self.parameters(), len(self._losses), self.trainer.accumulate_grad_batches)
        self._lr = optimizer.param_groups[0]["lr"]  # with layer_decay: that of the last layers
        self._grad_norm = clip_grad_norm(self.parameters(), gradient_clip_val or math.inf)
        finite = self._grad_norm.isfinite()
        if self.trainer.precision == "16-mixed":
            finite = torch.stack(self._losses).isfinite().all().float()
            finite = self.trainer.strategy.reduce(finite, reduce_op="min").bool()
        self.skipped = skip_if_nonfinite(optimizer, self.parameters(), finite)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, when an optimizer step is done and it is time; other steps read nothing from the device."""
        if self.trainer.global_step == self._step:  # still accumulating
            return
        self._step = self.trainer.global_step
        if is_log_step(self.trainer):
            self.log("train/loss", torch.stack(self._losses).mean(), sync_dist=True)
            self.log("train/lr", self._lr)
            if self._grad_norm is not None:
                self.log("train/grad_norm", self._grad_norm)
        self._losses.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the history."""
        checkpoint["growths"] = self.growths

    # Validation and test.

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self.start_evaluation(self.trainer, "val")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Take a batch into account."""
        return self.evaluate(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self.log_dict({f"val/{name}": value for name, value in self.evaluation(self.trainer, "val").items()})

    def on_test_epoch_start(self) -> None:
        """Forget the last test."""
        self.start_evaluation(self.trainer, "test")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Take a batch into account."""
        return self.evaluate(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self.log_dict({f"test/{name}": value for name, value in self.evaluation(self.trainer, "test").items()})
