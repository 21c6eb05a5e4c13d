"""One progress bar over all optimizer steps: loss, tokens/s, time left."""

import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from lit_modules.loggers import is_log_step

SHOWN = {
    "train/loss": ("loss", "{:.3f}"),
    "val/loss": ("val", "{:.3f}"),
    "train/tokens_per_second": ("tok/s", "{:,.0f}"),
    "train/mfu": ("mfu", "{:.1%}"),
}


class Progress(ProgressBar):
    """Goes from step 0 to `trainer.max_steps`; its figures change when they are logged, so it costs no device sync."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled:
            total = None if trainer.max_steps < 0 else trainer.max_steps
            # A terminal gets a moving bar; a log file a line every ten seconds.
            pace = 0.2 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(
                total=total,
                initial=trainer.global_step,
                desc="train",
                unit="step",
                mininterval=pace,
                dynamic_ncols=True,
            )

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # type: ignore[override]
        if self._bar is None or trainer.global_step == self._bar.n:
            return
        if is_log_step(trainer):
            metrics = trainer.callback_metrics
            figures = {name: form.format(float(metrics[key])) for key, (name, form) in SHOWN.items() if key in metrics}
            self._bar.set_postfix(figures, refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def print(self, *args: Any, **kwargs: Any) -> None:
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)
