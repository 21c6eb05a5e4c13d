"""How long a run is, and what has ended it."""

import math
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, Timer


def num_steps(trainer: Any) -> int:
    """Optimizer steps that the learning-rate schedule is made for, known once the loaders are; -1 without a limit.

    `trainer.max_steps`, else what `trainer.max_epochs` come to.
    """
    if trainer.max_steps >= 0:
        return int(trainer.max_steps)
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs < 0 or math.isinf(batches):
        return -1
    return int(epochs * math.ceil(batches / trainer.accumulate_grad_batches))


def ended_by(trainer: Any) -> str:
    """What ends or has ended a run, by the name that a user knows."""
    if trainer.global_step == trainer.max_steps:
        return f"trainer.max_steps={trainer.max_steps}"
    if trainer.num_training_batches == 0:
        return f"trainer.limit_train_batches={trainer.limit_train_batches}"
    if not trainer.should_stop:
        return f"trainer.max_epochs={trainer.max_epochs}"
    for callback in trainer.callbacks:
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return f"trainer.max_time, after {callback.time_elapsed():.0f} s of training, before a resume and since"
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping: {callback.stopping_reason_message.removesuffix(' Signaling Trainer to stop.')}"
    return "a callback that told it to stop"
