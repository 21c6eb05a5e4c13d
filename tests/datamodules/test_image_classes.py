"""Which classes there are, in what order, under what names; labels of every kind; images held out for validation."""

import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import timm.data
import torch
from PIL import Image
from timm.data import RealLabelsImagenet
from timm.data.readers.reader_image_folder import ReaderImageFolder

from datamodules.image_classes import naturally, read_class_map
from datamodules.image_sources import open_source
from datamodules.image_splits import ImageFormat
from datamodules.images import ImageDataModule
from tests.conftest import ROOT

NAMES = ["0", "1", "2", "10", "11", "a2", "A10", "a10b", "B", "c", "n01440764", "x-1.5", "x-1.25", "Ähre", "²"]


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def write(root, *names, count=1):
    for name in names:
        for i in range(count):
            write_image(root / name / f"{i}.png")
    return root


def labels_of(images):
    """Class numbers by class folder."""
    return {images.name(i).split("/")[-2]: int(images.labels[i]) for i in range(len(images))}


def test_classes_are_in_timms_order(tmp_path):
    names = NAMES[:-1]  # the last one is no number to anybody, but timm reads it as one and fails
    random.Random(0).shuffle(names)
    write(tmp_path, *(f"{split}/{name}" for split in ("train", "val") for name in names))
    source = open_source(str(tmp_path))
    theirs = ReaderImageFolder(str(tmp_path / "train")).class_to_idx
    assert source.classes.index == theirs
    for split in ("train", "val"):
        assert labels_of(source.images(split)) == theirs
    assert sorted(["²", "b", "A", "a"], key=naturally) == ["A", "a", "b", "²"]  # whatever order the folder has


def test_a_model_brings_the_order_of_its_classes(tmp_path):
    """In which the images are listed too: a run of an older version goes on with the same samples."""
    names = ["0", "1", "10", "2"]
    write(tmp_path, *(f"{split}/{name}" for split in ("train", "val") for name in names), count=2)
    data = ImageDataModule(str(tmp_path))
    new = data.order()
    assert labels_of(data.images("train")) == {"0": 0, "1": 1, "2": 2, "10": 3}
    data.set_class_order(names)
    assert data.class_names == names
    assert labels_of(data.images("train")) == labels_of(data.images("val")) == {"0": 0, "1": 1, "10": 2, "2": 3}
    assert data.images("train").labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert data.order() != new
    data.set_class_order(["0", "1", "2", "10"])
    assert data.order() == new


def test_a_class_map_evaluates_some_classes_under_other_names(tmp_path):
    """As of ImageNet-A (200 of 1,000 synsets) and ImageNet-V2 (numbers in place of synsets)."""
    classes = tmp_path / "classes.txt"
    classes.write_text("n01\tcat\t0\nn02\tdog\t1\nn03\tcow\t2\n")
    write(tmp_path / "some", "val/n03", "val/n01")
    write(tmp_path / "numbers", "val/0", "val/1", "val/2")
    write(tmp_path / "words", "train/cat", "train/dog", "train/cow", "val/cow")
    data = ImageDataModule(str(tmp_path / "some"), class_map=str(classes))
    assert (data.class_names, data.num_classes) == (["n01", "n02", "n03"], 3)
    assert labels_of(data.images("val")) == {"n01": 0, "n03": 2}
    assert data.some_classes("val") == [0, 2]
    data = ImageDataModule(str(tmp_path / "numbers"), class_map=str(classes))
    assert labels_of(data.images("val")) == {"0": 0, "1": 1, "2": 2}
    assert data.some_classes("val") is None
    data = ImageDataModule(str(tmp_path / "words"), class_map=str(classes))
    assert labels_of(data.images("train")) == {"cat": 0, "dog": 1, "cow": 2}
    assert data.some_classes("val") == [2]
    data.set_class_order(["n03", "n02", "n01"])
    assert labels_of(data.images("train")) == {"cat": 2, "dog": 1, "cow": 0}
    assert ImageDataModule(str(tmp_path / "words")).some_classes("train") is None  # a class map alone allows it


def test_a_class_map_that_does_not_fit_is_refused(tmp_path):
    classes = tmp_path / "classes.txt"
    write(tmp_path, "train/cat", "val/dog", "val/cat")
    with pytest.raises(ValueError, match=r"data.class_map='.*classes.txt': can't be read: .*No such file"):
        ImageDataModule(str(tmp_path), class_map=str(classes))
    for text, message in (
        ("cat\n\ndog", "line 2: it has no name"),
        ("cat\tdog\ndog", "line 2: 'dog' is on line 1 too"),
    ):
        classes.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_class_map(str(classes))
    classes.write_text("cat\ncow\n", encoding="utf-8-sig")
    data = ImageDataModule(str(tmp_path), class_map=str(classes))
    with pytest.raises(
        ValueError, match=r"val: not the classes of data.class_map: .* unknown 1 \(dog\); add their names"
    ):
        data.images("val")
    with pytest.raises(
        ValueError, match=r"train: .* missing 1 \(cow\), unknown none; a training needs images of every"
    ):
        data.images("train")


@pytest.mark.parametrize("flat", [False, True])
def test_validation_images_are_held_out(tmp_path, flat):
    """Of each class alike, the same in every run; whatever the seed of the order is."""
    root = tmp_path if flat else tmp_path / "train"
    write(root, "a", "b", count=10)
    write(root, "c", count=20)
    data = ImageDataModule(str(tmp_path), val_fraction=0.2)
    train, val = data.images("train"), data.images("val")
    assert np.bincount(val.labels).tolist() == [2, 2, 4]
    assert np.bincount(train.labels).tolist() == [8, 8, 16]
    names = [[images.name(i) for i in range(len(images))] for images in (train, val)]
    assert len({*names[0], *names[1]}) == 40
    assert labels_of(train) == labels_of(val) == {"a": 0, "b": 1, "c": 2}
    assert val.read(0).size == (8, 8)
    again = ImageDataModule(str(tmp_path), val_fraction=0.2, seed=3)
    assert [again.file_of("val", i) for i in range(8)] == names[1]
    assert [again.file_of("test", i) for i in range(8)] == names[1]
    assert again.order()["training images"] == data.order()["training images"]
    other = ImageDataModule(str(tmp_path), val_fraction=0.25)
    assert other.order()["training images"] != data.order()["training images"]
    (root / "a/0.png").write_bytes(b"")
    split = "train" if str(root / "a/0.png") in names[0] else "val"
    with pytest.raises(ValueError, match=f"the {split} split: 1 of its files are empty"):
        ImageDataModule(str(tmp_path), val_fraction=0.2).images(split)


def test_a_fraction_is_for_data_without_validation(tmp_path):
    write(tmp_path, "train/a", "train/b")
    with pytest.raises(ValueError, match=r"has no folder val/, but train; .*held out: data.val_fraction 0.1"):
        ImageDataModule(str(tmp_path))
    with pytest.raises(ValueError, match=r"data.val_fraction=0.1: leaves none of the 2 images for validation"):
        ImageDataModule(str(tmp_path), val_fraction=0.1).images("val")
    with pytest.raises(ValueError, match=r"data.val_fraction=1.5: must lie between 0 and 1"):
        ImageDataModule(str(tmp_path), val_fraction=1.5)
    write(tmp_path, "val/a", "val/b")
    with pytest.raises(ValueError, match=r"data.val_fraction=0.1: leave it out, data.source=.* has val/"):
        ImageDataModule(str(tmp_path), val_fraction=0.1)
    with pytest.raises(ValueError, match=r"data.label_column='x': leave it out, a folder has no columns"):
        ImageDataModule(str(tmp_path), label_column="x")
    with pytest.raises(ValueError, match="data.source=digits: .*leave out"):
        ImageDataModule("digits", val_fraction=0.1)


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Writes a split of a Hugging Face data set of one-coloured images."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()

    def write(split, labels, **others):
        images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(len(labels))]
        columns = {"picture": images, "label": labels} | others
        rows = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
        (tmp_path / "pets").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "pets" / f"{split}-00000-of-00001.parquet")
        return f"hf:{tmp_path / 'pets'}"

    return write


@pytest.mark.parametrize(
    ("train", "val", "names", "numbers"),
    [
        (["dog", "cat", None, "dog"], ["cat"], ["cat", "dog"], [1, 0, -100, 1]),
        ([10, 2, -1, 10], [2], ["2", "10"], [1, 0, -100, 1]),
    ],
)
def test_labels_are_strings_or_integers(parquet, train, val, names, numbers):
    parquet("validation", val)
    source = open_source(parquet("train", train))
    assert source.classes.names == names
    assert source.images("train").labels.tolist() == numbers
    assert source.images("val").labels.tolist() == [0]
    parquet("test", ["horse"] if isinstance(val[0], str) else [7])
    with pytest.raises(ValueError, match=r"pets/test: not the classes of train: unknown 1 \((horse|7)\)"):
        open_source(parquet("train", train)).images("test")
    with pytest.raises(ValueError, match="the train split: 1 of its images have no label"):
        ImageDataModule(parquet("train", train)).images("train")


def test_columns_by_name_and_a_part_for_validation(parquet):
    labels = ["cat"] * 6 + ["dog"] * 4
    spec = parquet("train", [0] * 10, race=labels, size=[0.5] * 10)
    data = ImageDataModule(spec, label_column="race", image_column="picture", val_fraction=0.5)
    assert data.class_names == ["cat", "dog"]
    assert np.bincount(data.images("val").labels).tolist() == [3, 2]
    pixels = {np.asarray(images.read(i))[0, 0, 0] for images in map(data.images, ("train", "val")) for i in range(5)}
    assert pixels == set(range(10))
    with pytest.raises(ValueError, match=r"data.label_column='size' is none, but there are picture \(Image\), .*race"):
        open_source(spec, ImageFormat(val_fraction=0.5, label_column="size"))
    with pytest.raises(ValueError, match=r"data.image_column='photo' is no column, but there are picture \(Image\)"):
        open_source(spec, ImageFormat(image_column="photo"))
    with pytest.raises(ValueError, match="a part of train can be held out: data.val_fraction 0.1"):
        open_source(spec)


def test_a_class_map_of_other_names_for_a_hugging_face_data_set(parquet, tmp_path):
    (tmp_path / "classes.txt").write_text("n01\tdog\nn02\tcow\nn03\tcat\n")
    parquet("train", ["cat", "dog", "cow"])
    data = ImageDataModule(parquet("validation", ["cat", "dog"]), class_map=str(tmp_path / "classes.txt"))
    assert data.images("val").labels.tolist() == [2, 0]
    assert data.some_classes("val") == [0, 2]


def test_real_labels_as_timm_counts_them(tmp_path, monkeypatch, capsys):
    """The program of docs/vision.md."""
    root = Path(timm.data.__file__).parent / "_info"
    synsets = (root / "imagenet_synsets.txt").read_text().split()
    (tmp_path / "models/mine").mkdir(parents=True)
    (tmp_path / "models/mine/class_map.txt").write_text("\n".join(synsets))
    names = [f"val/some/ILSVRC2012_val_{i + 1:08}.JPEG" for i in range(50_000)]
    meter = RealLabelsImagenet([Path(name).name for name in names], topk=(1,))
    labels = [(meter.real_labels[Path(name).name] or [7])[0] if i % 3 else 5 for i, name in enumerate(names)]
    meter.add_result(torch.nn.functional.one_hot(torch.tensor(labels), 1000))
    table = pa.table({"file": names, "label": [synsets[label] for label in labels]})
    pyarrow.parquet.write_table(table, tmp_path / "predictions.parquet")
    (program,) = re.findall(r"```python\n(import json.*?)```", (ROOT / "docs/vision.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert float(capsys.readouterr().out) == pytest.approx(meter.get_accuracy(1) / 100)


def to_predict(spec):
    images = ImageDataModule("digits", predict_source=spec).images("predict")
    assert (images.labels == -100).all()
    return [images.name(i) for i in range(len(images))]


def test_globs_and_data_sets_to_predict(parquet, tmp_path):
    for name in ("b.png", "a.PNG", "deep/c.png", "notes.txt"):
        write_image(tmp_path / "photos" / f"{name}.png")
        (tmp_path / "photos" / f"{name}.png").rename(tmp_path / "photos" / name)
    found = [str(tmp_path / "photos" / name) for name in ("a.PNG", "b.png", "deep/c.png")]
    assert to_predict(f"{tmp_path}/photos/**") == found
    assert to_predict(f"{tmp_path}/photos/*.png") == found[1:2]
    with pytest.raises(ValueError, match="no images in it; left out: 1 .txt"):
        to_predict(f"{tmp_path}/photos/*.txt")
    with pytest.raises(
        ValueError, match="data.predict_source='.*gif': no such file or folder, and no pattern of files"
    ):
        to_predict(f"{tmp_path}/photos/*.gif")
    spec = parquet("train", [0, 1])
    assert len(to_predict(spec)) == 2
    parquet("test", [5, 6, 7])
    with pytest.raises(ValueError, match=r"say which split, hf:PATH\[:CONFIG\]@SPLIT; it has train, test"):
        to_predict(spec)
    assert len(to_predict(f"{spec}@test")) == 3
