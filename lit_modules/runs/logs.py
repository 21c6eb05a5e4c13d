"""When to log, and a CSV log that a resumed run continues."""

import csv
from pathlib import Path

from lightning import Trainer
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


def is_log_step(trainer: Trainer) -> bool:
    """Whether Lightning writes what is logged at the end of this optimizer step."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and trainer.global_step % every == 0


def forget_from(logger: TensorBoardLogger, step: int) -> None:
    """Tell TensorBoard that a run goes on at this step: what an older file has of later ones is not shown.

    This is what `SummaryWriter(purge_step=...)` writes; Lightning makes its writer before it reads a checkpoint.
    """
    writer = logger.experiment._get_file_writer()
    writer.add_event(Event(step=step, file_version="brain.Event:2"))
    writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))


class ResumableCSVLogger(CSVLogger):
    """Writes `metrics.csv` into a folder and keeps the rows that are there.

    Rows that a killed run wrote after the checkpoint that is resumed from are replaced by the new ones.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _ResumingWriter(log_dir=self.log_dir)
        return self._experiment  # type: ignore[return-value]


class _ResumingWriter(ExperimentWriter):
    _old_rows: list[dict[str, str]] | None = None

    def _check_log_dir_exists(self) -> None:
        if Path(self.metrics_file_path).is_file():
            with open(self.metrics_file_path, newline="") as file:
                self._old_rows = list(csv.DictReader(file))

    def save(self) -> None:
        if self._old_rows and self.metrics:
            first = min(row["step"] for row in self.metrics)
            kept = [row for row in self._old_rows if int(row["step"]) < first]
            self.metrics_keys = sorted(self._old_rows[0])
            self._rewrite(kept)
            self._old_rows = None
        super().save()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with open(self.metrics_file_path, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
