"""Batches of images: who gets which, what happens to them on the way, and that it can be repeated.

One file: the tests share folders of images, which takes seconds to make.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data
import torch
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image

from datamodules.images import ImageDataModule

COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]  # of the classes
EVERYTHING = {
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "repeats": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 images of noise in 3 classes, no two of a size, as train/ and as val/."""
    root = tmp_path_factory.mktemp("noise")
    draw = np.random.default_rng(0)
    for i in range(23):
        path = root / "train" / f"class{i % 3}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20 + i, 43 - i, 3), dtype=np.uint8)).save(path)
    (root / "val").symlink_to(root / "train")
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """12 images, each all in the color of its class."""
    root = tmp_path_factory.mktemp("plain")
    for i in range(12):
        path = root / "train" / f"class{i % 3}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), COLORS[i % 3]).save(path)
    (root / "val").symlink_to(root / "train")
    return root


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


def test_another_seed_is_another_order_and_another_augmentation(folder, tmp_path):
    def first(source, **settings):
        images, targets = take(module(source, batch_size=12, **settings).train_dataloader(), 1)[0]
        return images, targets.tolist()

    assert first(folder)[1] != first(folder, seed=1)[1]
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.open(folder / "train/class0/00.png").save(tmp_path / split / "cat/0.png")
    assert not torch.equal(first(tmp_path)[0], first(tmp_path, seed=1)[0])  # of the only image


def test_an_image_is_augmented_differently_each_time(folder):
    data = module(folder, batch_size=23, rand_augment="rand-m9-mstd0.5-inc1")
    (first, _), (second, _) = take(data.train_dataloader(), 2)
    pictures = {image.numpy().tobytes() for image in torch.cat([first, second])}
    assert len(pictures) == 46


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_image_comes_once_in_an_epoch(folder, num_workers):
    data = module(folder, batch_size=23, crop="none", hflip=0, num_workers=num_workers)
    pictures = {data.image_of("train", i).numpy().tobytes() for i in range(23)}
    for images, _ in take(data.train_dataloader(), 3):
        seen = (data.denormalise(images) * 255).round().to(torch.uint8)
        assert {image.numpy().tobytes() for image in seen} == pictures


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


def broken(folder, tmp_path, *names):
    """A copy of the folder in which some files of train/ are cut short."""
    import shutil

    shutil.copytree(folder / "train", tmp_path / "train")
    (tmp_path / "val").symlink_to(folder / "val")
    paths = [tmp_path / "train" / name for name in names]
    for path in paths:
        path.write_bytes(path.read_bytes()[:100])
    return paths


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_stops_at_an_image_that_can_not_be_read(folder, tmp_path, num_workers):
    (path,) = broken(folder, tmp_path, "class1/04.png")
    loader = module(tmp_path, num_workers=num_workers).train_dataloader()
    with pytest.raises(ValueError, match=rf"^{path}: can't be read .* data\.skip_unreadable=true") as caught:
        take(loader, 6)
    assert "\n" not in str(caught.value)  # one line
    assert bool(num_workers) == (
        "Traceback" in "".join(getattr(caught.value, "__notes__", []))
    )  # for TOKENFORMER_DEBUG
    CombinedLoader(loader).reset()  # as the trainer does when it stops


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*training takes the next image")
def test_an_image_that_can_not_be_read_is_replaced_by_the_next(folder, tmp_path, num_workers):
    broken(folder, tmp_path, "class1/04.png", "class1/07.png", "class2/20.png")
    settings = {"crop": "none", "hflip": 0, "batch_size": 23, "skip_unreadable": True, "num_workers": num_workers}
    data = module(tmp_path, **settings)
    ((images, targets),) = take(data.train_dataloader(), 1)
    assert data.unreadable == 3
    pictures = {data.image_of("val", i).numpy().tobytes(): i for i in range(23)}
    seen = [pictures[image.numpy().tobytes()] for image in (data.denormalise(images) * 255).round().to(torch.uint8)]
    files = [data.file_of("val", i)[-12:-4] for i in seen]
    assert files.count("lass1/10") == 3  # for 04 and 07 too: the next in the order of names
    assert files.count("lass0/00") == 2  # after the last comes the first
    assert targets.tolist() == data.images("val").labels[seen].tolist()
    again = module(tmp_path, **settings | {"num_workers": 1})
    assert torch.equal(take(again.train_dataloader(), 1)[0][0], images)


def test_skipped_files_are_named(folder, tmp_path):
    (path,) = broken(folder, tmp_path, "class1/04.png")
    data = module(tmp_path, skip_unreadable=True)
    with pytest.warns(UserWarning, match=rf"{path}: can't be read .*training takes the next image") as warned:
        take(data.train_dataloader(), 12)
    assert len(warned) == 1  # in two epochs
    assert data.unreadable == 1


def test_a_disk_that_is_gone_stops_even_so(folder, tmp_path):
    broken(folder, tmp_path)
    data = module(tmp_path, skip_unreadable=True)
    (tmp_path / "train").rename(tmp_path / "gone")
    with (
        pytest.warns(UserWarning, match="training takes the next image"),
        pytest.raises(ValueError, match=r"images in a row can't be read; the last: .*No such file"),
    ):
        take(data.train_dataloader(), 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_never_skips(folder, tmp_path, num_workers):
    (path,) = broken(folder, tmp_path, "class1/04.png")
    (tmp_path / "val").unlink()
    (tmp_path / "val").symlink_to(tmp_path / "train")
    data = module(tmp_path, skip_unreadable=True, num_workers=num_workers)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/val/class1/{path.name}: can't be read") as caught:
        list(data.val_dataloader())
    assert "\n" not in str(caught.value)


def test_empty_files_are_found_before_the_first_epoch(folder, tmp_path):
    (path,) = broken(folder, tmp_path, "class1/04.png")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"train split: 1 of its files are empty .*, the first {path}"):
        module(tmp_path)
    assert module(tmp_path, skip_unreadable=True).num_images("train") == 23


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


def test_color_jitter_without_effect_is_reported():
    with pytest.warns(UserWarning, match="data.color_jitter=0.3: has no effect next to rand_augment"):
        ImageDataModule(color_jitter=0.3, rand_augment="rand-m9")


def test_classes_are_known_before_images():
    data = ImageDataModule()
    assert (data.num_classes, data.class_names[3], data.image_size) == (10, "3", 224)
    assert (data.batch_size, data.seed) == (128, 0)
    assert (data.num_images("train"), data.num_images("val"), data.num_images("test")) == (1437, 360, 360)


def predictions(source, **settings):
    data = ImageDataModule(str(source), image_size=16, batch_size=4, num_workers=0, **settings)
    data.setup("predict")
    rows = [row for batch in data.predict_dataloader() for row in zip(*batch, strict=True)]
    real = [(int(label), data.file_of("predict", int(index))) for _, label, index in rows if index >= 0]
    return [label for label, _ in real], [name for _, name in real]


def test_images_to_predict(folder, tmp_path):
    labels, names = predictions(folder)
    assert (len(labels), set(labels)) == (23, {0, 1, 2})
    assert names[0] == str(folder / "val/class0/00.png")  # the validation images
    for name in ("b.png", "a.png", "deep/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (9, 9)).save(tmp_path / name)
    paths = [str(tmp_path / name) for name in ("a.png", "b.png", "deep/c.png")]
    assert predictions(folder, predict_source=str(tmp_path)) == ([-100] * 3, paths)
    assert predictions(folder, predict_source=paths[1]) == ([-100], paths[1:2])


@pytest.mark.filterwarnings("ignore:.*its row has no prediction")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_to_predict_that_can_not_be_read_have_a_label_of_their_own(folder, tmp_path, num_workers):
    paths = broken(folder, tmp_path, "class0/03.png", "class1/04.png")
    paths[1].write_bytes(b"")
    data = ImageDataModule(
        str(folder), image_size=16, batch_size=8, num_workers=num_workers, predict_source=str(tmp_path)
    )
    data.setup("predict")
    for images, labels, indices in data.predict_dataloader():
        for image, label, index in zip(images, labels.tolist(), indices.tolist(), strict=True):
            unreadable = index >= 0 and data.file_of("predict", index) in map(str, paths)
            assert label == (-101 if unreadable else -100)
            assert bool(image.any()) == (index >= 0 and not unreadable)


def test_nothing_to_predict_is_reported(folder, tmp_path):
    with pytest.raises(ValueError, match=r"data.predict_source='.*': no images in it"):
        predictions(folder, predict_source=str(tmp_path))
    with pytest.raises(ValueError, match=r"data.predict_source='nowhere': no such file or folder"):
        predictions(folder, predict_source="nowhere")


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
