"""Data modules on folders of a few small images, and their batches; for the tests of images."""

import shutil
from types import SimpleNamespace

import torch

from datamodules.images import ImageDataModule

EVERYTHING = {
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "repeats": 2,
}


def module(source, rank=0, world_size=1, **settings):
    data = ImageDataModule(str(source), **{"image_size": 16, "batch_size": 4, "num_workers": 0} | settings)
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size}, accumulate_grad_batches=1
    )
    data.setup("fit")
    return data


def take(loader, count):
    """The next `count` batches, over the ends of epochs."""
    batches = []
    while len(batches) < count:
        batches += [batch for _, batch in zip(range(count - len(batches)), loader, strict=False)]
    return batches


def same(a, b):
    pairs = (pair for batches in zip(a, b, strict=True) for pair in zip(*batches, strict=True))
    return all(torch.equal(*pair) for pair in pairs)


def broken(folder, tmp_path, *names):
    """A copy of the folder in which some files of train/ are cut short."""
    shutil.copytree(folder / "train", tmp_path / "train")
    (tmp_path / "val").symlink_to(folder / "val")
    paths = [tmp_path / "train" / name for name in names]
    for path in paths:
        path.write_bytes(path.read_bytes()[:100])
    return paths
