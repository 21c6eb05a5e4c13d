"""Where images come from: scikit-learn's digits, folders of class folders, Hugging Face datasets.

A source knows its classes before any image is read, and opens each split as `Images`.

One file: the three sources are told apart by the first word of `data.source`, and share what they say when it is wrong.
"""

import glob
import os
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from datamodules.image_classes import Classes, naturally
from datamodules.image_files import ENDINGS, FileImages, Images, Part, held_out
from datamodules.loader import IGNORE

VAL_SPLITS = ("val", "validation", "valid", "dev")
SORT_BY_CLASS = (
    "move each image into a folder of its class, named as in train/: while read image class rest; do mkdir -p "
    "$class; mv $image $class/; done < LIST, where LIST has a line 'IMAGE CLASS' for each, such as tiny-imagenet's "
    "val_annotations.txt; for ImageNet make it from the devkit's ILSVRC2012_validation_ground_truth.txt and meta.mat"
)


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


class Digits:
    """Handwritten digits of 8x8 pixels that scikit-learn brings along. Every fifth is for validation."""

    def __init__(self) -> None:
        self.classes = Classes.of(str(digit) for digit in range(10))

    def prepare(self) -> None:
        """Nothing to do."""

    def images(self, split: str) -> Images:
        """Four fifths, or the rest."""
        images = _DigitImages(validation=split != "train")
        images.labels = _numbers(images.labels, list("0123456789"), self.classes, "digits")
        return images


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


class _Splits(ABC):
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


class Folder(_Splits):
    """A folder with val/, train/ to train on and, if there is one, test/; in each, a folder of images for each class.

    With `val_fraction` there is no val/, and where there is no train/ either, the folder itself has the class folders.

    Raises:
        ValueError: when one of them is missing; in `images`, when a class is.
    """

    def __init__(self, root: str, form: ImageFormat) -> None:
        self.root, self.form = Path(root), form
        if not self.root.is_dir():
            raise ValueError(
                f"data.source={root!r}: no such folder (in {Path.cwd()}); give digits, hf:NAME, or a folder with "
                "train/ and val/"
            )
        for name in ("image_column", "label_column"):
            if getattr(form, name) is not None:
                raise ValueError(f"data.{name}={getattr(form, name)!r}: leave it out, a folder has no columns")
        found = _subfolders(self.root)
        self.splits = {"train": "train"} if "train" in found or form.val_fraction is None else {"train": "."}
        val = [name for name in VAL_SPLITS if name in found]
        if val and form.val_fraction is not None:
            raise _has_validation(form, root, f"{val[0]}/")
        if val:
            self.splits["val"] = val[0]
        elif form.val_fraction is None:
            raise self._no_folder("val")
        if "test" in found and self.splits["train"] != "." and _subfolders(self.root / "test"):
            self.splits["test"] = "test"  # one without class folders has no labels, as ImageNet's
        # Evaluation needs no train/.
        self.classes = Classes.of(self._folders("val" if "train" not in found and val else "train"))

    def _no_folder(self, split: str) -> ValueError:
        found = ", ".join(_subfolders(self.root)) or "none at all"
        return ValueError(
            f"data.source={str(self.root)!r}: has no folder {split}/, but {found}; put the images into train/CLASS/ "
            "and val/CLASS/, or let a part of the training images be held out: data.val_fraction 0.1"
        )

    def prepare(self) -> None:
        """Nothing to do."""

    def open(self, split: str) -> Images:
        """Those of one split; it must have images of every class."""
        place = self.root / self.splits[split]
        if not place.is_dir():
            raise self._no_folder(split)
        folders = self._folders(split)
        self._check(place, folders, split)
        labels = [self.classes.index[name] for name in folders]
        order = np.argsort(labels, kind="stable").tolist()
        images = FileImages(place, [folders[i] for i in order], [labels[i] for i in order])
        empty = [folders[i] for i in order if not np.isin(labels[i], images.labels)]
        if empty and not (self.classes.mapped and split != "train"):
            raise ValueError(
                f"{place}: no images in class folders: {_some(empty)}; fill them, or remove these classes from every "
                f"split (images end in {', '.join(ENDINGS)}{_but(images)})"
            )
        loose = sum(name.lower().endswith(ENDINGS) for name in os.listdir(place) if not name.startswith("."))
        if loose:
            images.left_out = {"image in no class folder": loose, **images.left_out}
        return images

    def _check(self, place: Path, folders: list[str], split: str) -> None:
        """Compare the folders of a split with the classes that there are."""
        known = "data.class_map" if self.classes.mapped else str(self.root / self.splits["train"])
        unknown = [name for name in folders if name not in self.classes.index]
        found = {self.classes.index.get(name) for name in folders}
        missing = [name for i, name in enumerate(self.classes.names) if i not in found]
        if self.classes.mapped and split != "train":
            missing = []  # a subset of the classes can be evaluated
        if not missing and not unknown:
            return
        if self.classes.mapped:
            remedy = "add their names to the file" if unknown else "a training needs images of every class"
        elif missing and unknown:
            remedy = "name the folders as in train/; other names for the same classes: data.class_map"
        elif missing:
            remedy = "add images of them; to evaluate some of the classes give the names of all: data.class_map"
        else:
            remedy = "remove them, or add images of them to train/"
        raise ValueError(
            f"{place}: not the classes of {known}: missing {_some(missing)}, unknown {_some(unknown)}; {remedy}"
        )

    def _folders(self, split: str) -> list[str]:
        folders = _subfolders(folder := self.root / self.splits[split])
        broken = [name for name in os.listdir(folder) if os.path.islink(folder / name) and not (folder / name).exists()]
        if any(not name.lower().endswith(ENDINGS) for name in broken):
            raise ValueError(f"{folder / broken[0]}: a link that leads nowhere; mend or remove it")
        if not folders:
            raise ValueError(f"{folder}: {len(os.listdir(folder))} files and no class folders; {SORT_BY_CLASS}")
        return folders


def _has_validation(form: ImageFormat, source: str, split: str) -> ValueError:
    return ValueError(f"data.val_fraction={form.val_fraction}: leave it out, data.source={source!r} has {split}")


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted as timm sorts classes."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(
            (entry.name for entry in entries if os.path.isdir(entry) and not entry.name.startswith(".")), key=naturally
        )


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many there are."""
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} ({shown})" if names else "none"


def counted(left_out: Any) -> str:
    """What was left out, the most frequent first."""
    return ", ".join(f"{number:,} {kind}" for kind, number in Counter(left_out).most_common())


def _but(images: Images) -> str:
    return f"; left out: {counted(images.left_out)}" if images.left_out else ""


class HuggingFace(_Splits):
    """`hf:PATH[:CONFIG]`: an image data set of the hub, or a local folder of one, with a column of images and one of
    labels: class labels, strings or integers.

    The columns are `image_column` and `label_column`, or the first of images, and the first of class labels or else
    the one that is named label.

    Raises:
        ValueError: when it can't be had, has no such column, or no split to validate on.
    """  # noqa: D205

    def __init__(self, spec: str, form: ImageFormat) -> None:
        self.spec, self.form = spec, form
        self.path, self.config, features, splits = _described(spec, "data.source")
        self.image = _image_column(features, form, spec)
        self.label = self._label_column(features)
        val = [name for name in (*VAL_SPLITS, "test") if name in splits]
        self.splits = {name: name for name in ("train", "test") if name in splits}
        if form.val_fraction is not None:
            val = [name for name in val if name != "test"]
            if val:
                raise _has_validation(form, spec, f"the split {val[0]}")
        if "train" not in splits or not (val or form.val_fraction):
            raise ValueError(
                f"data.source={spec!r}: needs the splits train and validation or test, but has {', '.join(splits)}; a "
                "part of train can be held out: data.val_fraction 0.1"
            )
        if val[:1] == ["test"]:
            warnings.warn(
                f"data.source={spec!r}: has no validation split, so the test split is used; for a part of train give "
                "data.val_fraction 0.1",
                stacklevel=2,
            )
        if val:
            self.splits["val"] = val[0]
        self._names: list[str] | None = getattr(features[self.label], "names", None)  # of class labels
        self.classes = Classes.of(self._names if self._names is not None else self._values())

    def _label_column(self, features: dict[str, Any]) -> str:
        import datasets

        given = self.form.label_column
        labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        labels += [name for name in ("label", "labels") if name in features and name not in labels]
        for name in [given] if given else labels:
            feature = features.get(name)
            kind = getattr(feature, "dtype", "")
            if isinstance(feature, datasets.ClassLabel) or "string" in kind or kind.startswith(("int", "uint")):
                return name
        found = f"data.label_column={given!r} is none" if given else "set data.label_column; none is a ClassLabel"
        raise ValueError(
            f"data.source={self.spec!r}: needs a column of class labels, strings or integers; {found}, but there are "
            f"{_kinds(features)}"
        )

    def _values(self) -> list[str]:
        """The labels of the training images, as strings."""
        found = {str(label) for label in self._load("train").unique(self.label) if not _is_secret(label)}
        return sorted(found, key=naturally)

    def prepare(self) -> None:
        """Download it, if it isn't here."""
        self._load("train")

    def open(self, split: str) -> Images:
        """Those of one split."""
        rows = self._load(split)
        where = f"{self.path}/{self.splits[split]}"
        images = _Rows(rows, self.image, where)
        labels: Any = rows.select_columns(self.label).with_format("numpy" if self._names else None)[:][self.label]
        names, numbers = self._names, labels
        if names is None:
            names = sorted({str(label) for label in labels if not _is_secret(label)}, key=naturally)
            place = {name: i for i, name in enumerate(names)}
            numbers = [IGNORE if _is_secret(label) else place[str(label)] for label in labels]
        images.labels = _numbers(np.asarray(numbers, dtype=np.int64), names, self.classes, where)
        return images

    def _load(self, split: str) -> Any:
        import datasets

        return datasets.load_dataset(self.path, self.config, split=self.splits[split])


def _is_secret(label: Any) -> bool:
    """Whether it says that an image has no label: nothing, or the hub's -1."""
    return label is None or (isinstance(label, int) and label < 0)


def _numbers(labels: NDArray[np.int64], names: Sequence[str], classes: Classes, where: str) -> NDArray[np.int64]:
    """Numbers of a data set's own `names`, as numbers of the classes; IGNORE for those below 0."""
    number = np.asarray([classes.index.get(name, -1) for name in names] or [-1], dtype=np.int64)
    labels = np.where(labels < 0, IGNORE, labels)
    used = np.unique(labels[labels >= 0])
    if unknown := [names[i] for i in used.tolist() if number[i] < 0]:
        known = "data.class_map" if classes.mapped else "train"
        raise ValueError(f"{where}: not the classes of {known}: unknown {_some(unknown)}; add them there")
    return np.where(labels < 0, IGNORE, number[labels.clip(0)])


def _described(spec: str, setting: str) -> tuple[str, str | None, dict[str, Any], list[str]]:
    """Path, config, features and splits of a Hugging Face data set."""
    import datasets

    path, _, config = spec.removeprefix("hf:").partition(":")
    try:
        builder = datasets.load_dataset_builder(path, config or None)
        features, splits = builder.info.features, builder.info.splits
        if not (features and splits):  # nobody wrote them down: ask the files
            streamed = builder.as_streaming_dataset()
            features, splits = next(iter(streamed.values())).features, streamed
    except Exception as error:  # what the hub's client raises has no common class
        raise ValueError(f"{setting}={spec!r} can't be read: {error}") from error
    return path, config or None, features or {}, list(splits)


def _image_column(features: dict[str, Any], form: ImageFormat, spec: str) -> str:
    import datasets

    given = form.image_column
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if given in features or (given is None and found):
        return given or found[0]
    problem = f"data.image_column={given!r} is no column" if given else "set data.image_column; none is an Image"
    raise ValueError(f"data.source={spec!r}: needs a column of images; {problem}, but there are {_kinds(features)}")


def _kinds(features: dict[str, Any]) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())


class _Rows(Images):
    """Images of a Hugging Face data set, without labels."""

    def __init__(self, dataset: Any, image: str, where: str) -> None:
        import datasets

        self.image, self.where = image, where
        self.labels = np.full(len(dataset), IGNORE)
        self.dataset = dataset.select_columns(image).cast_column(image, datasets.Image(decode=False))

    def name(self, index: int) -> str:
        stored = self.dataset[int(index)][self.image] or {}
        path = stored.get("path")  # a name, or where the file was when the data set was made
        return f"{self.where}/{Path(path).name if path else index}"

    def data(self, index: int) -> bytes:
        stored = self.dataset[int(index)][self.image]
        if stored is None:
            raise ValueError("there is none in this row")
        return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()


def open_source(spec: str, form: ImageFormat = ImageFormat()) -> Source:
    """The source that `data.source` names: `digits`, `hf:...`, or a folder."""
    if spec == "digits":
        if form != ImageFormat():
            raise ValueError("data.source=digits: has a validation split and no columns; leave out what names them")
        return Digits()
    return HuggingFace(spec, form) if spec.startswith("hf:") else Folder(spec, form)


def open_unlabelled(spec: str, form: ImageFormat) -> Images:
    """The images that `data.predict_source` names: a folder, a file, a glob, or `hf:PATH[:CONFIG][@SPLIT]`."""
    where = f"data.predict_source={spec!r}"
    if spec.startswith("hf:"):
        import datasets

        spec, _, split = spec.partition("@")
        path, config, features, splits = _described(spec, "data.predict_source")
        if (split or len(splits) != 1) and split not in splits:
            raise ValueError(f"{where}: say which split, hf:PATH[:CONFIG]@SPLIT; it has {', '.join(splits)}")
        split = split or splits[0]
        rows = datasets.load_dataset(path, config, split=split)
        return _Rows(rows, _image_column(features, form, spec), f"{path}/{split}")
    if Path(spec).exists():
        return FileImages(Path(spec))
    found = sorted(name for name in glob.glob(spec, recursive=True) if os.path.isfile(name))
    if not found:
        raise ValueError(f"{where}: no such file or folder, and no pattern of files (in {Path.cwd()})")
    images = FileImages(Path(), [name for name in found if name.lower().endswith(ENDINGS)])
    endings = (os.path.splitext(name)[1].lower() for name in found if not name.lower().endswith(ENDINGS))
    images.left_out = Counter(ending or "without an ending" for ending in endings)
    return images
