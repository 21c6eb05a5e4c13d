"""Parameter tokens that are appended while a model trains."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_modules.callbacks.ema import averages_of
from lit_modules.callbacks.throughput import Throughput
from lit_modules.growth.history import describe, write_growths
from lit_modules.growth.recipe import Recipe, grow_modules, rehearse
from lit_modules.growth.stages import Stage, check_first, check_order, check_past, check_room, phase_at, with_steps
from lit_modules.growth.structure import freeze
from lit_modules.modules.base import TokenFormerModule
from lit_modules.optim.trained import Train, check_grown
from lit_modules.runs.length import num_steps
from lit_modules.strategies.fsdp2 import FSDP2
from lit_modules.strategies.new_parameters import check_strategy, register_new_parameters
from lit_modules.strategies.ranks import data_parallel_rank, require_equal_ranks
from lit_modules.strategies.sharding import check_divisible
from tokenformer.growth import Init, ScaleAfter
from tokenformer.matched_keys import matched_key_stds, measuring_scores
from tokenformer.parts import match_shapes


class GrowParameterTokens(Callback):
    """Appends parameter tokens to the model at set moments of its training. The loss does not move.

    Growth comes before an optimizer step, never between the batches that it accumulates. Each writes a row to
    `growth.csv` in the run's folder. The checkpoint says how far the model has grown; a resumed run continues from
    there, and may have further stages, but not other ones in the past.

    Args:
        stages: when and how far, in order.
        init: how new tokens start: anchored, zero_keys, segment_norm, pairs, split (all exact), random (the paper's).
        train: all, or new: freeze what is older than the last growth; [new, head], or patterns of names: but for these.
        schedule: restart: the learning rate has a new warm-up and decay in each stage; continue: as without growth.
        scale: tau after growth: fixed; anneal to sqrt(tokens) within `anneal_steps`; learned (a trained gain for layers
            that have none); current (jumps to sqrt(tokens): the released code, not exact).
        anneal_steps: optimizer steps of `scale: anneal`.
        old_lr_scale: learning rate of what is older than the last growth, over that of the new tokens.
        layers: all, or which: some of query, key, value, out, ffn, or patterns of layer names (`*.blocks.0.*`).
        seed: of the new tokens.
        verify: stop if the loss of a batch differs before and after growth.

    Raises:
        ValueError: before training, for schedules that can't be followed: see the messages.
        RuntimeError: at growth, when the loss has moved, or processes no longer hold the same bits.
    """

    def __init__(
        self,
        stages: list[Stage],
        init: Init = "anchored",
        train: Train = "all",
        schedule: Literal["continue", "restart"] = "restart",
        scale: ScaleAfter = "fixed",
        anneal_steps: int = 1000,
        old_lr_scale: float = 1.0,
        layers: str | list[str] = "all",
        seed: int = 0,
        verify: bool = True,
    ) -> None:
        self.stages = [Stage.from_dict(stage) if isinstance(stage, dict) else stage for stage in stages]
        self.recipe = Recipe(init=init, scale=scale, layers=layers, seed=seed, train=train)
        self.schedule, self.anneal_steps = schedule, anneal_steps
        self.old_lr_scale, self.verify = old_lr_scale, verify
        self._saved_stages: list[dict[str, Any]] = []  # those that the checkpoint's run had
        self._best, self._bad = math.inf, 0  # of the metric of a plateau; validations since
        self._check_stages()

    def _check_stages(self) -> None:
        if not self.stages:
            raise ValueError("stages: give at least one, such as {at_step: 1000, factor: 2.0}")
        if self.schedule not in ("continue", "restart"):
            raise ValueError(f"schedule={self.schedule!r}: choose continue or restart")
        if self.anneal_steps < 1:
            raise ValueError(f"anneal_steps={self.anneal_steps}: must be at least 1")
        if self.old_lr_scale < 0:
            raise ValueError(f"old_lr_scale={self.old_lr_scale}: must be at least 0; train: new freezes old parameters")
        wide = any(stage.width for stage in self.stages)
        if wide and (self.recipe.train != "all" or self.old_lr_scale != 1):
            raise ValueError("width: all weights of a wider baseline are new: set train: all and old_lr_scale: 1")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, TokenFormerModule):
            raise ValueError(f"GrowParameterTokens grows the modules of this project, not {type(pl_module).__name__}")
        pl_module.old_lr_scale = self.old_lr_scale

    def check_settings(self, trainer: Trainer, pl_module: TokenFormerModule) -> None:
        """Refuse what can't be grown so; before any data is prepared."""
        self.stages = with_steps(self.stages, getattr(trainer, "datamodule", None))
        check_first(self.stages[0], pl_module.init_from)
        check_strategy(trainer.strategy)
        if isinstance(trainer.strategy, FSDP2):
            self._check_sharded(pl_module)
        if any(stage.on_plateau for stage in self.stages) and not trainer.limit_val_batches:
            raise ValueError("on_plateau needs validations: trainer.limit_val_batches is 0")
        if self.verify and self.recipe.init == "split" and str(trainer.precision) in ("bf16-true", "16-true"):
            raise ValueError(f"init: split rounds values in {trainer.precision}: set verify: false, or choose another")
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # which ends before any of them
            check_order(self.stages, [stage.at_step for stage in self.stages], trainer.max_steps)
        with torch.device("meta"):
            model = pl_module.build_model()
            names = set(dict(model.named_parameters()))
            for grown in rehearse(model, self.stages, self.recipe, self.verify):
                names = check_grown(grown, names, pl_module.trained)
                if isinstance(trainer.strategy, FSDP2):
                    check_divisible(grown, trainer.strategy.tensor_parallel_size)
        known = trainer.max_steps > 0 and all(stage.at_step is not None for stage in self.stages)
        if known and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._check_room([stage.at_step for stage in self.stages], trainer, pl_module)

    def _check_room(self, steps: list[int | None], trainer: Trainer, module: TokenFormerModule) -> None:
        anneal_steps = self.anneal_steps if self.recipe.scale == "anneal" else 0
        check_room(steps, num_steps(trainer), module.learning_rate, self.schedule == "restart", anneal_steps)

    def _check_sharded(self, module: TokenFormerModule) -> None:
        """What can't be done to parameters of which each process has a part."""
        if self.recipe.init == "split":
            raise ValueError("init: split divides the old values, which no process has whole in FSDP2: choose another")
        if not all(stage.adds_tokens for stage in self.stages):
            raise ValueError("width, lora: a baseline can't grow in FSDP2; use ddp")
        if self.recipe.scale == "learned" and module.config.scale != "learned":
            raise ValueError("scale: learned in FSDP2 needs model.config.scale: learned from the start")

    def _steps(self, trainer: Trainer, module: TokenFormerModule) -> list[int | None]:
        """The step before which each stage came or will come; None where that shows only in the training."""
        past = [record["step"] for record in module.growths if record["stage"] is not None]
        data = getattr(trainer, "datamodule", None)
        per_batch = None if data is None else module.tokens_per_batch(data)
        steps: list[int | None] = []
        for stage in self.stages[len(past) :]:
            step = stage.at_step
            if stage.at_tokens is not None and per_batch is not None:
                per_step = per_batch * data_parallel_rank(trainer)[1] * trainer.accumulate_grad_batches
                missing = stage.at_tokens - self._counter(trainer).tokens
                step = trainer.global_step + max(0, math.ceil(missing / per_step))
            steps.append(step)
        return past + steps

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.learning_rate.scheduler is None and (self.schedule == "restart" or self.old_lr_scale != 1):
            raise ValueError(
                f"schedule: {self.schedule} and old_lr_scale: {self.old_lr_scale} need the module's own optimizer; "
                "with one of yours set schedule: continue and old_lr_scale: 1"
            )
        if pl_module.learning_rate.scheduler is None:
            pl_module.update_optimizer()  # tells at once if it can't be
        applied, tokens = self._applied(pl_module), self._counter(trainer).tokens
        check_past(self.stages, self._saved_stages, pl_module.growths, trainer.global_step, tokens)
        if self.stages[applied : applied + 1] != [*map(Stage.from_dict, self._saved_stages[applied : applied + 1])]:
            self._best, self._bad = math.inf, 0  # of another metric, maybe
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            steps = self._steps(trainer, pl_module)
            check_order(self.stages, steps, num_steps(trainer))
            self._check_room(steps, trainer, pl_module)
        # From the size that the model has now, which need not be the configured one.
        with torch.device("meta"):
            model = pl_module.build_model(pl_module.model.config.dim // pl_module.config.dim)
        shapes = {name: tensor.shape for name, tensor in pl_module.model.state_dict().items()}
        match_shapes(model, shapes)
        list(rehearse(model, self.stages[applied:], self.recipe, self.verify))
        self._set_lr_span(trainer, pl_module)

    def _applied(self, module: TokenFormerModule) -> int:
        """How many of the stages the model has grown by."""
        return sum(record["stage"] is not None for record in module.growths)

    def _set_lr_span(self, trainer: Trainer, module: TokenFormerModule) -> None:
        if self.schedule == "continue":
            module.learning_rate.span = None
            return
        start = max((record["step"] for record in module.growths), default=0)
        ahead = self._steps(trainer, module)[self._applied(module) :][:1]
        module.learning_rate.span = (start, num_steps(trainer) if ahead in ([], [None]) else ahead[0])  # type: ignore[assignment]

    def _counter(self, trainer: Trainer) -> Throughput:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                return callback
        raise ValueError("GrowParameterTokens needs the callback Throughput, which counts tokens and FLOPs")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        pending = self.stages[self._applied(pl_module) :]
        if not pending or (plateau := pending[0].on_plateau) is None:
            return
        if plateau.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"on_plateau.monitor={plateau.monitor!r} is not logged: "
                f"choose one of {', '.join(sorted(trainer.callback_metrics))}"
            )
        value = float(trainer.callback_metrics[plateau.monitor]) * (1 if plateau.mode == "min" else -1)
        if trainer.sanity_checking:
            return
        if value < self._best - plateau.min_delta:
            self._best, self._bad = value, 0
        else:
            self._bad += 1

    def _is_due(self, stage: Stage, trainer: Trainer, module: TokenFormerModule) -> bool:
        if stage.at_step is not None:
            return trainer.global_step >= stage.at_step
        if stage.at_tokens is not None:
            due = self._counter(trainer).tokens >= stage.at_tokens
            data = getattr(trainer, "datamodule", None)
            alike = data is not None and module.tokens_per_batch(data) is not None
            return due if alike else trainer.strategy.broadcast(due)  # as the first process has counted
        assert stage.on_plateau is not None
        return self._bad >= stage.on_plateau.patience

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pending = self.stages[self._applied(pl_module) :]
        begins_step = batch_idx % trainer.accumulate_grad_batches == 0
        if begins_step and pending and self._is_due(pending[0], trainer, pl_module):
            self._grow(trainer, pl_module, pending[0], batch)

    def _grow(self, trainer: Trainer, module: TokenFormerModule, stage: Stage, batch: Any) -> None:
        start = time.perf_counter()
        loss_before = self._look(trainer, module, module.probe_loss, batch)
        matched = self.recipe.init == "anchored" and stage.adds_tokens
        key_stds = self._matched_key_stds(trainer, module, batch) if matched else None
        averages = averages_of(trainer)
        record = {
            "stage": self._applied(module) + 1,
            "step": trainer.global_step,
            "tokens": self._counter(trainer).tokens,
            "flops": self._counter(trainer).flops,
            "anneal_until": trainer.global_step + self.anneal_steps if self.recipe.scale == "anneal" else 0,
        } | grow_modules([module, *averages], stage, self.recipe, key_stds)
        require_equal_ranks(trainer.strategy, [grown.model for grown in (module, *averages)])
        module.growths = [*module.growths, record]
        freeze(module)
        register_new_parameters(trainer.strategy)
        torch.compiler.reset()  # else torch.compile gives up after a few sizes and says so in a warning only
        module.update_optimizer()
        self._best, self._bad = math.inf, 0
        self._set_lr_span(trainer, module)
        module.apply_learning_rate()
        loss_after = self._look(trainer, module, module.probe_loss, batch)
        record |= phase_at(trainer) | {"loss_before": float(loss_before), "loss_after": float(loss_after)}
        record["seconds"] = time.perf_counter() - start
        self._counter(trainer).exclude(record["seconds"])
        if self.verify:
            self._compare(trainer, loss_before, loss_after)
        if trainer.is_global_zero:
            write_growths(Path(trainer.default_root_dir) / "growth.csv", module.growths)
        rank_zero_info(
            f"grown at step {record['step']:,} ({record['tokens']:,} tokens): {describe(record)}, loss of a batch "
            f"{record['loss_before']:.6f} -> {record['loss_after']:.6f}, {record['seconds']:.2f} s"
        )

    def _matched_key_stds(self, trainer: Trainer, module: TokenFormerModule, batch: Any) -> dict[str, float]:
        """Of all processes' batches, so that one process finds the same as several that share its batch."""
        with measuring_scores(module.model) as sums:
            self._look(trainer, module, module.batch_loss, batch)
        everywhere = trainer.strategy.reduce(torch.stack(list(sums.values())), reduce_op="sum")
        return matched_key_stds(module.model, dict(zip(sums, everywhere, strict=True)))

    def _look(self, trainer: Trainer, module: TokenFormerModule, loss_of: Any, batch: Any) -> Tensor:
        """The loss of a batch, without a trace in the model."""
        training = module.training
        module.model.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
            loss = loss_of(batch)
        module.train(training)  # but what is frozen
        if isinstance(trainer.strategy, FSDP2):
            trainer.strategy.reshard()
        return loss

    def _compare(self, trainer: Trainer, before: Tensor, after: Tensor) -> None:
        precision = str(trainer.precision)
        if "16" in precision:  # `split` divides values, which rounds; others are equal but for another order of sums
            tolerance = 2**-8 if self.recipe.init == "split" else 5e-4
        else:
            tolerance = 1e-10 if "64" in precision else 1e-5
        # Of the loss, or of 1 where it is smaller: a loss near 0 has no more digits than one near 1.
        moved = ((after.double() - before.double()).abs() / before.double().abs().clamp_min(1)).float()
        moved = trainer.strategy.reduce(moved, reduce_op="max")  # so that all processes stop together
        if not moved <= tolerance:
            raise RuntimeError(
                f"verify: growth moved the loss of a batch by {float(moved):.2e} of it, from {float(before):.6f} to "
                f"{float(after):.6f} in this process; {tolerance:.0e} is allowed in {precision}. "
                "Nothing was trained on; the last checkpoint is from before the growth."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"stages": [asdict(stage) for stage in self.stages], "best": self._best, "bad": self._bad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_stages = state_dict["stages"]
        self._best, self._bad = state_dict["best"], state_dict["bad"]
