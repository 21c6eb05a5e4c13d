"""LanguageModule: training, evaluation and prediction of a causal language model. B batch, T sequence."""

import math
from dataclasses import asdict
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from lit_modules.loggers import is_log_step
from lit_modules.optim import OptimConfig, adamw, lr_scheduler
from tokenformer import LMConfig, TokenFormerLM

Batch = tuple[Tensor, Tensor]  # input_ids (B, T), targets (B, T), -100 where a target does not count


class LanguageModule(LightningModule):
    """A TokenFormer (or its Transformer twin: `config.baseline`) that learns to predict the next token.

    Logs `train/loss`, `train/lr` and `train/grad_norm` every `trainer.log_every_n_steps` optimizer steps, the loss
    averaged over the batches of the step and over all ranks; and `val/loss` (nats a token), `val/perplexity`,
    `val/bits_per_byte` and `val/entropy` (mean entropy of the predictions, nats), over all tokens.

    Args:
        config: sizes and options of the model.
        optim: AdamW and its schedule.
        compile: compile each block with torch.compile: a minute at the start, faster steps.
        checkpoint_activations: keep only each block's input for the backward pass; less memory, a third more work.
    """

    def __init__(
        self,
        config: LMConfig,
        optim: OptimConfig,
        compile: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        # From a checkpoint they come as dictionaries, since nothing else is stored: no code runs when one is read.
        self.config = LMConfig(**config) if isinstance(config, dict) else config
        self.optim = OptimConfig(**optim) if isinstance(optim, dict) else optim
        self.compile_blocks, self.checkpoint_activations = compile, checkpoint_activations
        self.save_hyperparameters({"config": asdict(self.config), "optim": asdict(self.optim)})
        self.model: TokenFormerLM | None = None
        self.val_nats, self.val_entropy = MeanMetric().set_dtype(torch.float64), MeanMetric().set_dtype(torch.float64)
        self._losses: list[Tensor] = []  # of the batches of this optimizer step
        self._grad_norm: Tensor | None = None
        self._lr = 0.0  # of this optimizer step; its scheduler moves on before the log is written

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token at the present size: forward and twice that for backward, no recomputation."""
        return 3 * self.config.flops_per_token()

    def configure_model(self) -> None:
        """Build the model; here and not before, so that it is made on its device and in its precision."""
        if self.model is None:
            self.model = TokenFormerLM(self.config)
            self.model.backbone.checkpoint_activations = self.checkpoint_activations
            if self.compile_blocks:
                for block in self.model.backbone.blocks:
                    block.compile()

    def setup(self, stage: str) -> None:
        """Check model and data against each other before any work is done."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        if data.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"model.config.vocab_size={self.config.vocab_size} but the tokenizer makes ids up to "
                f"{data.vocab_size - 1}: set it to at least {data.vocab_size}"
            )
        if data.seq_len > self.config.max_seq_len:
            raise ValueError(
                f"data.seq_len={data.seq_len} is longer than model.config.max_seq_len={self.config.max_seq_len}"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its per-step schedule."""
        max_steps = self.trainer.max_steps
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]  # a step of the warm-up is all it makes
            max_steps = self.optim.warmup_steps + 1
        if max_steps < 1:
            raise ValueError(f"trainer.max_steps={max_steps}: the learning rate schedule needs the number of steps")
        # The fused update does its own unscaling in 16-mixed, where gradients must be unscaled before clipping.
        optimizer = adamw(self, self.optim, fused=self.trainer.precision != "16-mixed")
        scheduler = lr_scheduler(optimizer, self.optim, max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """After a resume the configured rates hold, not those that the checkpoint brought along."""
        (optimizer,), (scheduler,) = self.trainer.optimizers, (c.scheduler for c in self.trainer.lr_scheduler_configs)
        assert isinstance(scheduler, LambdaLR)
        scheduler.base_lrs = [self.optim.lr for _ in scheduler.base_lrs]
        rate = self.optim.lr * scheduler.lr_lambdas[0](scheduler.last_epoch)
        for group, weight_decay in zip(optimizer.param_groups, (self.optim.weight_decay, 0.0), strict=True):
            group |= {"lr": rate, "initial_lr": self.optim.lr, "weight_decay": weight_decay}
            group |= {"betas": self.optim.betas, "eps": self.optim.eps}

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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch in nats."""
        loss = self._model.loss(*batch)
        self._losses.append(loss.detach())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log, when an optimizer step is done and it is time; other steps read nothing from the device."""
        if len(self._losses) < self.trainer.accumulate_grad_batches:
            return
        if is_log_step(self.trainer):
            loss = torch.stack(self._losses).mean()
            self.log("train/loss", loss, sync_dist=True)
            self.log("train/lr", self._lr)
            if self._grad_norm is not None:
                self.log("train/grad_norm", self._grad_norm)
        self._losses.clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the sums."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the sums."""
        self._evaluate(batch)

    def _evaluate(self, batch: Batch) -> None:
        nats, entropy = self._model.nats_and_entropy(*batch)
        counts = (batch[1] != -100).double()
        self.val_nats.update(nats.double(), counts)
        self.val_entropy.update(entropy.double(), counts)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all tokens of all ranks."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over all tokens of all ranks."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        nats, entropy = self.val_nats.compute(), self.val_entropy.compute()
        self.val_nats.reset()
        self.val_entropy.reset()
        metrics = {"loss": nats, "perplexity": nats.exp(), "entropy": entropy}
        split = getattr(getattr(self.trainer, "datamodule", None), stage, None)
        if split is not None:
            metrics["bits_per_byte"] = nats / math.log(2) * split.split.tokens / split.split.bytes
        self.log_dict({f"{stage}/{name}": value.float() for name, value in metrics.items()})

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Id, cross-entropy and entropy, in nats, of every target that counts."""
        nats, entropy = self._model.nats_and_entropy(*batch)
        counts = batch[1] != -100
        return {"id": batch[1][counts], "nats": nats[counts], "entropy": entropy[counts]}

    @property
    def _model(self) -> TokenFormerLM:
        assert self.model is not None, "configure_model comes first"
        return self.model
