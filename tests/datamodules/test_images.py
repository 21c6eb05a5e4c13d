"""Batches of images: who gets which, that it can be repeated, and what settings are refused."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image

from datamodules.images import ImageDataModule
from tests.datamodules.noise import EVERYTHING, module, same, take


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_every_image_once(folder, world_size, batch_size):
    seen, counts = [], set()
    for rank in range(world_size):
        data = module(folder, rank, world_size, batch_size=batch_size)
        loader = data.val_dataloader()
        batches = list(loader)
        counts |= {len(batches), len(loader)}
        for images, labels, indices in batches:
            assert images.shape == (batch_size, 3, 16, 16)
            assert labels.dtype == indices.dtype == torch.int64
            for image, label, index in zip(images, labels.tolist(), indices.tolist(), strict=True):
                if index == -1:
                    assert (label, image.abs().max()) == (-100, 0)
                    continue
                assert f"class{label}" in data.file_of("val", index)
                picture = data.image_of("val", index)
                assert picture.dtype == torch.uint8
                assert torch.allclose(data.denormalise(image), picture / 255, atol=1e-6)
                seen.append(index)
    assert sorted(seen) == list(range(23))
    assert len(counts) == 1  # all ranks take the same number of batches


def test_workers_keep_the_order_of_evaluation(folder):
    alone = list(module(folder, batch_size=3).val_dataloader())
    assert same(alone, list(module(folder, batch_size=3, num_workers=2).val_dataloader()))
    assert torch.cat([indices for _, _, indices in alone])[:23].tolist() == list(range(23))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(folder, num_workers):
    whole = take(module(folder, **EVERYTHING).train_dataloader(), 9)  # an epoch has 6
    first = module(folder, **EVERYTHING, num_workers=num_workers).train_dataloader()
    assert same(take(first, 4), whole[:4])
    state = first.state_dict()
    assert state == {"position": 16}
    second = module(folder, **EVERYTHING, num_workers=num_workers).train_dataloader()
    take(second, 1)
    second.load_state_dict(state)
    assert same(take(second, 5), whole[4:])
    assert same(take(first, 5), whole[4:])


def test_two_ranks_see_the_samples_of_one(folder):
    settings = EVERYTHING | {"mixup": 0.0, "cutmix": 0.0}  # what is mixed with what depends on the batch
    whole = take(module(folder, **settings).train_dataloader(), 7)
    halves = [take(module(folder, r, 2, **settings | {"batch_size": 2}).train_dataloader(), 7) for r in range(2)]
    joined = [tuple(torch.cat(parts) for parts in zip(*pair, strict=True)) for pair in zip(*halves, strict=True)]
    assert same(joined, whole)


def test_another_seed_is_another_order_and_another_augmentation(folder, tmp_path):
    def first(source, **settings):
        images, targets = take(module(source, batch_size=12, **settings).train_dataloader(), 1)[0]
        return images, targets.tolist()

    assert first(folder)[1] != first(folder, seed=1)[1]
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.open(folder / "train/class0/00.png").save(tmp_path / split / "cat/0.png")
    assert not torch.equal(first(tmp_path)[0], first(tmp_path, seed=1)[0])  # of the only image


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_image_comes_once_in_an_epoch(folder, num_workers):
    data = module(folder, batch_size=23, crop="none", hflip=0, num_workers=num_workers)
    pictures = {data.image_of("train", i).numpy().tobytes() for i in range(23)}
    for images, _ in take(data.train_dataloader(), 3):
        seen = (data.denormalise(images) * 255).round().to(torch.uint8)
        assert {image.numpy().tobytes() for image in seen} == pictures


def test_workers_live_on_from_epoch_to_epoch(folder):
    loader = module(folder, num_workers=1).train_dataloader()
    take(loader, 1)
    (worker,) = loader._iterator._workers
    take(loader, 12)
    assert loader._iterator._workers == [worker]
    assert worker.is_alive()
    CombinedLoader(loader).reset()  # as the trainer does when it stops
    assert not worker.is_alive()
    rest = take(loader, 2)
    loader.load_state_dict({"position": 13 * 4})
    assert same(take(loader, 2), rest)


def test_the_loader_knows_how_long_it_was_waited_for(folder, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("datamodules.loader.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    data = module(folder)
    loader = data.train_dataloader()
    assert loader.waited == 0.0
    transform = loader.dataset.transform

    def slow(image):
        clock[0] += 1
        return transform(image)

    loader.dataset.transform = slow
    for _ in zip(range(2), loader, strict=False):
        clock[0] += 1000  # the consumer's own time
    assert loader.waited == 2 * data.batch_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "data.batch_size=0: must be at least 1"),
        ({"repeats": 0}, "data.repeats=0"),
        ({"hflip": 1.5}, "data.hflip=1.5: must be at least 0 and at most 1"),
        ({"mixup": -1.0}, "data.mixup=-1.0"),
        ({"scale": (0.5, 0.2)}, r"data.scale=\(0.5, 0.2\): must be two shares"),
        ({"crop_pct": 0.0}, "data.crop_pct=0.0"),
        ({"rand_augment": "m9"}, "data.rand_augment='m9': .* such as rand-m9-mstd0.5-inc1"),
        ({"batch_size": 5, "mixup": 0.8}, "data.batch_size=5: mixup and cutmix mix pairs, so it must be even"),
        ({"source": "nowhere"}, "data.source='nowhere': no such folder"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**settings)


def test_classes_are_known_before_images():
    data = ImageDataModule()
    assert (data.num_classes, data.class_names[3], data.image_size) == (10, "3", 224)
    assert (data.batch_size, data.seed) == (128, 0)
    assert (data.num_images("train"), data.num_images("val"), data.num_images("test")) == (1437, 360, 360)
