"""Where images come from: scikit-learn's digits, folders of class folders, Hugging Face datasets.

A source knows its classes before any image is read, and opens each split as `Images`.

One file: the three sources are told apart by the first word of `data.source`, and share what they say when it is wrong.
"""

import hashlib
import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.loader import IGNORE

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VAL_SPLITS = ("val", "validation", "valid", "dev")
SORT_BY_CLASS = (
    "move each image into a folder of its class, named as in train/: while read image class rest; do mkdir -p "
    "$class; mv $image $class/; done < LIST, where LIST has a line 'IMAGE CLASS' for each, such as tiny-imagenet's "
    "val_annotations.txt; for ImageNet make it from the devkit's ILSVRC2012_validation_ground_truth.txt and meta.mat"
)


class UnreadableImage(ValueError):
    """An image that can't be decoded; says which."""


class Images(ABC):
    """The images of one split.

    Attributes:
        labels: class of each image, (number of images); IGNORE where there is none.
        empty: names of files without a single byte.
    """

    labels: NDArray[np.int64]
    empty: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what is in the split, in its order; not of pixels, which would take an epoch."""
        return hashlib.blake2b(self.labels.tobytes(), digest_size=8).hexdigest()

    @abstractmethod
    def name(self, index: int) -> str:
        """The file's path, or what comes nearest to one."""

    @abstractmethod
    def data(self, index: int) -> bytes:
        """The image as it is stored."""

    def read(self, index: int) -> Image.Image:
        """The image in RGB, whatever it is stored as.

        Raises:
            UnreadableImage: naming the image.
        """
        try:
            image = Image.open(io.BytesIO(self.data(index)))
            image.load()
        except Exception as error:  # what Pillow raises for broken files has no common class
            raise UnreadableImage(f"{self.name(index)}: can't be read as an image: {error}") from error
        return image if image.mode == "RGB" else image.convert("RGB")


class Source(Protocol):
    """A data set of images."""

    class_names: list[str]

    def prepare(self) -> None:
        """Download it, if it isn't here."""

    def images(self, split: str) -> Images:
        """The images of train, val or test (val, where there are no test images with labels)."""


class Digits:
    """Handwritten digits of 8x8 pixels that scikit-learn brings along. Every fifth is for validation."""

    def __init__(self) -> None:
        self.class_names = [str(digit) for digit in range(10)]

    def prepare(self) -> None:
        """Nothing to do."""

    def images(self, split: str) -> Images:
        """Four fifths, or the rest."""
        return _DigitImages(validation=split != "train")


class _DigitImages(Images):
    def __init__(self, validation: bool) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.chosen = np.flatnonzero((np.arange(len(digits.target)) % 5 == 0) == validation)
        self.labels = digits.target[self.chosen].astype(np.int64)
        self.pixels = (digits.images[self.chosen] * (255 / 16)).round().astype(np.uint8)  # (images, 8, 8); were 0-16

    def name(self, index: int) -> str:
        return f"digits/{self.chosen[index]}"

    def data(self, index: int) -> bytes:
        return b"P5 8 8 255 " + self.pixels[index].tobytes()  # a greyscale .pgm


class Folder:
    """A folder with val/, train/ to train on and, if there is one, test/; in each, a folder of images for each class.

    Raises:
        ValueError: when one of them is missing; in `images`, when a class is.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(
                f"data.source={root!r}: no such folder (in {Path.cwd()}); give digits, hf:NAME, or a folder with "
                "train/ and val/"
            )
        found = _subfolders(self.root)
        val = [name for name in VAL_SPLITS if name in found]
        if not val:
            raise self._no_folder("val")
        # A test/ without class folders has no labels, as ImageNet's
        test = "test" if "test" in found and _subfolders(self.root / "test") else val[0]
        self.folders = {"train": self.root / "train", "val": self.root / val[0], "test": self.root / test}
        self.class_names = self._classes("train" if "train" in found else "val")  # evaluation needs no train/

    def _no_folder(self, split: str) -> ValueError:
        found = ", ".join(_subfolders(self.root)) or "none at all"
        return ValueError(
            f"data.source={str(self.root)!r}: has no folder {split}/, but {found}; put the images into train/CLASS/ "
            "and val/CLASS/"
        )

    def prepare(self) -> None:
        """Nothing to do."""

    def images(self, split: str) -> Images:
        """Those of one split; it must have images of every class."""
        if not self.folders[split].is_dir():
            raise self._no_folder(split)
        missing = sorted(set(self.class_names) - set(classes := self._classes(split)))
        unknown = sorted(set(classes) - set(self.class_names))
        if missing or unknown:
            raise ValueError(
                f"{self.folders[split]}: not the classes of {self.folders['train']}: missing {_some(missing)}, "
                f"unknown {_some(unknown)}; {SORT_BY_CLASS}"
            )
        images = FileImages(self.folders[split], classes)
        empty = np.flatnonzero(np.bincount(images.labels, minlength=len(classes)) == 0)
        if len(empty):
            raise ValueError(
                f"{self.folders[split]}: no images in class folders: {_some([classes[i] for i in empty])}; fill them, "
                f"or remove these classes from every split (images end in {', '.join(ENDINGS)})"
            )
        return images

    def _classes(self, split: str) -> list[str]:
        classes = _subfolders(folder := self.folders[split])
        if not classes:
            raise ValueError(f"{folder}: {len(os.listdir(folder))} files and no class folders; {SORT_BY_CLASS}")
        return classes


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many there are."""
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} ({shown})" if names else "none"


class FileImages(Images):
    """Image files below a folder in the order of their names, which all lie in one string of bytes: a million Python
    objects would be copied into every worker.

    Args:
        root: a folder, searched with all that is below it, or one file.
        classes: names of the subfolders that hold the classes. Default: the images have no labels.
    """  # noqa: D205

    def __init__(self, root: Path, classes: Sequence[str] = ()) -> None:
        if root.is_file():
            self.root, found = root.parent, [(_joined([root.name]), [] if root.stat().st_size else [root.name])]
        else:
            with ThreadPoolExecutor(16) as pool:  # for file systems that answer slowly
                self.root, found = root, list(pool.map(partial(_scan, root), classes or [""]))
        self.names = b"".join(names for names, _ in found)
        self.ends = np.flatnonzero(np.frombuffer(self.names, np.uint8) == 0)
        counts = [names.count(0) for names, _ in found]
        self.labels = np.repeat(np.arange(len(counts)) if classes else IGNORE, counts)
        self.empty = [str(self.root / name) for _, empty in found for name in empty]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the names below the folder, which may move."""
        return hashlib.blake2b(self.names + self.labels.tobytes(), digest_size=8).hexdigest()

    def name(self, index: int) -> str:
        """The file's path."""
        start = self.ends[index - 1] + 1 if index else 0
        return str(self.root / os.fsdecode(self.names[start : self.ends[index]]))

    def data(self, index: int) -> bytes:
        """The file."""
        return Path(self.name(index)).read_bytes()


def _scan(root: Path, folder: str) -> tuple[bytes, list[str]]:
    """Images below a folder: their names from `root` on, each with a 0 at its end, and of those the empty ones."""
    names, empty, pending = [], [], [folder]
    while pending:
        place = pending.pop()
        with os.scandir(root / place) as entries:
            for entry in entries:
                name = f"{place}/{entry.name}" if place else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append(name)
                elif name.lower().endswith(ENDINGS):
                    names.append(name)
                    if entry.stat().st_size == 0:
                        empty.append(name)
    return _joined(sorted(names)), empty


def _joined(names: Sequence[str]) -> bytes:
    return b"".join(os.fsencode(name) + b"\0" for name in names)  # the one byte that no name holds


class HuggingFace:
    """`hf:PATH[:CONFIG]`: an image data set of the hub, or a local folder of one, with a column of images and one of
    class labels (the first of each).

    Raises:
        ValueError: when it can't be had, has no such column, or no split to validate on.
    """  # noqa: D205

    def __init__(self, spec: str) -> None:
        import datasets

        self.spec = spec
        self.path, _, config = spec.removeprefix("hf:").partition(":")
        self.config = config or None
        try:
            builder = datasets.load_dataset_builder(self.path, self.config)
            features, splits = builder.info.features, builder.info.splits
            if not (features and splits):  # nobody wrote them down: ask the files
                streamed = builder.as_streaming_dataset()
                features, splits = next(iter(streamed.values())).features, streamed
        except Exception as error:  # what the hub's client raises has no common class
            raise ValueError(f"data.source={spec!r} can't be read: {error}") from error
        self.image, self.label = (self._column(features or {}, kind) for kind in (datasets.Image, datasets.ClassLabel))
        self.class_names: list[str] = list(features[self.label].names)
        val = [name for name in (*VAL_SPLITS, "test") if name in splits]
        if "train" not in splits or not val:
            raise ValueError(
                f"data.source={spec!r}: needs the splits train and validation or test, but has {', '.join(splits)}"
            )
        if val[0] == "test":
            warnings.warn(f"data.source={spec!r}: has no validation split, so the test split is used", stacklevel=2)
        self.splits = {"train": "train", "val": val[0], "test": "test" if "test" in splits else val[0]}

    def _column(self, features: dict[str, Any], kind: type) -> str:
        found = [name for name, feature in features.items() if isinstance(feature, kind)]
        if not found:
            columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
            raise ValueError(f"data.source={self.spec!r}: no column is a datasets.{kind.__name__}, but {columns}")
        return found[0]

    def prepare(self) -> None:
        """Download it, if it isn't here."""
        self._load("train")

    def images(self, split: str) -> Images:
        """Those of one split."""
        images = _Rows(self._load(split), self.image, self.label, f"{self.path}/{self.splits[split]}")
        return self.images("val") if split == "test" and (images.labels == IGNORE).all() else images

    def _load(self, split: str) -> Any:
        import datasets

        return datasets.load_dataset(self.path, self.config, split=self.splits[split])


class _Rows(Images):
    def __init__(self, dataset: Any, image: str, label: str, where: str) -> None:
        import datasets

        self.image, self.where = image, where
        labels = np.asarray(dataset.select_columns(label).with_format("numpy")[:][label], dtype=np.int64)
        self.labels = np.where(labels < 0, IGNORE, labels)  # the hub's sign for a secret label is -1
        self.dataset = dataset.select_columns(image).cast_column(image, datasets.Image(decode=False))

    def name(self, index: int) -> str:
        path = self.dataset[index][self.image]["path"]  # a name, or where the file was when the data set was made
        return f"{self.where}/{Path(path).name if path else index}"

    def data(self, index: int) -> bytes:
        stored = self.dataset[index][self.image]
        return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()


def open_source(spec: str) -> Source:
    """The source that `data.source` names: `digits`, `hf:...`, or a folder."""
    if spec == "digits":
        return Digits()
    return HuggingFace(spec) if spec.startswith("hf:") else Folder(spec)
