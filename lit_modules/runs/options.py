"""Options of Lightning that can't work here, each with what to use instead. Others work: a test runs them."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)

_FREEZES = "freezes in `setup`, before there is a model: do it in `set_model` of a subclass of the module"
_SWEEP = "give several runs a model.optim.lr each, and compare them with `tokenformer plot RUN...`"
_AVERAGE = "use EMA, which grows with the model and knows of steps that were skipped: --trainer.callbacks+=EMA"

CALLBACKS: dict[type, str] = {  # also those derived from them, but for ours
    StochasticWeightAveraging: f"copies the module before there is a model, and replaces the schedule: {_AVERAGE}",
    WeightAveraging: f"does not grow: {_AVERAGE}",
    LearningRateFinder: f"replaces the schedule of the run: {_SWEEP}",
    BatchSizeFinder: "finds a batch that the run's config does not hold: set data.batch_size, and "
    "trainer.accumulate_grad_batches for larger steps",
    GradientAccumulationScheduler: "makes steps of which the loader does not know: set trainer.accumulate_grad_batches;"
    " a run may be resumed with another",
    Timer: "can't be given: use trainer.max_time",
    OnExceptionCheckpoint: "saves in the middle of a step, from where no run goes on exactly: set "
    "checkpoint.every_n_train_steps or checkpoint.train_time_interval",
    ModelPruning: "renames the parameters that it prunes: prune an exported model",
    BackboneFinetuning: _FREEZES,
    BaseFinetuning: _FREEZES,
}

STRATEGIES = {
    "fsdp": "use fsdp2",
    "deepspeed": "use fsdp2",
    "ddp_spawn": "use ddp: it starts processes that share nothing with this one",
}


def refuse_callbacks(kinds: Iterable[type]) -> None:
    """Refuse callbacks of these classes.

    Raises:
        ValueError: for the first that can't work, with what to use instead.
    """
    for kind in kinds:
        ours = kind.__module__.startswith("lit_modules.")
        why = next((why for refused, why in CALLBACKS.items() if issubclass(kind, refused) and not ours), None)
        if why is not None:
            raise ValueError(f"trainer.callbacks: {kind.__name__} {why}")


def refuse_settings(trainer: Any, processes: int) -> None:
    """Refuse arguments of a trainer.

    Args:
        trainer: it, or its part of a config.
        processes: how many it trains in, of all machines together.

    Raises:
        ValueError: for the first that can't work, with what to use instead.
    """

    def given(name: str) -> Any:
        return getattr(trainer, name, None)

    def refuse(name: str, why: str) -> None:
        raise ValueError(f"trainer.{name}={given(name)}: {why}")

    if given("barebones"):
        refuse("barebones", "a run writes a log; leave out what is too much: enable_checkpointing, logger: false")
    if given("gradient_clip_algorithm") not in (None, "norm"):
        raise ValueError("trainer.gradient_clip_algorithm=value: only 'norm' is supported")
    if given("reload_dataloaders_every_n_epochs"):
        refuse("reload_dataloaders_every_n_epochs", "a new loader would repeat the same samples; leave it out")
    if (accumulate := given("accumulate_grad_batches")) is not None and accumulate < 1:
        refuse("accumulate_grad_batches", "must be at least 1")
    every = given("val_check_interval")
    if accumulate and isinstance(every, int) and every % accumulate:
        refuse(
            "val_check_interval",
            f"counts batches and is no multiple of trainer.accumulate_grad_batches={accumulate}: validations would "
            "come in the middle of a step",
        )
    seconds = given("_val_check_time_interval")  # of a trainer, which does not keep what was given
    if seconds is not None or (every is not None and not isinstance(every, (int, float))):
        interval = f"trainer.val_check_interval={f'{seconds:g} s' if every is None else every}: is a time"
        if processes > 1:  # they would wait for each other for ever
            raise ValueError(f"{interval}, and each process has its own clock: give a number of batches")
        if accumulate and accumulate > 1:
            raise ValueError(
                f"{interval}, and validations would come in the middle of a step: give a multiple of "
                f"trainer.accumulate_grad_batches={accumulate}, in batches"
            )
    strategy = given("strategy")
    for name, instead in STRATEGIES.items():
        if isinstance(strategy, str) and (strategy == name or strategy.startswith(f"{name}_")):
            refuse("strategy", instead)
