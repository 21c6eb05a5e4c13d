"""Images to look at: what the model is trained on, and what it gets wrong."""

from heapq import nlargest
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.nn.functional import interpolate
from torchvision.utils import make_grid, save_image

from lit_modules.runs.logs import write_if_possible

IGNORE = -100  # label of rows that fill up a batch
SHOWN = 16


class Pictures(Callback):
    """Draws the first batch of a training and the worst mistakes of a validation, as files and into TensorBoard.

    `batch.png` has images as the model sees them, `mistakes.png` those with the largest losses among the wrongly named
    ones, of the first process's share.
    """

    def __init__(self) -> None:
        self._batch_shown = False
        self._mistakes: list[
            tuple[float, int, int, int, int, float]
        ] = []  # loss, loader, place, label, taken for, probability

    @rank_zero_only
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._batch_shown:
            return
        self._batch_shown = True
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        images = data.denormalise(batch[0][:SHOWN].float().cpu())
        enlarged = interpolate(images, scale_factor=max(1, 128 // images.shape[-1]))  # pixels of small ones as squares
        grid = make_grid(enlarged, nrow=4)
        path = Path(trainer.default_root_dir) / "batch.png"

        def draw() -> None:
            save_image(grid, path)
            for board in _boards(trainer):
                board.add_image("train/batch", grid, trainer.global_step)

        write_if_possible(path, draw)

    def on_validation_epoch_start(self, *_: Any) -> None:
        self._mistakes = []

    @rank_zero_only
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        _, labels, places = batch
        probability, taken_for = outputs["logits"].softmax(dim=-1).max(dim=-1)
        wrong = (taken_for != labels) & (labels != IGNORE)
        loader = torch.full_like(labels, dataloader_idx)
        columns = (t[wrong].tolist() for t in (outputs["losses"], loader, places, labels, taken_for, probability))
        self._mistakes = nlargest(SHOWN, [*self._mistakes, *zip(*columns, strict=True)])

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or not self._mistakes:
            return
        from matplotlib.figure import Figure  # takes a second to import

        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        names = data.class_names
        figure = Figure(figsize=(8, 8.8))
        for axes in figure.subplots(4, 4).flat:
            axes.axis("off")
        for axes, (_, loader, place, label, taken_for, probability) in zip(figure.axes, self._mistakes, strict=False):
            owner = data.phases[loader].data if hasattr(data, "phases") else data
            axes.imshow(owner.image_of("val", place).permute(1, 2, 0).numpy(), cmap="gray")  # for one channel
            axes.set_title(f"{names[label]}\nas {names[taken_for]} ({probability:.0%})", fontsize=8)
        figure.subplots_adjust(0.02, 0.02, 0.98, 0.9, 0.1, 0.35)  # an automatic layout takes thrice as long
        figure.suptitle(f"worst mistakes at step {trainer.global_step}")
        path = Path(trainer.default_root_dir) / "mistakes.png"

        def draw() -> None:
            figure.savefig(path)
            for board in _boards(trainer):
                board.add_figure("val/mistakes", figure, trainer.global_step)

        write_if_possible(path, draw)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        picture = Path(trainer.default_root_dir) / "mistakes.png"
        if picture.exists():
            rank_zero_info(f"worst mistakes: {picture}")


def _boards(trainer: Trainer) -> list[Any]:
    """The writers of the TensorBoard loggers."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
