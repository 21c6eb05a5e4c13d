"""Predictions to a file."""

import csv
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info


class PredictionWriter(Callback):
    """`tokenformer predict` writes `predictions.csv` into the run's folder: position, id, token, nats, entropy.

    Raises:
        ValueError: with several devices; the tokens of one file are in order on one only.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise ValueError(f"predict on {trainer.world_size} devices: give --trainer.devices 1")
        self._path = Path(trainer.default_root_dir) / "predictions.csv"
        self._file = self._path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(["position", "id", "token", "nats", "entropy"])
        self._position = 0

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:  # type: ignore[override]
        decode = trainer.datamodule.tokenizer.decode  # type: ignore[attr-defined]
        columns = (outputs[name].tolist() for name in ("id", "nats", "entropy"))
        for token_id, nats, entropy in zip(*columns, strict=True):
            self._writer.writerow([self._position, token_id, decode([token_id]), f"{nats:.6f}", f"{entropy:.6f}"])
            self._position += 1

    def on_predict_end(self, *_: Any) -> None:
        self._file.close()
        rank_zero_info(f"{self._position} tokens written to {self._path}")
