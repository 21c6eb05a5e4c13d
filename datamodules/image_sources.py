"""Where images come from: scikit-learn's digits, folders of class folders, Hugging Face datasets (image_hub.py).

A source knows its classes before any image is read, and opens each split as `Images`.
"""

import glob
import os
from collections import Counter
from pathlib import Path

import numpy as np

from datamodules import image_hub
from datamodules.image_classes import Classes, naturally
from datamodules.image_files import ENDINGS, FileImages, Images
from datamodules.image_splits import VAL_SPLITS, ImageFormat, Source, Splits, counted, has_validation, renumbered, some

SORT_BY_CLASS = (
    "move each image into a folder of its class, named as in train/: while read image class rest; do mkdir -p "
    "$class; mv $image $class/; done < LIST, where LIST has a line 'IMAGE CLASS' for each, such as tiny-imagenet's "
    "val_annotations.txt; for ImageNet make it from the devkit's ILSVRC2012_validation_ground_truth.txt and meta.mat"
)


class Digits:
    """Handwritten digits of 8x8 pixels that scikit-learn brings along. Every fifth is for validation."""

    def __init__(self) -> None:
        self.classes = Classes.of(str(digit) for digit in range(10))

    def prepare(self) -> None:
        """Nothing to do."""

    def images(self, split: str) -> Images:
        """Four fifths, or the rest."""
        images = _DigitImages(validation=split != "train")
        images.labels = renumbered(images.labels, list("0123456789"), self.classes, "digits")
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


class Folder(Splits):
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
            raise has_validation(form, root, f"{val[0]}/")
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
                f"{place}: no images in class folders: {some(empty)}; fill them, or remove these classes from every "
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
            f"{place}: not the classes of {known}: missing {some(missing)}, unknown {some(unknown)}; {remedy}"
        )

    def _folders(self, split: str) -> list[str]:
        folders = _subfolders(folder := self.root / self.splits[split])
        broken = [name for name in os.listdir(folder) if os.path.islink(folder / name) and not (folder / name).exists()]
        if any(not name.lower().endswith(ENDINGS) for name in broken):
            raise ValueError(f"{folder / broken[0]}: a link that leads nowhere; mend or remove it")
        if not folders:
            raise ValueError(f"{folder}: {len(os.listdir(folder))} files and no class folders; {SORT_BY_CLASS}")
        return folders


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted as timm sorts classes."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(
            (entry.name for entry in entries if os.path.isdir(entry) and not entry.name.startswith(".")), key=naturally
        )


def _but(images: Images) -> str:
    return f"; left out: {counted(images.left_out)}" if images.left_out else ""


def open_source(spec: str, form: ImageFormat | None = None) -> Source:
    """The source that `data.source` names: `digits`, `hf:...`, or a folder."""
    form = form or ImageFormat()
    if spec == "digits":
        if form != ImageFormat():
            raise ValueError("data.source=digits: has a validation split and no columns; leave out what names them")
        return Digits()
    return image_hub.HuggingFace(spec, form) if spec.startswith("hf:") else Folder(spec, form)


def open_unlabelled(spec: str, form: ImageFormat) -> Images:
    """The images that `data.predict_source` names: a folder, a file, a glob, or `hf:PATH[:CONFIG][@SPLIT]`."""
    where = f"data.predict_source={spec!r}"
    if spec.startswith("hf:"):
        return image_hub.unlabelled(spec, form)
    if Path(spec).exists():
        return FileImages(Path(spec))
    found = sorted(name for name in glob.glob(spec, recursive=True) if os.path.isfile(name))
    if not found:
        raise ValueError(f"{where}: no such file or folder, and no pattern of files (in {Path.cwd()})")
    images = FileImages(Path(), [name for name in found if name.lower().endswith(ENDINGS)])
    endings = (os.path.splitext(name)[1].lower() for name in found if not name.lower().endswith(ENDINGS))
    images.left_out = Counter(ending or "without an ending" for ending in endings)
    return images
