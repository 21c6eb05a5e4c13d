"""One progress bar over all optimizer steps: loss, tokens/s, time left."""

import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from lit_modules.runs.length import num_steps
from lit_modules.runs.logs import is_log_step

SHOWN = {
    "train/loss": ("loss", "{:.3f}"),
    "val/loss": ("val", "{:.3f}"),
    "val/top1": ("top1", "{:.1%}"),
    "train/tokens_per_second": ("tok/s", "{:,.0f}"),
    "train/images_per_second": ("img/s", "{:,.0f}"),
    "train/mfu": ("mfu", "{:.1%}"),
}


class Progress(ProgressBar):
    """Goes from step 0 to the last; its figures change when they are logged, so it costs no device sync."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._enabled = True
        self._stale = False

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled:
            total = num_steps(trainer)
            # A terminal gets a moving bar; a log file a line every ten seconds.
            pace = 0.2 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(
                total=None if total < 0 else total,
                initial=trainer.global_step,
                desc="train",
                unit="step",
                mininterval=pace,
                dynamic_ncols=True,
            )

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # type: ignore[override]
        if self._bar is not None and trainer.global_step != self._bar.n:
            self._bar.update(trainer.global_step - self._bar.n)
            self._stale = is_log_step(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:  # type: ignore[override]
        self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        """After the whole step: the module logs when the callbacks have had their turn."""
        if self._bar is not None and self._stale:
            metrics = trainer.callback_metrics
            figures = {name: form.format(float(metrics[key])) for key, (name, form) in SHOWN.items() if key in metrics}
            self._bar.set_postfix(figures, refresh=False)
            self._stale = False

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:  # type: ignore[override]
        self._show(trainer)
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def print(self, *args: Any, **kwargs: Any) -> None:
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)
