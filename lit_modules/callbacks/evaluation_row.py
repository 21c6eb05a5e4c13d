"""A row of results, as timm writes them."""

import csv
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

COLUMNS = (
    "model",
    "img_size",
    "top1",
    "top1_err",
    "top5",
    "top5_err",
    "param_count",
    "crop_pct",
    "interpolation",
    "count",
)


class EvaluationRow(Callback):
    """Prints what `tokenformer validate` or `test` has found, and appends it to a CSV file.

    The columns are those of timm's results (per cent, millions of parameters), and how many images were evaluated.

    Args:
        model: its name; a timm model has timm's.
        path: of the CSV file.
    """

    def __init__(self, model: str, path: str | Path) -> None:
        self.model, self.path = model, Path(path)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._write(trainer, pl_module, "test")

    @rank_zero_only
    def _write(self, trainer: Trainer, module: Any, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        top1, top5 = (100 * float(trainer.callback_metrics[f"{stage}/{name}"]) for name in ("top1", "top5"))
        values = [module.timm_model or self.model, data.image_size]
        values += [round(percent, 4) for percent in (top1, 100 - top1, top5, 100 - top5)]
        values += [round(sum(p.numel() for p in module.model.parameters()) / 1e6, 2)]
        values += [data.crop_pct, data.interpolation, module.num_evaluated]
        row = dict(zip(COLUMNS, values, strict=True))
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        rank_zero_info(f"{', '.join(f'{name} {value}' for name, value in row.items())}\nappended to {self.path}")
