"""ImageDataModule: images to batches. B batch, S image size, C classes.

One file: the settings of one class, and what they mean for each split.
"""

import re
import warnings
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torchvision import transforms

from datamodules.image_batches import AugmentedBatches, OrderedImages
from datamodules.image_classes import read_class_map
from datamodules.image_files import ENDINGS, Images, Part
from datamodules.image_sources import open_source, open_unlabelled
from datamodules.image_splits import ImageFormat, Source, counted, some
from datamodules.loader import IGNORE, Loader, StreamDataModule, StreamLoader, loading, rank_and_world_size

SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class ImageDataModule(StreamDataModule):
    """Images for classification. The augmentation is timm's; what each training batch holds depends on nothing but
    `seed` and its position in the stream.

    Args:
        source: digits (scikit-learn's, 8x8), a folder with train/CLASS/ and val/CLASS/ (test/CLASS/ too, or the test
            runs on val/), or hf:NAME[:CONFIG], a Hugging Face data set of the hub or a local folder of one.
        val_fraction: share of the training images, of each class, to hold out where there is no validation split.
        image_column: of a Hugging Face data set. Default: the first column of images.
        label_column: the same, of class labels, strings or integers. Default: the first of class labels, or `label`.
        class_map: a text file, a line for each class in the order of the model's outputs: its name, and after tabs
            other names that it has in the data. For an evaluation of some of a model's classes, which are then told
            apart from each other only, or under other names. Default: the data's classes, in timm's order.
        classes: names of classes: only images of these are in any split. The outputs stand for all classes as ever.
        image_size: height and width that the model sees, S.
        batch_size: images of a batch on each device, B.
        crop: of training images. resized: a random part, resized; padded: a random place on a black margin of S/8;
            none: what evaluation sees.
        scale: smallest and largest share of the image that `resized` takes.
        hflip: probability of a mirror image.
        rand_augment: timm's description of a RandAugment, such as rand-m9-mstd0.5-inc1.
        color_jitter: strength of random brightness, contrast and saturation.
        random_erasing: probability that a rectangle becomes noise.
        mixup: alpha of the Beta distribution of mixup's weights; 0: none.
        cutmix: the same of CutMix; with both, every batch gets one of them.
        repeats: so many augmentations of an image next to each other (repeated augmentation). An epoch has as many
            samples as ever, so it takes `repeats` of them to see all images.
        crop_pct: share of the resized image's side that evaluation keeps.
        interpolation: of every resize.
        in_channels: 3 for RGB, 1 for grey.
        mean: of each channel, subtracted; grey takes the mean of three.
        std: of each channel, divided by; grey takes the mean of three.
        skip_unreadable: train on the next image in place of one that can't be read, and count it.
        num_workers: processes that load batches.
        seed: of the order of samples and of the augmentation.
        predict_source: images for `predict`: a folder, searched with all that is below it, a file, a glob, or
            hf:NAME[:CONFIG][@SPLIT]. Default: the validation images.
        class_names: names of the classes, for `predict` where there is no source; default: the source's.

    Raises:
        ValueError: for a setting out of range, a source that isn't there or has no classes; in `setup`, for splits
            that don't have the same classes, or without images; in loading, for an image that can't be read.
    """  # noqa: D205

    def __init__(
        self,
        source: str = "digits",
        val_fraction: float | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        class_map: str | None = None,
        classes: list[str] | None = None,
        image_size: int = 224,
        batch_size: int = 128,
        crop: Literal["resized", "padded", "none"] = "resized",
        scale: tuple[float, float] = (0.08, 1.0),
        hflip: float = 0.5,
        rand_augment: str | None = None,
        color_jitter: float = 0.0,
        random_erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        repeats: int = 1,
        crop_pct: float = 0.875,
        interpolation: Literal["bilinear", "bicubic"] = "bicubic",
        in_channels: Literal[1, 3] = 3,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        skip_unreadable: bool = False,
        num_workers: int = 4,
        seed: int = 0,
        predict_source: str | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value, least, most in (
            ("image_size", image_size, 1, None),
            ("batch_size", batch_size, 1, None),
            ("hflip", hflip, 0, 1),
            ("color_jitter", color_jitter, 0, None),
            ("random_erasing", random_erasing, 0, 1),
            ("mixup", mixup, 0, None),
            ("cutmix", cutmix, 0, None),
            ("repeats", repeats, 1, None),
            ("num_workers", num_workers, 0, None),
            ("seed", seed, 0, None),
        ):
            if value < least or (most is not None and value > most):
                limit = f"at least {least}" + (f" and at most {most}" if most is not None else "")
                raise ValueError(f"data.{name}={value}: must be {limit}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"data.scale={scale}: must be two shares of the image, 0 < smallest <= largest <= 1")
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction}: must lie between 0 and 1")
        if in_channels == 1:
            mean, std = ((sum(values) / len(values),) for values in (mean, std))
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != in_channels:
                raise ValueError(f"data.{name}={values}: needs {in_channels} numbers, one of each channel")
        if not 0 < crop_pct <= 1:
            raise ValueError(f"data.crop_pct={crop_pct}: must be above 0 and at most 1")
        if rand_augment is not None and not re.fullmatch(r"rand(-[a-z]+[\d.]+)+", rand_augment):
            raise ValueError(
                f"data.rand_augment={rand_augment!r}: not timm's description of a RandAugment; give one such as "
                "rand-m9-mstd0.5-inc1"
            )
        if rand_augment and color_jitter:
            warnings.warn(f"data.color_jitter={color_jitter}: has no effect next to rand_augment", stacklevel=2)
        if (mixup or cutmix) and batch_size % 2:
            raise ValueError(f"data.batch_size={batch_size}: mixup and cutmix mix pairs, so it must be even")
        self.image_size, self.batch_size, self.repeats, self.seed = image_size, batch_size, repeats, seed
        self.in_channels: int = in_channels
        self.mean, self.std, self.crop_pct, self.interpolation = mean, std, crop_pct, interpolation
        self.skip_unreadable, self.num_workers, self.predict_source = skip_unreadable, num_workers, predict_source

        same = {"input_size": image_size, "interpolation": interpolation, "mean": mean, "std": std}
        self.eval_transform = create_transform(**same, crop_pct=crop_pct)
        self.picture_transform = create_transform(**same, crop_pct=crop_pct, normalize=False)
        self.train_transform = create_transform(
            **same,
            is_training=True,
            scale=scale,
            hflip=hflip,
            color_jitter=color_jitter or None,
            auto_augment=rand_augment,
            re_prob=random_erasing,
            re_mode="pixel",
        )
        for op in (op for step in self.train_transform.transforms for op in getattr(step, "ops", ())):
            if op.aug_fn is posterize:
                op.aug_fn = _posterize
        resize, center_crop = self.eval_transform.transforms[:2]
        if crop == "padded":
            resize = transforms.Resize(image_size, resize.interpolation)
            random_crop = transforms.RandomCrop(image_size, padding=image_size // 8)
            self.train_transform.transforms[0] = transforms.Compose([resize, random_crop])
        elif crop == "none":
            self.train_transform.transforms[0] = transforms.Compose([resize, center_crop])

        # Known before any image is read, since the model's head is built from it.
        self._form = ImageFormat(val_fraction, image_column, label_column)
        self._given_source, self._class_map, self._given_names = source, class_map, class_names
        self.num_classes = len(self.class_names)
        self.classes = classes
        unknown = [name for name in classes or () if name not in self.class_names]
        if unknown or classes == []:
            listed = some(self.class_names, 10)
            raise ValueError(f"data.classes={classes}: {some(unknown)} are not among the classes: {listed}")
        self.mix = Mixup(mixup, cutmix, label_smoothing=0, num_classes=self.num_classes) if mixup or cutmix else None
        self._images: dict[str, Images] = {}
        self._unreadable = torch.zeros(0, dtype=torch.bool)

    @cached_property
    def _source(self) -> Source:
        source = open_source(self._given_source, self._form)
        if self._class_map is not None:
            source.classes = read_class_map(self._class_map)
        return source

    @property
    def class_names(self) -> list[str]:
        """In the order of the model's outputs."""
        return self._source.classes.names if self._given_names is None else self._given_names

    def set_class_order(self, names: list[str]) -> None:
        """Take the order of a model that knows the same classes."""
        if self._given_names is not None:
            self._given_names = names
            return
        self._source.classes = self._source.classes.in_order_of(names)
        self._images.clear()

    def some_classes(self, split: str) -> list[int] | None:
        """The classes that the split has images of, where a class map names more; None for all."""
        if self._given_names is not None or not self._source.classes.mapped:
            return None
        labels = self.images(split).labels
        found: list[int] = np.unique(labels[labels >= 0]).tolist()
        return found if len(found) < self.num_classes else None

    def prepare_data(self) -> None:
        """Download what isn't here."""
        if "_source" in vars(self):
            self._source.prepare()

    def setup(self, stage: str) -> None:
        """List the images of the stage's splits and check them."""
        for split in SPLITS[stage]:
            self.images(split)

    def images(self, split: str) -> Images:
        """The images of train, val, test or predict."""
        if split not in self._images:
            self._images[split] = self._open(split)
        return self._images[split]

    def _open(self, split: str) -> Images:
        if split != "predict":
            images, where = self._source.images(split), f"the {split} split"
        elif self.predict_source is None:
            return self.images("val")
        else:
            where = f"data.predict_source={self.predict_source!r}"
            images = open_unlabelled(self.predict_source, self._form)
        if self.classes is not None and split != "predict":
            numbers = [self.class_names.index(name) for name in self.classes]
            images = Part(images, np.flatnonzero(np.isin(images.labels, numbers)))
        left_out = f"; left out: {counted(images.left_out)}" if images.left_out else ""
        if not len(images):
            raise ValueError(f"{where}: no images in it{left_out} (images end in {', '.join(ENDINGS)})")
        if images.empty and not (split == "predict" or (split == "train" and self.skip_unreadable)):
            raise ValueError(
                f"{where}: {len(images.empty)} of its files are empty or links that lead nowhere, the first "
                f"{images.empty[0]}; copy them again"
            )
        if split == "train" and (images.labels == IGNORE).any():
            raise ValueError(f"{where}: {int((images.labels == IGNORE).sum()):,} of its images have no label")
        if left_out:
            rank_zero_info(f"{where}: {len(images):,} images{left_out}")
        return images

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What evaluation does to an image, in timm's words."""
        return {
            "input_size": [self.in_channels, self.image_size, self.image_size],
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def order(self) -> dict[str, int | str]:
        """The training images, and how they are shuffled and repeated."""
        images = self.images("train")
        training = f"{len(images):,} with fingerprint {images.fingerprint}"
        return {"training images": training, "data.repeats": self.repeats, "data.seed": self.seed}

    def num_images(self, split: str) -> int:
        """How many images train, val, test or predict has."""
        return len(self.images(split))

    def file_of(self, split: str, index: int) -> str:
        """The path of the image with this index in an evaluation batch, or what comes nearest to one."""
        return self.images(split).name(index)

    def image_of(self, split: str, index: int) -> Tensor:
        """What evaluation sees of an image, before it is normalised: uint8 (channels, S, S)."""
        return self.picture_transform(self.images(split).read(index, self._mode))

    @property
    def _mode(self) -> str:
        """Pillow's name for the colors."""
        return "RGB" if self.in_channels == 3 else "L"

    def denormalise(self, images: Tensor) -> Tensor:
        """Images of a batch as pictures: (..., channels, S, S), each value from 0 to 1."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

    @property
    def unreadable(self) -> int:
        """Training images that this rank could not read so far, with `skip_unreadable`."""
        return int(self._unreadable.sum())

    def train_dataloader(self) -> StreamLoader:
        """This rank's share of the shuffled stream: images float32 (B, channels, S, S), targets int64 (B).

        With mixup or cutmix the targets are probabilities, float32 (B, C).
        """
        images = self.images("train")
        self._unreadable = torch.zeros(len(images), dtype=torch.bool).share_memory_()
        stream = AugmentedBatches(
            images,
            self._mode,
            self.train_transform,
            self.image_size,
            self.mix,
            repeats=self.repeats,
            seed=self.seed,
            unreadable=self._unreadable if self.skip_unreadable else None,
            place=(self.batch_size, *rank_and_world_size(self)),
        )
        return StreamLoader(stream, self.trainer.accumulate_grad_batches if self.trainer else 1, self.num_workers)

    def val_dataloader(self) -> Loader:
        """Every validation image once."""
        return self._in_order("val")

    def test_dataloader(self) -> Loader:
        """Every test image once."""
        return self._in_order("test")

    def predict_dataloader(self) -> Loader:
        """Every image of `predict_source` once; one that can't be read has the label UNREADABLE."""
        return self._in_order("predict")

    def _in_order(self, split: str) -> Loader:
        batches = OrderedImages(
            self.images(split),
            self._mode,
            self.eval_transform,
            self.image_size,
            skip_unreadable=split == "predict",
            place=(self.batch_size, *rank_and_world_size(self)),
        )
        return Loader(batches, **loading(self.num_workers), persistent_workers=self.num_workers > 0)


def _posterize(image: Image.Image, bits: int, **settings: object) -> Image.Image:
    """timm's, which asks Pillow for 0 bits now and then: black, but an error since Pillow 13."""
    return posterize(image, bits, **settings) if bits else Image.new(image.mode, image.size)
