"""Images of Hugging Face datasets, of the hub or in a local folder."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.image_classes import Classes, naturally
from datamodules.image_files import Images
from datamodules.image_splits import VAL_SPLITS, ImageFormat, Splits, has_validation, renumbered
from datamodules.loader import IGNORE


class HuggingFace(Splits):
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
                raise has_validation(form, spec, f"the split {val[0]}")
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
        images.labels = renumbered(np.asarray(numbers, dtype=np.int64), names, self.classes, where)
        return images

    def _load(self, split: str) -> Any:
        import datasets

        return datasets.load_dataset(self.path, self.config, split=self.splits[split])


def _is_secret(label: Any) -> bool:
    """Whether it says that an image has no label: nothing, or the hub's -1."""
    return label is None or (isinstance(label, int) and label < 0)


def _described(spec: str, setting: str) -> tuple[str, str | None, dict[str, Any], list[str]]:
    """Path, config, features and splits of a Hugging Face data set."""
    import datasets

    path, _, config = spec.removeprefix("hf:").partition(":")
    if not path:
        raise ValueError(f"{setting}={spec!r}: names no data set: give hf:PATH[:CONFIG]")
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


def unlabelled(spec: str, form: ImageFormat) -> Images:
    """The images of `hf:PATH[:CONFIG][@SPLIT]`, without labels."""
    import datasets

    where = f"data.predict_source={spec!r}"
    spec, _, split = spec.partition("@")
    path, config, features, splits = _described(spec, "data.predict_source")
    if (split or len(splits) != 1) and split not in splits:
        raise ValueError(f"{where}: say which split, hf:PATH[:CONFIG]@SPLIT; it has {', '.join(splits)}")
    split = split or splits[0]
    rows = datasets.load_dataset(path, config, split=split)
    return _Rows(rows, _image_column(features, form, spec), f"{path}/{split}")
