"""Images of folders, of Hugging Face data sets and of scikit-learn: which, in what order, and what is refused."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from datamodules.image_files import FileImages, UnreadableImage
from datamodules.image_sources import open_source


def write_image(path, color=(10, 20, 30), size=(8, 8), mode="RGB", **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path, **settings)


@pytest.fixture
def folder(tmp_path):
    """Two classes, two images each in train/, one in val/."""
    for split, count in (("train", 2), ("val", 1)):
        for name in ("cat", "dog"):
            for i in range(count):
                write_image(tmp_path / "pets" / split / name / f"{i}.png")
    return tmp_path / "pets"


def test_a_folder_is_listed_in_the_order_of_names(folder):
    write_image(folder / "train/cat/10.JPEG")
    write_image(folder / "train/cat/images/deep.png")
    write_image(folder / "train/dog/häßlich.png")
    for other in ("train/cat/boxes.txt", "train/.DS_Store", "train/cat/._0.png"):
        (folder / other).write_text("no image")
    (folder / "train/.cache").mkdir()
    source = open_source(str(folder))
    assert source.classes.names == ["cat", "dog"]
    images = source.images("train")
    names = [str(folder / "train" / name) for name in ("cat/0.png", "cat/1.png", "cat/10.JPEG", "cat/images/deep.png")]
    names += [str(folder / "train" / name) for name in ("dog/0.png", "dog/1.png", "dog/häßlich.png")]
    assert [images.name(i) for i in range(len(images))] == names
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    copy = pickle.loads(pickle.dumps(images))
    assert [copy.name(i) for i in range(len(copy))] == names
    assert all(images.read(i).mode == "RGB" for i in range(len(images)))


@pytest.mark.parametrize("val", ["validation", "valid"])
def test_the_validation_folder_has_several_names(folder, val):
    (folder / "val").rename(folder / val)
    assert open_source(str(folder)).images("val").name(0) == str(folder / val / "cat" / "0.png")


def test_without_labels_in_test_the_validation_images_are_tested(folder):
    assert open_source(str(folder)).images("test").name(1) == str(folder / "val/dog/0.png")
    write_image(folder / "test/0.png")
    assert open_source(str(folder)).images("test").name(1) == str(folder / "val/dog/0.png")
    for name in ("cat", "dog"):
        write_image(folder / "test" / name / "0.png")
    assert open_source(str(folder)).images("test").name(1) == str(folder / "test/dog/0.png")


def test_a_million_names_are_light(tmp_path):
    """One string of bytes for all of them."""
    for i in range(300):
        (tmp_path / f"n01440764_{i:05}.JPEG").write_bytes(b"x")
    assert len(pickle.dumps(FileImages(tmp_path))) < 300 * (21 + 8 + 8) + 1000


def flatten(folder):
    for path in list((folder / "val").glob("*/*")):
        path.rename(folder / "val" / f"{path.parent.name}-{path.name}")
    for path in (folder / "val").iterdir():
        if path.is_dir():
            path.rmdir()


def rename_class(folder):
    (folder / "val/cat").rename(folder / "val/cow")


def add_class(folder):
    write_image(folder / "val/cow/0.png")


def empty_class(folder):
    (folder / "train/cat/0.png").unlink()
    (folder / "train/cat/1.png").unlink()


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (shutil.rmtree, "pets': no such folder .* give digits, hf:NAME, or a folder with train/ and val/"),
        (
            lambda folder: shutil.rmtree(folder / "train"),
            "has no folder train/, but val; put the images into train/CLA",
        ),
        (lambda folder: shutil.rmtree(folder / "val"), "has no folder val/, but train; "),
        (flatten, r"pets/val: 2 files and no class folders; move each image .* while read .*val_annotations.*devkit"),
        (rename_class, r"val: not the classes of .*train: missing 1 \(cat\), unknown 1 \(cow\); name the folders as"),
        (
            lambda folder: shutil.rmtree(folder / "val/cat"),
            r"val: .*missing 1 \(cat\), unknown none; add images of them; ",
        ),
        (add_class, r"val: .*missing none, unknown 1 \(cow\); remove them, or add images of them to train/"),
        (empty_class, r"train: no images in class folders: 1 \(cat\); fill them"),
    ],
)
def test_a_folder_that_is_not_as_it_should_be_is_refused(folder, corrupt, message):
    corrupt(folder)

    def read_all():
        source = open_source(str(folder))
        return source.images("train"), source.images("val")

    with pytest.raises(ValueError, match=message):
        read_all()


def test_the_line_that_sorts_images_by_class_works(folder):
    """The shell loop of the error message."""
    import subprocess

    flatten(folder)
    with pytest.raises(ValueError, match="no class folders") as caught:
        open_source(str(folder)).images("val")
    loop = str(caught.value).partition("train/: ")[2].partition(", where")[0]
    (folder / "val/LIST").write_text("cat-0.png\tcat\t0 0 8 8\ndog-0.png\tdog\t0 0 8 8\n")
    subprocess.run(["bash", "-c", loop], cwd=folder / "val", check=True)
    assert open_source(str(folder)).images("val").labels.tolist() == [0, 1]


def test_files_without_a_byte_are_found(folder):
    (folder / "train/dog/1.png").write_bytes(b"")
    assert open_source(str(folder)).images("train").empty == [str(folder / "train/dog/1.png")]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    path = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    write_image(path, color=(255, 255, 255), mode=mode)
    with Image.open(path) as stored:
        assert stored.mode == mode
    image = FileImages(path).read(0)
    assert image.mode == "RGB"
    assert np.asarray(image).min() == 255


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.7])
def test_a_broken_image_names_its_file(tmp_path, kept):
    path = tmp_path / "broken.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UnreadableImage, match=r"broken\.jpg: can't be read as an image"):
        FileImages(path).read(0)


def test_digits():
    source = open_source("digits")
    train, val = source.images("train"), source.images("val")
    assert (len(train), len(val), source.classes.names) == (1437, 360, list("0123456789"))
    assert {train.name(i) for i in range(1437)} | {val.name(i) for i in range(360)} == {
        f"digits/{i}" for i in range(1797)
    }
    from sklearn.datasets import load_digits

    digits = load_digits()
    assert val.labels.tolist() == digits.target[::5].tolist()
    pixels = np.asarray(val.read(7))
    assert pixels.shape == (8, 8, 3)
    assert (pixels[..., 1] == (digits.images[35] * 255 / 16).round()).all()


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Writes a split of a Hugging Face data set of one-coloured images."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()

    def write(split, labels, image="img", label="fine_label"):
        columns = {image: [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(len(labels))], label: labels}
        features = {image: datasets.Image(), label: datasets.ClassLabel(names=["cat", "dog", "cow"])}
        (tmp_path / "pets").mkdir(exist_ok=True)
        rows = datasets.Dataset.from_dict(columns, datasets.Features(features))
        rows.to_parquet(tmp_path / "pets" / f"{split}-00000-of-00001.parquet")
        return f"hf:{tmp_path / 'pets'}"

    return write


def test_a_hugging_face_data_set(parquet):
    spec = parquet("train", [0, 1, 2, 1])
    parquet("validation", [2, 0])
    parquet("test", [-1, -1])  # secret, as ImageNet's
    source = open_source(spec)
    source.prepare()
    assert source.classes.names == ["cat", "dog", "cow"]
    train = source.images("train")
    assert train.labels.tolist() == [0, 1, 2, 1]
    assert [np.asarray(train.read(i))[0, 0, 0] for i in range(4)] == [0, 1, 2, 3]
    assert train.name(3).endswith("pets/train/3")
    assert source.images("val").labels.tolist() == [2, 0]
    assert source.images("test").labels.tolist() == [2, 0]


def test_a_hugging_face_data_set_without_validation(parquet):
    parquet("train", [0, 1])
    with pytest.warns(UserWarning, match="no validation split, so the test split is used"):
        source = open_source(parquet("test", [2]))
    assert source.images("val").labels.tolist() == source.images("test").labels.tolist() == [2]


def test_a_hugging_face_data_set_that_is_no_good(parquet, tmp_path):
    with pytest.raises(ValueError, match="data.source='hf:.*nothing' can't be read"):
        open_source(f"hf:{tmp_path / 'nothing'}")
    spec = parquet("train", [0, 1])
    with pytest.raises(ValueError, match="needs the splits train and validation or test, but has train"):
        open_source(spec)


def test_a_hugging_face_data_set_without_labels(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))], "text": ["a cat"]})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"set data.label_column; .* there are image \(Image\), text \(Value\)"):
        open_source(f"hf:{tmp_path}")


def test_real_images(shared_data):
    cifar = open_source(str(shared_data / "images/cifar10"))
    assert (len(cifar.classes.names), len(cifar.images("train")), len(cifar.images("val"))) == (10, 5000, 1000)
    assert cifar.images("train").read(0).size == (32, 32)
    tiny = open_source(str(shared_data / "images/tiny-imagenet-20"))
    val = tiny.images("val")
    assert (len(tiny.classes.names), len(tiny.images("train")), len(val)) == (20, 4000, 1000)
    modes = []
    for i in range(0, len(val), 5):
        with Image.open(val.name(i)) as image:
            modes.append(image.mode)
        if modes[-1] == "L":
            assert val.read(i).mode == "RGB"
    assert "L" in modes
