"""The loss curve as a picture."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_modules.runs.logs import write_if_possible


class LossCurve(Callback):
    """Draws `loss.png` into the run's folder at the end of training, from its `metrics.csv` and `growth.csv`.

    Also when a run that was killed after its last step is resumed.
    """

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.save()
        run_dir = Path(trainer.default_root_dir)
        if not (run_dir / "metrics.csv").exists():  # fast_dev_run, or a logger of the user's own
            rank_zero_info("no loss curve: the run wrote no metrics.csv")
            return
        from lit_modules.runs.curves import Run, draw

        try:
            figure = draw([Run(run_dir)], panels=("step",))
        except ValueError as error:  # too short a run to have logged a loss
            rank_zero_info(f"no loss curve: {error}")
            return
        if write_if_possible(run_dir / "loss.png", lambda: figure.savefig(run_dir / "loss.png")):
            rank_zero_info(f"loss curve: {run_dir / 'loss.png'}")
