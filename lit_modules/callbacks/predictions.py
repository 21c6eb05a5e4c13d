"""Predictions to a file."""

import csv
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from pyarrow.parquet import ParquetWriter

UNREADABLE = -101  # label of an image that can't be read


class _OnOneDevice(Callback):
    """What both writers do."""

    name: str

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise ValueError(f"predict on {trainer.world_size} devices: give --trainer.devices 1")
        self._path = Path(trainer.default_root_dir) / self.name
        self._written = 0
        self._file: Any = None

    def on_exception(self, *_: Any) -> None:
        """Whatever ends it, the file can be read, with what there is."""
        if getattr(self, "_file", None) is not None:
            self._file.close()


class TokenPredictions(_OnOneDevice):
    """`tokenformer predict` writes `predictions.csv` into the run's folder: position, id, token, nats, entropy.

    Raises:
        ValueError: with several devices; the tokens of one file are in order on one only.
    """

    name = "predictions.csv"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        self._file = self._path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(["position", "id", "token", "nats", "entropy"])

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:  # type: ignore[override]
        decode = trainer.datamodule.tokenizer.decode  # type: ignore[attr-defined]
        columns = (outputs[name].tolist() for name in ("id", "nats", "entropy"))
        for token_id, nats, entropy in zip(*columns, strict=True):
            self._writer.writerow([self._written, token_id, decode([token_id]), f"{nats:.6f}", f"{entropy:.6f}"])
            self._written += 1

    def on_predict_end(self, *_: Any) -> None:
        self._file.close()
        rank_zero_info(f"{self._written} tokens written to {self._path}")


class ImagePredictions(_OnOneDevice):
    """`tokenformer predict` writes `predictions.parquet` into the run's folder, a row of each image.

    Columns: file; target (its class where that is known, else null); label (the likeliest class); top5 (the five
    likeliest, best first); probabilities (theirs); with `model.predict_features` also features (what the classifier
    reads, D numbers). Of an image that can't be read all but the first two are null.

    Raises:
        ValueError: with several devices; the images are in order on one only.
    """

    name = "predictions.parquet"
    schema = pa.schema(
        [
            ("file", pa.string()),
            ("target", pa.string()),
            ("label", pa.string()),
            ("top5", pa.list_(pa.string())),
            ("probabilities", pa.list_(pa.float32())),
        ]
    )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        features = [pa.field("features", pa.list_(pa.float32()))] * pl_module.predict_features  # type: ignore[operator]
        self._schema = pa.schema([*self.schema, *features])
        self._file, self._unreadable = ParquetWriter(self._path, self._schema), 0

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:  # type: ignore[override]
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        names = data.class_names
        places = batch[2][real := batch[2] >= 0].tolist()
        targets = batch[1][real].tolist()
        top5: list[Any] = [[names[c] for c in classes] for classes in outputs["classes"].tolist()]
        numbers = {name: outputs[name].tolist() for name in ("probabilities", "features") if name in outputs}
        for i in (i for i, target in enumerate(targets) if target == UNREADABLE):
            for column in (top5, *numbers.values()):
                column[i] = None
            self._unreadable += 1
        rows = {
            # A name that is not UTF-8 is written with its bytes replaced.
            "file": [os.fsencode(data.file_of("predict", place)).decode(errors="replace") for place in places],
            "target": [names[target] if target >= 0 else None for target in targets],
            "label": [classes and classes[0] for classes in top5],
            "top5": top5,
        } | numbers
        self._file.write_batch(pa.record_batch(rows, schema=self._schema))
        self._written += len(top5)

    def on_predict_end(self, *_: Any) -> None:
        self._file.close()
        without = f", {self._unreadable} of them without prediction: they can't be read" if self._unreadable else ""
        rank_zero_info(f"{self._written} images written to {self._path}{without}")
