"""Batches of images: augmented ones to train on, ordered ones to evaluate. B batch, S image size, C classes."""

import random
import warnings
from collections.abc import Callable

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from PIL import Image
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import get_worker_info

from datamodules.image_files import Images, UnreadableImage
from datamodules.loader import IGNORE, Ordered, Stream
from datamodules.sampler import sample_at

MAX_UNREADABLE = 100  # in a row: more than that is a disk that is gone
MAX_WARNINGS = 5
UNREADABLE = IGNORE - 1  # label of an image to predict that can't be read

# Images have 3 channels, or 1 where the mode is L, Pillow's name for grey.
TrainBatch = tuple[Tensor, Tensor]  # images (B, 3, S, S), targets (B) or (B, C)
EvalBatch = tuple[Tensor, Tensor, Tensor]  # images (B, 3, S, S), labels (B), indices (B)


class AugmentedBatches(Stream):
    """Training batches. All that is random about a sample follows from the seed and the sample's position."""

    def __init__(
        self,
        images: Images,
        mode: str,
        transform: Callable[[Image.Image], Tensor],
        size: int,
        mix: Mixup | None,
        *,
        repeats: int,
        seed: int,
        unreadable: Tensor | None,
        place: tuple[int, int, int],
    ) -> None:
        super().__init__(len(images), *place)
        self.images, self.mode, self.transform, self.size, self.mix = images, mode, transform, size, mix
        self.repeats, self.seed, self.unreadable = repeats, seed, unreadable

    def batch_at(self, positions: NDArray[np.int64]) -> TrainBatch:
        """Images and targets."""
        samples = sample_at(positions // self.repeats, len(self.images), self.seed)
        images = _empty(len(samples), self.mode, self.size)
        targets = torch.empty(len(samples), dtype=torch.int64)
        with isolate_rng(include_cuda=False):
            for row, (position, sample) in enumerate(zip(positions.tolist(), samples.tolist(), strict=True)):
                image, targets[row] = self._read(sample)
                _seed_all(f"{self.seed} {position}")
                images[row] = self.transform(image)
            if self.mix:
                _seed_all(f"{self.seed} {positions[0]} mix")
                images, targets = self.mix(images, targets)
        return images, targets

    def _read(self, sample: int) -> tuple[Image.Image, int]:
        """The image and its label; of one that can't be read, of the next that can."""
        if self.unreadable is None:
            try:
                return self.images.read(sample, self.mode), int(self.images.labels[sample])
            except UnreadableImage as error:
                raise ValueError(f"{error}; replace it, or train without it: data.skip_unreadable=true") from error
        for candidate in range(sample, sample + MAX_UNREADABLE):
            candidate %= len(self.images)
            try:
                return self.images.read(candidate, self.mode), int(self.images.labels[candidate])
            except UnreadableImage as error:
                last = error
                if not self.unreadable[candidate]:
                    self.unreadable[candidate] = True
                    if self.unreadable.sum() <= MAX_WARNINGS:
                        warnings.warn(f"{error}; training takes the next image", stacklevel=1)
        raise ValueError(f"{MAX_UNREADABLE} images in a row can't be read; the last: {last}")


def _empty(batch_size: int, mode: str, size: int) -> Tensor:
    """Room for a batch, (B, channels, S, S): a worker's in memory that it shares, or it would be copied once more."""
    images = torch.empty(batch_size, 3 if mode == "RGB" else 1, size, size)
    return images.share_memory_() if get_worker_info() else images


def _seed_all(key: str) -> None:
    """Seed the three generators that transforms draw from: Python's hashes the key, the others follow from it."""
    random.seed(key)
    np.random.seed(random.getrandbits(32))
    torch.default_generator.manual_seed(random.getrandbits(63))


class OrderedImages(Ordered):
    """Evaluation batches."""

    def __init__(
        self,
        images: Images,
        mode: str,
        transform: Callable[[Image.Image], Tensor],
        size: int,
        *,
        skip_unreadable: bool,
        place: tuple[int, int, int],
    ) -> None:
        super().__init__(len(images), *place)
        self.images, self.mode, self.transform, self.size = images, mode, transform, size
        self.skip_unreadable = skip_unreadable

    def batch_at(self, positions: NDArray[np.int64]) -> EvalBatch:
        """Images, labels and indices; rows that only fill up are zeros with the label IGNORE and the index -1.

        With `skip_unreadable` an image that can't be read is zeros with the label UNREADABLE.
        """
        images = _empty(len(positions), self.mode, self.size).zero_()
        labels = torch.full((len(positions),), IGNORE)
        indices = torch.full((len(positions),), -1)
        for row, index in enumerate(positions[positions < len(self.images)].tolist()):
            labels[row], indices[row] = int(self.images.labels[index]), index
            try:
                image = self.images.read(index, self.mode)
            except UnreadableImage as error:
                if not self.skip_unreadable:
                    raise
                warnings.warn(f"{error}; its row has no prediction", stacklevel=1)
                labels[row] = UNREADABLE
            else:
                images[row] = self.transform(image)
        return images, labels, indices
