"""Validation bits per byte beside those of zlib, on the same text."""

import zlib
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only


class CompressionBaseline(Callback):
    """Prints, at the end of training, how well the model compresses the validation text, and how well zlib does."""

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.limit_val_batches != 1.0 or "val/bits_per_byte" not in trainer.callback_metrics:
            rank_zero_info("no comparison with zlib: it needs a validation on all of the text, limit_val_batches: 1.0")
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        text = data.tokenizer.decode(data.val.ids.tolist()).encode()
        zlib_bits = 8 * len(zlib.compress(text, 9)) / len(text)
        model_bits = float(trainer.callback_metrics["val/bits_per_byte"])
        rank_zero_info(
            f"\nvalidation text, {len(text):,} bytes: {model_bits:.3f} bits per byte with this model, "
            f"{zlib_bits:.3f} with zlib -9"
        )
