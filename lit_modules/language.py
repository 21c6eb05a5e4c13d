"""LanguageModule: training, evaluation and prediction of a causal language model. B batch, T sequence."""

import math
from dataclasses import asdict
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lit_modules.loggers import is_log_step
from lit_modules.optim import OptimConfig, adamw, lr_scheduler
from tokenformer import LMConfig, TokenFormerLM
from tokenformer.loss import IGNORE

Batch = tuple[Tensor, Tensor]  # input_ids (B, T), targets (B, T), IGNORE where a target does not count


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
        self._losses: list[Tensor] = []  # of the batches of this optimizer step
        self._grad_norm: Tensor | None = None
        self._lr = 0.0  # of this optimizer step; its scheduler moves on before the log is written

    def training_flops(self, batch: Batch) -> int:
        """FLOPs that a batch costs at the model's present size: forward, and twice that for backward."""
        ids, _ = batch
        return 3 * ids.numel() * self._model.flops_per_token(ids.shape[1])

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to train on from averaged weights with the optimizer state of others."""
        if "current_model_state" not in checkpoint or self._trainer is None or not self.trainer.training:
            return
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, WeightAveraging) for callback in callbacks):
            raise ValueError("the checkpoint was trained with EMA, this run is not: add --trainer.callbacks+=EMA")

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
        self._step = self.trainer.global_step
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

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the sums."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the sums."""
        self._evaluate(batch)

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self._start_sums()

    def on_test_epoch_start(self) -> None:
        """Start the sums anew."""
        self._start_sums()

    def _start_sums(self) -> None:
        # Plain sums, since torchmetrics' weighted mean either leaves out NaN or forgets the weights (1.9).
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self._sums = torch.zeros(3, dtype=wide, device=self.device)  # nats, entropy, tokens

    def _evaluate(self, batch: Batch) -> None:
        nats, entropy = self._model.nats_and_entropy(*batch)
        self._sums += torch.stack([x.to(self._sums.dtype).sum() for x in (nats, entropy, batch[1] != IGNORE)])

    def on_validation_epoch_end(self) -> None:
        """Log the means over all tokens of all ranks."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over all tokens of all ranks."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        assert isinstance(sums, Tensor)
        nats, entropy = sums[:2] / sums[2]
        metrics = {"loss": nats, "perplexity": nats.exp(), "entropy": entropy}
        split = getattr(getattr(self.trainer, "datamodule", None), stage, None)
        if split is not None:
            metrics["bits_per_byte"] = nats / math.log(2) * split.split.tokens / split.split.bytes
        self.log_dict({f"{stage}/{name}": value.float() for name, value in metrics.items()})

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Id, cross-entropy and entropy, in nats, of every target that counts."""
        nats, entropy = self._model.nats_and_entropy(*batch)
        counts = batch[1] != IGNORE
        return {"id": batch[1][counts], "nats": nats[counts], "entropy": entropy[counts]}

    @property
    def _model(self) -> TokenFormerLM:
        assert self.model is not None, "configure_model comes first"
        return self.model
