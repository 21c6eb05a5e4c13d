"""Weights & Biases and MLflow: a resumed run goes on in the tracker's same run, and their files lie in its folder."""

import json
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_modules.runs.logs import write_if_possible

IDS = "trackers.json"  # in the run's folder: by the logger's class, the id of the tracker's run


def in_folder(kind: type[Logger], arguments: dict[str, Any], folder: Path) -> tuple[type[Logger], dict[str, Any]]:
    """The class of a logger, and its arguments with the run's folder and the id that lies there.

    What the user has set stays, and so does what is no tracker.
    """
    if issubclass(kind, WandbLogger):
        if arguments.get("save_dir", ".") == ".":
            arguments = arguments | {"save_dir": arguments.get("dir") or str(folder)}
        if not (arguments.get("version") or arguments.get("id")):
            arguments = arguments | {"id": _ids(folder).get(_name(kind))}
    elif issubclass(kind, MLFlowLogger):
        if not arguments.get("tracking_uri") and arguments.get("save_dir", "./mlruns") == "./mlruns":
            store = {"tracking_uri": f"sqlite:///{folder.resolve()}/mlflow.db"}  # MLflow gives up its store of files
            artifacts = arguments.get("artifact_location") or str(folder.resolve() / "mlruns")
            arguments = arguments | store | {"artifact_location": artifacts}
        if not arguments.get("run_id"):
            arguments = arguments | {"run_id": _ids(folder).get(_name(kind))}
        kind = ResumableMLFlowLogger if kind is MLFlowLogger else kind
    return kind, arguments


class TrackerIds(Callback):
    """Writes the ids of the trackers' runs into the run's folder.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning has asked each logger for its run."""
        trackers = [logger for logger in trainer.loggers if isinstance(logger, (WandbLogger, MLFlowLogger))]
        if trackers and trainer.is_global_zero:
            ids = _ids(self.folder) | {_name(type(logger)): logger.version for logger in trackers}
            write_if_possible(path := self.folder / IDS, lambda: path.write_text(json.dumps(ids, indent=2) + "\n"))


class ResumableMLFlowLogger(MLFlowLogger):
    """MLflow's log of a run that may be resumed with other hyperparameters: MLflow lets nobody change them."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client."""
        from mlflow.exceptions import MlflowException

        try:
            return super().experiment
        except MlflowException as error:
            raise ValueError(
                f"trainer.logger: MLflow, run {self._run_id}: {error}; an id that was not given is from {IDS} in the "
                "run's folder: delete it, and MLflow begins a new run"
            ) from error

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Those that the run there does not have; a warning names what it has with another value."""
        params = _flatten_dict(_convert_params(params))
        there = self.experiment.get_run(self.run_id).data.params
        if changed := [name for name in params if name in there and there[name] != str(params[name])[:250]]:
            rank_zero_warn(f"MLflow lets nobody change the parameters of a run: it keeps its {', '.join(changed)}")
        super().log_hyperparams({name: value for name, value in params.items() if name not in there})


def _name(kind: type[Logger]) -> str:
    return "Weights & Biases" if issubclass(kind, WandbLogger) else "MLflow"


def _ids(folder: Path) -> dict[str, str]:
    path = folder / IDS
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}): delete it, and the trackers begin new runs") from error
