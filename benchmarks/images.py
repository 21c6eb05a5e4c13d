"""ImageDataModule against timm's own loader: decode and augment 224x224 images, the ImageNet recipe.

    python -m benchmarks.images [--images ../shared/data/images/imagenet-100-samples/val] [--rounds 9]

One row for loading in the training process and one for a worker: images per second of one core, and the ratio of ours
to timm's (median of the rounds, lowest and highest). Both read the same files with the same transform.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader

from benchmarks.harness import ratio, write_csv
from datamodules.images import ImageDataModule

ROOT = Path(__file__).parents[1]


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


def measure(folder: Path, num_workers: int, batch_size: int, batches: int, rounds: int) -> dict[str, object]:
    """Take turns, ours and timm's, each with its worker alive."""
    data = ImageDataModule(
        str(folder),
        batch_size=batch_size,
        rand_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.25,
        num_workers=num_workers,
    )
    streams = {"ours": endless(data.train_dataloader()), "timm": timms(data, folder / "train")}
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    for measured in range(rounds + 1):  # the first warms up
        for name, stream in streams.items():
            taken = seconds_of(stream, batches)
            if measured:
                seconds[name].append(taken)
    speeds = {
        f"{name}_images_per_s": f"{batches * batch_size / statistics.median(taken):.1f}"
        for name, taken in seconds.items()
    }
    median, low, high = ratio(seconds, "timm", "ours")
    settings: dict[str, object] = {"num_workers": num_workers, "batch_size": batch_size, "rounds": rounds}
    return settings | speeds | {"speed_ratio": f"{median:.3f}", "range": f"{low:.3f}-{high:.3f}"}


def main() -> None:
    """Run the comparison and write benchmarks/results/images.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images = ROOT.parent / "shared/data/images/imagenet-100-samples/val"
    parser.add_argument("--images", type=Path, default=images, help="a folder of class folders")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--batches", type=int, default=5, help="of a round")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split in ("train", "val"):
            (folder / split).symlink_to(args.images.resolve())
        for num_workers in (0, 1):
            rows.append(measure(folder, num_workers, args.batch_size, args.batches, args.rounds))
            print(*(f"{key} {value}" for key, value in rows[-1].items()), sep="  ")
    print(f"rows in {write_csv('images', rows)}")


if __name__ == "__main__":
    main()
