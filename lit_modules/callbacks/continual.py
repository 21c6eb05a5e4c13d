"""What is known of each phase of the data after each of them."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_modules.callbacks.ema import averages_of
from lit_modules.callbacks.throughput import Throughput
from lit_modules.runs import forgetting
from lit_modules.runs.forgetting import METRICS, START
from lit_modules.runs.logs import write_if_possible
from lit_modules.strategies.fsdp2 import FSDP2


class ContinualMatrix(Callback):
    """Evaluates every phase of a PhasedDataModule before the first step and after each phase; with EMA, the average.

    Writes `continual.csv` and `continual.png` into the run's folder: losses (and accuracies), average, forgetting,
    backward and forward transfer, as :func:`lit_modules.runs.forgetting.measures` defines them. Logs the same as
    `continual/...` after each phase. With `trainer.limit_val_batches: 0` it does nothing.
    """

    def __init__(self) -> None:
        self.rows: list[forgetting.Row] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Also what a run was killed in. Phases that end elsewhere now are no longer those of the rows."""
        ends = self._ends(trainer)
        self.rows = [row for row in self.rows if ends.get(row["step"]) == row["phase"]]
        self._evaluate_if_due(trainer, pl_module)
        self._write(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self._evaluate_if_due(trainer, pl_module)

    def _ends(self, trainer: Trainer) -> dict[int, str]:
        """The step after each phase, by which it is known."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return {0: START} | {data.phase_starts[phase.name] + phase.steps: phase.name for phase in data.trained}

    def _evaluate_if_due(self, trainer: Trainer, module: Any) -> None:
        step, data = trainer.global_step, trainer.datamodule  # type: ignore[attr-defined]
        due = self._ends(trainer).get(step)
        known = any(row["step"] == step for row in self.rows)
        if due is None or known or not trainer.limit_val_batches or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        start = time.perf_counter()
        averages = averages_of(trainer) if step else []  # of no step it is none yet
        found = _evaluate(trainer, [*averages, module][0])
        wanted = [f"{phase.name}/{metric}" for phase in data.phases for metric in METRICS]
        self.rows.append({"phase": due, "step": step} | {name: found[name] for name in wanted if name in found})
        self._tell(trainer)
        self._write(trainer)
        for counter in (callback for callback in trainer.callbacks if isinstance(callback, Throughput)):  # type: ignore[attr-defined]
            counter.exclude(time.perf_counter() - start)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self.rows:
            table, picture = (Path(trainer.default_root_dir) / f"continual.{kind}" for kind in ("csv", "png"))
            write_if_possible(table, lambda: forgetting.write_table(table, self.rows))
            write_if_possible(picture, lambda: forgetting.draw(self.rows).savefig(picture))

    def _tell(self, trainer: Trainer) -> None:
        row = forgetting.with_measures(self.rows)[-1]
        if row["phase"] == START or not trainer.is_global_zero:
            return
        logged = {f"continual/{name}": value for name, value in row.items() if name not in ("phase", "step")}
        for logger in trainer.loggers:
            logger.log_metrics(logged, row["step"] - 1)  # as Lightning counts them
        for metric in forgetting.metrics_of(self.rows):
            told = forgetting.told(forgetting.measures(self.rows, metric))
            rank_zero_info(f"after phase {row['phase']}, {metric}: {', '.join(told)}")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]


def _evaluate(trainer: Any, module: Any) -> dict[str, float]:
    """The metrics of the validation loaders, as a validation would have them, without its being one."""
    training, limit = module.training, trainer.limit_val_batches
    module.eval()
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        module.start_evaluation(trainer, "val")
        for i, loader in enumerate(trainer.datamodule.val_dataloader()):
            num_batches = min(limit, len(loader)) if isinstance(limit, int) else int(limit * len(loader))
            for _, batch in zip(range(num_batches), loader, strict=False):
                module.evaluate(trainer.strategy.batch_to_device(batch), i)
        found = module.evaluation(trainer, "val")
    module.train(training)
    if isinstance(trainer.strategy, FSDP2):
        trainer.strategy.reshard()
    return {name: float(value) for name, value in found.items()}
