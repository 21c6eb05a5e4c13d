"""The loss curve as a picture."""

import csv
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only


class LossCurve(Callback):
    """Draws `loss.png` into the run's folder at the end of training, from its `metrics.csv`."""

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.save()
        run_dir = Path(trainer.default_root_dir)
        if not (run_dir / "metrics.csv").exists():  # fast_dev_run, or a logger of the user's own
            rank_zero_info("no loss curve: the run wrote no metrics.csv")
            return
        draw(run_dir / "metrics.csv", run_dir / "loss.png")
        rank_zero_info(f"loss curve: {run_dir / 'loss.png'}")


def draw(metrics: Path, picture: Path) -> None:
    """Training and validation loss over optimizer steps; lines differ without colour too."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, style in (("train/loss", "training", "-"), ("val/loss", "validation", "o--")):
        points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, color="black", markersize=4, linewidth=1)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)
