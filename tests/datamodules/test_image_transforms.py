"""What happens to images and targets on the way to a batch: as timm does it, and as often as is said."""

import random

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

from datamodules.images import ImageDataModule
from tests.datamodules.noise import EVERYTHING, module, same, take


@pytest.mark.parametrize(("size", "crop_pct"), [(24, 0.9), (48, 0.875)])
@pytest.mark.parametrize("source", ["noise", "cifar10"])
def test_evaluation_is_timms(source, size, crop_pct, request):
    source = request.getfixturevalue("folder" if source == "noise" else "shared_data")
    source = source if (source / "val").exists() else source / "images/cifar10"
    data = module(source, image_size=size, crop_pct=crop_pct, batch_size=10)
    theirs = timm.data.create_dataset("", root=str(source / "val"))
    theirs.transform = timm.data.create_transform(size, interpolation="bicubic", crop_pct=crop_pct)
    images, labels, indices = next(iter(data.val_dataloader()))
    assert len(theirs) == data.num_images("val")
    assert indices.tolist() == list(range(10))
    for image, label, index in zip(images, labels, range(10), strict=True):
        expected, target = theirs[index]
        assert (data.file_of("val", index), int(label)) == (theirs.filename(index, absolute=True), target)
        assert torch.equal(image, expected)


def test_augmentation_leaves_the_global_generators_alone(folder):
    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    data = module(folder, **EVERYTHING)
    before = states()
    first = take(data.train_dataloader(), 3)
    list(data.val_dataloader())
    assert states() == before
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert same(take(data.train_dataloader(), 3), first)


def test_an_image_is_augmented_differently_each_time(folder):
    data = module(folder, batch_size=23, rand_augment="rand-m9-mstd0.5-inc1")
    (first, _), (second, _) = take(data.train_dataloader(), 2)
    pictures = {image.numpy().tobytes() for image in torch.cat([first, second])}
    assert len(pictures) == 46


def test_repeated_augmentation(folder):
    still = {"crop": "none", "hflip": 0, "repeats": 3, "batch_size": 6}
    data = module(folder, **still)
    loader = data.train_dataloader()
    assert len(loader) == 4  # 23 samples, whatever they show
    images = torch.cat([images for images, _ in take(loader, 12)])[: 3 * 23].unflatten(0, (23, 3))
    assert (images == images[:, :1]).all()
    assert len({group[0].numpy().tobytes() for group in images}) == 23
    images, targets = take(module(folder, **still | {"crop": "resized"}).train_dataloader(), 1)[0]
    assert targets.unflatten(0, (2, 3)).unique(dim=1).shape == (2, 1)
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_targets_are_mixed_as_the_images_are(plain, mix):
    data = module(plain, **mix)
    mixed = set()
    for images, targets in take(data.train_dataloader(), 12):
        assert (targets.dtype, targets.shape) == (torch.float32, (4, 3))
        assert torch.allclose(targets.sum(1), torch.ones(4))
        shares = data.denormalise(images).mean((2, 3)) * 255 / 200  # (B, 3): channel c has the share of class c
        assert torch.allclose(shares, targets, atol=1e-4)
        mixed |= {round(share, 3) for share in targets.flatten().tolist() if 0.01 < share < 0.99}
    assert len(mixed) > 8  # not always the same shares


def test_without_mixing_targets_are_labels(plain):
    data = module(plain)
    for images, targets in take(data.train_dataloader(), 3):
        assert (targets.dtype, targets.shape) == (torch.int64, (4,))
        assert data.denormalise(images).mean((2, 3)).argmax(1).tolist() == targets.tolist()


def test_the_resized_crop_is_timms(folder):
    settings = {"scale": (0.3, 0.9), "hflip": 0.3, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    ours = module(folder, rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25, **settings).train_transform
    theirs = timm.data.create_transform(
        16,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        re_mode="pixel",
        interpolation="bicubic",
        **settings,
    )
    image = Image.open(folder / "train/class0/00.png")
    for seed in range(5):
        outputs = []
        for transform in (ours, theirs):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            outputs.append(transform(image))
        assert torch.equal(*outputs)
    assert "ColorJitter(brightness=(0.7" in str(module(folder, color_jitter=0.3).train_transform)


def test_a_padded_crop_moves_the_image_by_an_eighth_at_most(folder):
    data = module(folder, image_size=32, crop="padded", hflip=0, mean=(0, 0, 0), std=(1, 1, 1))
    image = Image.new("RGB", (32, 32))
    image.putpixel((16, 16), (255, 255, 255))
    places = {tuple(data.train_transform(image)[0].nonzero()[0].tolist()) for _ in range(600)}
    assert places == {(y, x) for y in range(12, 21) for x in range(12, 21)}


def test_posterizing_to_no_bits_is_black(plain):
    """As it was before Pillow 13, which refuses it; timm asks for it once in some hundred images."""
    data = module(plain, rand_augment="rand-m10-inc1")
    ops = [op for step in data.train_transform.transforms for op in getattr(step, "ops", ())]
    for op in ops:
        op.prob = 1.0
    black = [op(Image.new("RGB", (4, 4), "white")) for op in ops if op.name == "PosterizeIncreasing"]
    assert [image.getextrema() for image in black] == [((0, 0),) * 3]


def test_color_jitter_without_effect_is_reported():
    with pytest.warns(UserWarning, match="data.color_jitter=0.3: has no effect next to rand_augment"):
        ImageDataModule(color_jitter=0.3, rand_augment="rand-m9")


def test_grey_images(folder):
    """Of one channel, everything that is done to colored ones; evaluation is timm's."""
    data = module(folder, in_channels=1, batch_size=8, color_jitter=0.0, **EVERYTHING)
    for images, _ in take(data.train_dataloader(), 6):
        assert images.shape == (8, 1, 16, 16)
    assert (data.mean, data.std) == (pytest.approx((0.449,), abs=1e-3), pytest.approx((0.226,), abs=1e-3))
    theirs = timm.data.create_dataset("", root=str(folder / "val"), input_img_mode="L")
    theirs.transform = timm.data.create_transform((1, 16, 16), interpolation="bicubic", mean=data.mean, std=data.std)
    images, _, _ = next(iter(data.val_dataloader()))
    assert images.shape == (8, 1, 16, 16)
    assert all(torch.equal(image, theirs[i][0]) for i, image in enumerate(images))
    picture = data.image_of("val", 0)
    assert (picture.shape, picture.dtype) == ((1, 16, 16), torch.uint8)
    assert torch.allclose(data.denormalise(images[0]), picture / 255, atol=1e-6)
    with pytest.raises(ValueError, match=r"data.mean=\(0.5,\): needs 3 numbers, one of each channel"):
        ImageDataModule(mean=(0.5,))
