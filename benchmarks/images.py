"""ImageDataModule against timm's own loader: decode and augment 224x224 images, the ImageNet recipe.

    python -m benchmarks.images [--rounds 9]

One row for loading in the training process and one for a worker: images per second of one core, ours over timm's. Both
read the same files with the same transform: those of the folder of class folders that the environment variable
BENCHMARK_IMAGES names, by default ../shared/data/images/imagenet-100-samples/val.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader

from benchmarks.harness import ROOT, Case, Measured, Unavailable, benchmark, in_turn, round_ratios
from datamodules.images import ImageDataModule

IMAGES = Path(os.environ.get("BENCHMARK_IMAGES", ROOT.parent / "shared/data/images/imagenet-100-samples/val"))
SPEED = ("images/s decoded and augmented", "timm's loader")
CASES = [
    Case(f"{workers} workers, batches of 20, 1 thread", {SPEED: ">= 0.95"}, {"num_workers": workers})
    for workers in (0, 1)
]


def endless(loader: Any) -> Iterator[Any]:
    """The loader's batches, epoch after epoch."""
    return chain.from_iterable(repeat(loader))


def timms(data: ImageDataModule, folder: Path) -> Iterator[Any]:
    """The training batches of timm's loader."""
    loader = create_loader(
        create_dataset("", root=folder, is_training=True),
        input_size=(3, data.image_size, data.image_size),
        batch_size=data.batch_size,
        is_training=True,
        num_workers=data.num_workers,
        persistent_workers=False,
        use_prefetcher=False,
        use_multi_epochs_loader=True,  # its workers live on, too
    )
    loader.dataset.transform = data.train_transform
    return endless(loader)


def seconds_of(batches: Iterator[Any], count: int) -> float:
    """Seconds that `count` batches take, from when none is ready."""
    for _ in islice(batches, 2):  # what the worker has made while it wasn't its turn
        pass
    start = time.perf_counter()
    for _ in islice(batches, count):
        pass
    return time.perf_counter() - start


def measure(
    num_workers: int, device: str, rounds: int, images: Path = IMAGES, batch_size: int = 20, batches: int = 5
) -> Measured:
    """Take turns, ours and timm's, each with its worker alive."""
    if not images.is_dir():
        raise Unavailable(f"needs a folder of class folders with images, there is none at {images}: BENCHMARK_IMAGES")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split in ("train", "val"):
            (folder / split).symlink_to(images.resolve())
        data = ImageDataModule(
            str(folder),
            batch_size=batch_size,
            rand_augment="rand-m9-mstd0.5-inc1",
            random_erasing=0.25,
            num_workers=num_workers,
        )
        streams = {"ours": endless(data.train_dataloader()), "timm": timms(data, folder / "train")}
        taking = {name: partial(seconds_of, stream, batches) for name, stream in streams.items()}
        seconds = in_turn(taking, rounds)
        streams.clear(), taking.clear()  # ends the workers before their images are gone
    count = batches * batch_size
    speeds = {f"{who}_images_per_s": f"{count / statistics.median(taken):.1f}" for who, taken in seconds.items()}
    return {SPEED: round_ratios(seconds, "timm", "ours")}, dict(speeds)


if __name__ == "__main__":
    benchmark("images", CASES, measure, rounds=9)
