"""When checkpoints are saved, and which are kept."""

import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_modules.checkpoints.reading import read_header
from lit_modules.checkpoints.validation import step_of
from lit_modules.checkpoints.writing import AtomicCheckpointIO
from lit_modules.runs.errors import RunError

ACCUMULATE = "accumulate_grad_batches"  # of the run that wrote a checkpoint: Lightning counts batches, not steps


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that keeps as many as it is told to, however often the run was killed, resumed or moved.

    ModelCheckpoint would keep each one that a run has been resumed from too, those that a killed process had still to
    remove, and all of a folder that has another path now or had a larger `save_top_k`; and it would never save what a
    process had still to save when it was killed, after another callback had saved the same step.
    """

    _saved: dict[str, Any] | None = None  # its state in the checkpoint that the run is resumed from
    _source: Path | None = None  # a checkpoint of this step, to be copied and not written anew

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._resume(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resume(trainer)  # of a run that was killed at its last step, for which nothing else is called

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Of every checkpoint, whoever saves it: with what we would save of the same step."""
        if self._is_due(trainer) and "callbacks" in checkpoint:
            checkpoint["callbacks"][self.state_key] |= {"due": self._monitor_candidates(trainer)}

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether the validation that ends here is one to save after."""
        every = self._every_n_epochs
        return bool(trainer.validating) and every >= 1 and (trainer.current_epoch + 1) % every == 0

    def _resume(self, trainer: Trainer) -> None:
        resumed = Path(trainer.ckpt_path or "").resolve()
        saved, self._saved = self._saved, None
        if saved is not None and resumed.parent == Path(str(self.dirpath)).resolve():
            self._resume_from(saved, trainer, resumed.name)

    def _resume_from(self, saved: dict[str, Any], trainer: Trainer, resumed: str) -> None:
        """Keep what is here of the saved ones; remove the others from before the step that the run is resumed from."""
        folder = Path(str(self.dirpath))
        steps = {path.name: step_of(path) for path in folder.glob("*.ckpt")} if trainer.is_global_zero else {}
        due = saved.get("due")
        for name, step in steps.items():  # what another callback saved first at that step does not have our last save
            if step == trainer.global_step and self._has_named(name):
                with suppress(ValueError):  # corrupted
                    saved, due = read_header(folder / name)["callbacks"].get(self.state_key, saved), None
        saved, due, steps = trainer.strategy.broadcast((saved, due, steps))
        kept = {Path(path).name: score for path, score in saved["best_k_models"].items() if Path(path).name in steps}
        worst = max if self.mode == "min" else min
        while len(kept) > self.save_top_k >= 0:
            del kept[worst(kept, key=kept.__getitem__)]
        self.best_k_models = {str(folder / name): score for name, score in kept.items()}
        if kept:
            self.kth_best_model_path = worst(self.best_k_models, key=self.best_k_models.__getitem__)
            self.kth_value = self.best_k_models[self.kth_best_model_path]
        for attribute in ("best_model_path", "last_model_path"):
            if (name := Path(saved.get(attribute) or "").name) in steps:
                setattr(self, attribute, str(folder / name))
        known = {*kept, resumed, Path(self.best_model_path).name, Path(self.last_model_path).name}
        for name in steps.keys() - known if self.save_top_k >= 0 else ():
            if self._has_named(name) and steps[name] < trainer.global_step:
                trainer.strategy.remove_checkpoint(str(folder / name))
        ours = isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)  # another one can't copy
        if due is not None and self.monitor in due and ours:
            self._source = folder / resumed
            self._save_topk_checkpoint(trainer, due)
            self._save_last_checkpoint(trainer, due)
            self._source = None

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self._source is None:
            super()._save_checkpoint(trainer, filepath)
            return
        if trainer.is_global_zero:
            io: Any = trainer.strategy.checkpoint_io
            io.copy_checkpoint(self._source, Path(filepath), {self.state_key: self.state_dict()})
        trainer.strategy.barrier()
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath

    def _has_named(self, name: str) -> bool:
        """Whether a file's name is of the form `filename`, its placeholders being numbers."""
        parts = re.split(r"\{([^:}]*)[^}]*\}", self.filename or "{epoch}-{step}")
        for i, part in enumerate(map(re.escape, parts)):
            parts[i] = f"({part}=)?[-+.\\deinfa]+" if i % 2 else part
        return re.fullmatch(f"{''.join(parts)}(-v\\d+)?{re.escape(self.FILE_EXTENSION)}", name) is not None

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        assert self.dirpath is not None
        return previous != current and Path(self.dirpath).absolute() in Path(previous).absolute().parents


class Checkpoint(RunCheckpoint):
    """Also saves at the last step, and after the validation of a step instead of before it.

    So a run that is killed while it validates makes that validation again, and its log has it. The last step is that
    of the run, whatever ends it: `trainer.max_steps`, `max_epochs` or `max_time`, or a metric that no longer gets
    better. A run that is told to stop between the batches of a step ends after the step.

    Args:
        asynchronous: write checkpoints while the training continues, from a copy in the host's memory; `best` too.

    Attributes:
        requested: save this step too; set by :class:`Preemption`.
    """

    requested = False
    _deferred = False
    _stop_requested = False

    def __init__(self, *args: Any, asynchronous: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asynchronous = asynchronous

    def check_settings(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what can't be written beside the training; before any data is prepared."""
        strategy: Any = trainer.strategy
        if self.asynchronous and getattr(strategy, "_save_distributed_checkpoint", False):
            raise ValueError(
                "checkpoint.asynchronous=true: sharded checkpoints are written at once; leave it out, or give "
                "trainer.strategy the argument save_distributed_checkpoint: false"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.check_settings(trainer, pl_module)  # a module of the user's own does not ask for it
            self._save_after_the_row(trainer)

    def _save_after_the_row(self, trainer: Trainer) -> None:
        """Have the loggers write a step's row before it is saved, not after: a kill in between would lose it for ever.

        Lightning writes it after all hooks of the step.
        """
        connector: Any = trainer._logger_connector
        lightnings = type(connector)

        def on_batch_end() -> None:
            lightnings.on_batch_end(connector)
            if trainer.training:  # not a batch of the validation
                lightnings.update_train_step_metrics(connector)
                if not self._deferred:
                    self._save(trainer)

        connector.on_batch_end, connector.update_train_step_metrics = on_batch_end, lambda: None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        io = trainer.strategy.checkpoint_io
        if isinstance(io, AtomicCheckpointIO):
            io.wait()
            if failure := trainer.strategy.broadcast(io.failure):  # it is the first process that writes
                raise RunError(
                    f"{failure}: the last steps of the run are lost. Make room, and resume with --ckpt_path last"
                )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._finish_step(trainer)
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        self._deferred = trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._finish_step(trainer)
        if self._deferred:
            self._deferred = False
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For a run that is told to stop after its last batch, by the metrics of an epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Of every checkpoint, whoever saves it."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint[ACCUMULATE] = trainer.accumulate_grad_batches
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if "loops" in checkpoint and epochs.processed == epochs.completed + 1:
            _before_the_end_of_the_epoch(checkpoint["loops"]["fit_loop"], trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count in the batches of this run, where a step has more or fewer of them than before."""
        now = trainer.accumulate_grad_batches
        if trainer.training and (before := checkpoint.get(ACCUMULATE, now)) != now:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                ready = counts["ready"]
                counts |= {name: -(-ready // before) * now - (ready - count) for name, count in counts.items()}

    def _finish_step(self, trainer: Trainer) -> None:
        """A step that is half done would be lost: keep the request to stop until it is complete."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            self._stop_requested |= trainer.should_stop
            trainer.should_stop = False
        else:
            trainer.should_stop |= self._stop_requested
            self._stop_requested = False

    def _save(self, trainer: Trainer) -> None:
        """Save if it is time; never between the batches of a step, whose gradients a checkpoint does not hold.

        Not by ModelCheckpoint, which at the end of an epoch waits for a validation whether one comes or not (2.6).
        """
        last = trainer.should_stop and trainer.fit_loop._can_stop_early
        if trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            last |= trainer.current_epoch + 1 == trainer.max_epochs
        due = self.requested or last or self._is_due(trainer) or self._time_is_up(trainer)
        between = trainer.fit_loop.epoch_loop._should_accumulate()
        if due and not between and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
            self._last_time_checked = time.monotonic()

    def _is_due(self, trainer: Trainer) -> bool:
        every, step = self._every_n_train_steps, trainer.global_step
        return step == trainer.max_steps or (every > 0 and step % every == 0)

    def _time_is_up(self, trainer: Trainer) -> bool:
        if self._train_time_interval is None:
            return False
        up = time.monotonic() - (self._last_time_checked or 0.0) >= self._train_time_interval.total_seconds()
        return trainer.strategy.broadcast(up)  # processes have clocks of their own


def _before_the_end_of_the_epoch(loop: dict[str, Any], trainer: Trainer) -> None:
    """Let a checkpoint of the end of an epoch say that its last batch, or the validation after it, is done.

    Resumed from the end itself Lightning 2.6 counts an epoch in which it does nothing.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    assert trainer.fit_loop._data_fetcher is not None
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    validated = epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
    for count in ("total", "current"):
        loop["epoch_progress"][count]["processed"] -= 1
        loop["epoch_loop.batch_progress"][count]["completed"] -= not validated
