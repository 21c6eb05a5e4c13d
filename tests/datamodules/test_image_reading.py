"""Images that can not be read, in training and evaluation; images without labels, to predict."""

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image

from datamodules.images import ImageDataModule
from tests.datamodules.noise import broken, module, take


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
