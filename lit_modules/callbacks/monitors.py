"""What a run waits for has to be logged."""

from difflib import get_close_matches
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping


class Monitors(Callback):
    """Refuses an EarlyStopping whose metric no validation has, at the one that is made before the first step.

    Raises:
        ValueError: naming the metric, and what there is.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in _waiting_for_validation(trainer):
            if not trainer.enable_validation:
                raise ValueError(f"EarlyStopping.monitor={callback.monitor!r}: this run makes no validations")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        known = trainer.callback_metrics
        for callback in _waiting_for_validation(trainer):
            of_training = trainer.sanity_checking and not callback.monitor.startswith("val")  # not logged yet
            if callback.monitor in known or of_training or not callback.strict:
                continue
            near = get_close_matches(callback.monitor, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? There are" if near else "choose one of"
            raise ValueError(
                f"EarlyStopping.monitor={callback.monitor!r} is not logged: {hint} {', '.join(sorted(known))}"
            )


def _waiting_for_validation(trainer: Any) -> list[EarlyStopping]:
    return [
        callback
        for callback in trainer.callbacks
        if isinstance(callback, EarlyStopping) and not callback._check_on_train_epoch_end
    ]
