"""When to log, and logs that a resumed run continues and that a full disk does not end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from lit_modules.runs.errors import causes
from lit_modules.runs.tables import append_rows, read_rows, write_rows


def is_log_step(trainer: Trainer) -> bool:
    """Whether Lightning writes what is logged at the end of this optimizer step."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and trainer.global_step % every == 0


def purge_from(logger: TensorBoardLogger, step: int) -> None:
    """Tell TensorBoard that a run is resumed at this step: what an older file has from there on is not shown.

    This is what `SummaryWriter(purge_step=...)` writes; Lightning makes its writer before it reads a checkpoint.
    """
    if len(list(Path(logger.log_dir).glob("events.out.tfevents.*"))) < 2:
        return
    writer = logger.experiment._get_file_writer()
    writer.add_event(Event(step=step, file_version="brain.Event:2"))
    writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))


def write_if_possible(path: str | Path, write: Callable[[], object], quiet: bool = False) -> bool:
    """Write a file that tells of a run; return whether it was. Where the disk refuses, it costs a warning, not the run.

    Args:
        path: of the file, for the warning.
        write: does it.
        quiet: whether to leave the warning out, because it was given.
    """
    try:
        write()
    except (OSError, ValueError) as error:
        refused = next((cause for cause in causes(error) if isinstance(cause, OSError)), None)
        if refused is None:
            raise
        if not quiet:
            rank_zero_warn(f"{path} can't be written ({refused.strerror or refused}): the training goes on")
        return False
    return True


class ResumableCSVLogger(CSVLogger):
    """Writes `metrics.csv` into a folder and keeps the rows that are there.

    Rows that a killed run wrote after the checkpoint that is resumed from are replaced by the new ones. Rows that the
    disk refuses are written with later ones, when there is room.

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
    """Attributes: `metrics` are rows to be written, `metrics_keys` the columns of the file."""

    _old_rows: list[dict[str, str]] | None = None  # to be written again without those that are replaced
    _refused = False

    def _check_log_dir_exists(self) -> None:
        self._path = path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        try:
            self.metrics_keys, self._old_rows = read_rows(path)
        except ValueError as error:
            path.replace(aside := path.with_name("metrics-unreadable.csv"))
            rank_zero_warn(f"{error}. It is {aside.name} now, and a new one begins")
            return
        if not self.metrics_keys:
            rank_zero_warn(f"{path} is empty: what the run logged before is lost")

    def save(self) -> None:
        if not self.metrics:
            return
        folder = self._path.parent
        if not folder.is_dir():
            rank_zero_warn(f"the run's folder {folder} was deleted or moved: it is made again, without what it held")
        self._refused = not write_if_possible(self._path, self._write, quiet=self._refused)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        columns = sorted({*self.metrics_keys}.union(*self.metrics))
        if self._old_rows is None and columns == self.metrics_keys and self._path.is_file():
            append_rows(self._path, columns, self.metrics)
        else:
            rows: list[dict[str, Any]] = []
            if self._old_rows is not None:
                first = min(row["step"] for row in self.metrics)
                rows += [row for row in self._old_rows if int(row["step"]) < first]
            elif self._path.is_file():
                rows += read_rows(self._path)[1]
            write_rows(self._path, columns, rows + self.metrics)
        self.metrics_keys, self._old_rows, self.metrics = columns, None, []


class ResumableTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's log in a run's folder. What the disk refuses is written with later rows, into a file of its own.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="", version="")
        self._rows: list[tuple[Any, int | None]] = []
        self._refused = False

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._rows.append((metrics, step))

    @rank_zero_only
    def save(self) -> None:
        self._refused = not write_if_possible(self.log_dir, self._write, quiet=self._refused)
        if self._refused:
            self._experiment = None  # it does not work again, once it has failed

    def _write(self) -> None:
        for row in self._rows:
            super().log_metrics(*row)
        super().save()
        self._rows = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
        if not self._refused:
            super().finalize(status)
