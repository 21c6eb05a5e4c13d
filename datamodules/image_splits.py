"""What all sources of images share: their splits and classes, and what is said of those that do not fit."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from datamodules.image_classes import Classes
from datamodules.image_files import Images, Part, held_out
from datamodules.loader import IGNORE

VAL_SPLITS = ("val", "validation", "valid", "dev")


@dataclass(frozen=True)
class ImageFormat:
    """How to find images and classes in a source; the settings of `data` with these names."""

    val_fraction: float | None = None
    image_column: str | None = None
    label_column: str | None = None


class Source(Protocol):
    """A data set of images."""

    classes: Classes  # may be replaced, before images are opened, by those of a class map or of a checkpoint

    def prepare(self) -> None:
        """Download it, if it isn't here."""

    def images(self, split: str) -> Images:
        """The images of train, val or test (val, where there are no test images with labels)."""


class Splits(ABC):
    """A source with splits; its validation images may be held out of those for training."""

    classes: Classes
    splits: dict[str, str]  # where train, val and test are, as far as they are there
    form: ImageFormat

    @abstractmethod
    def open(self, split: str) -> Images:
        """The images of a split that is there."""

    def images(self, split: str) -> Images:
        """The images of train, val or test."""
        if split == "test" and "test" in self.splits:
            images = self.open(split)
            if (images.labels != IGNORE).any():  # else they are secret, as ImageNet's
                return images
        split = "train" if split == "train" else "val"
        if self.form.val_fraction is None:
            return self.open(split)
        whole = self.open("train")
        held = held_out(whole.labels, self.form.val_fraction)
        if not held.any():
            raise ValueError(
                f"data.val_fraction={self.form.val_fraction}: leaves none of the {len(whole)} images for validation"
            )
        return Part(whole, np.flatnonzero(held == (split == "val")))


def has_validation(form: ImageFormat, source: str, split: str) -> ValueError:
    """Of a fraction to hold out where there is a validation split."""
    return ValueError(f"data.val_fraction={form.val_fraction}: leave it out, data.source={source!r} has {split}")


def renumbered(labels: NDArray[np.int64], names: Sequence[str], classes: Classes, where: str) -> NDArray[np.int64]:
    """Numbers of a data set's own `names`, as numbers of the classes; IGNORE for those below 0."""
    number = np.asarray([classes.index.get(name, -1) for name in names] or [-1], dtype=np.int64)
    labels = np.where(labels < 0, IGNORE, labels)
    used = np.unique(labels[labels >= 0])
    if unknown := [names[i] for i in used.tolist() if number[i] < 0]:
        known = "data.class_map" if classes.mapped else "train"
        raise ValueError(f"{where}: not the classes of {known}: unknown {some(unknown)}; add them there")
    return np.where(labels < 0, IGNORE, number[labels.clip(0)])


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many there are."""
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} ({shown})" if names else "none"


def counted(left_out: Any) -> str:
    """What was left out, the most frequent first."""
    return ", ".join(f"{number:,} {kind}" for kind, number in Counter(left_out).most_common())
