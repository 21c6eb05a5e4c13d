"""Pixels of every depth become 8 bits by their range, or are refused; what is in a folder is counted, links too."""

import io
import logging
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from datamodules.image_files import FileImages, UnreadableImage
from datamodules.image_sources import open_source
from datamodules.images import ImageDataModule

GREYS = np.array([[0, 1, 128, 254, 255]], dtype=np.uint8)
DEEP = GREYS.astype(np.uint16) << 8 | 0x7F  # the same greys, with 8 bits more


def png(pixels, color_type):
    """A PNG of 16 bits a channel, which Pillow writes in grey only."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


def tiff(pixels, bits=16, kind=1, white_is_zero=False, order="<"):
    """A TIFF of one row; kind: unsigned, signed, float."""
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes() if bits != 12 else pixels.tobytes()
    width = len(data) * 8 // bits
    numbers = {256: width, 257: 1, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1, 278: 1}
    numbers |= {279: len(data), 339: kind}
    data += b"\0" * (len(data) % 2)
    tags = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, number) for tag, number in numbers.items())
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(numbers)) + tags + bytes(4)


def three(pixels):
    return np.stack([pixels] * 3, axis=-1)


def pnm(kind, pixels, most):
    return f"{kind} {pixels.shape[1]} 1 {most} ".encode() + pixels.astype(">u2").tobytes()


def saved(name, pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, name)
    return file.getvalue()


DEEP_IMAGES = {
    "grey.png": png(DEEP, 0),
    "color.png": png(three(DEEP), 2),
    "alpha.png": png(np.concatenate((three(DEEP), three(DEEP)[..., :1]), axis=-1), 6),
    "grey.tif": tiff(DEEP),
    "big-endian.tif": tiff(DEEP, order=">"),
    "negative.tif": tiff(65535 - DEEP, white_is_zero=True),
    "12-bits.tif": tiff(np.frombuffer(bytes([0x00, 0xF0, 0x1F, 0x80, 0xFF, 0xE0, 0xFF, 0xF0]), np.uint8), bits=12),
    "grey.pgm": pnm("P5", DEEP, 65535),
    "color.ppm": pnm("P6", three(DEEP), 65535),
}


@pytest.mark.parametrize("name", DEEP_IMAGES)
def test_more_than_8_bits_are_scaled_by_their_range(tmp_path, name):
    (tmp_path / name).write_bytes(DEEP_IMAGES[name])
    for mode in ("RGB", "L"):
        image = FileImages(tmp_path / name).read(0, mode)
        assert image.mode == mode
        pixels = np.asarray(image)[..., 0] if mode == "RGB" else np.asarray(image)
        assert pixels[0].tolist() == GREYS[0].tolist()


def test_a_deep_jpeg_2000(tmp_path):
    pixels = np.repeat(np.repeat(DEEP, 16, axis=0), 16, axis=1)
    (tmp_path / "a.jp2").write_bytes(saved("JPEG2000", pixels))
    assert (np.asarray(FileImages(tmp_path).read(0))[..., 0] == pixels >> 8).all()


WITHOUT_RANGE = {
    "int32": tiff(DEEP.astype(np.int32), 32, 2),
    "uint32": tiff(DEEP.astype(np.uint32), 32),
    "float32": tiff(DEEP.astype(np.float32), 32, 3),
    "int16": tiff(DEEP.astype(np.int16), 16, 2),
    "int8": tiff(GREYS.astype(np.int8), 8, 2),
    "lab": saved("TIFF", np.zeros((1, 1, 3), np.uint8)).replace(
        struct.pack("<HHIHH", 262, 3, 1, 2, 0), struct.pack("<HHIHH", 262, 3, 1, 8, 0)
    ),
}


@pytest.mark.parametrize("name", WITHOUT_RANGE)
def test_pixels_without_a_range_are_refused(tmp_path, name):
    path = tmp_path / f"{name}.tif"
    path.write_bytes(WITHOUT_RANGE[name])
    with pytest.raises(UnreadableImage, match=rf"{path}: .*range of its pixels is not known .* store it with 8 or 16"):
        FileImages(path).read(0)


def test_an_image_that_is_too_large_says_what_to_do(tmp_path, monkeypatch):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UnreadableImage, match=r"a\.png: .*too large: .*81 pixels.* Store it smaller"):
        FileImages(tmp_path).read(0)


def test_no_image_is_run_as_a_program(tmp_path):
    """Pillow gives an EPS, whatever its name is, to Ghostscript."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", "EPS")
    with pytest.raises(UnreadableImage, match=r"a\.png: can't be read as an image: of no known format"):
        FileImages(tmp_path).read(0)


@pytest.mark.parametrize("rarer", [".jfif JPEG", ".avif AVIF", ".jp2 JPEG2000", ".ICO ICO"])
def test_rarer_formats_are_read(tmp_path, rarer):
    ending, kind = rarer.split()
    Image.new("RGB", (16, 16), (10, 200, 30)).save(tmp_path / f"a{ending}", kind)
    assert np.abs(np.asarray(FileImages(tmp_path).read(0)).astype(int) - (10, 200, 30)).max() <= 2


def test_the_camera_was_held_upright(tmp_path):
    """EXIF's orientation is passed over, as in timm and torchvision (docs/vision.md)."""
    image = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert FileImages(tmp_path).read(0).size == (8, 4)


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, two images each in train/, one in val/."""
    for name in ("train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "train/dog/1.png"):
        write_image(tmp_path / "pets" / name)
    for name in ("val/cat/0.png", "val/dog/0.png"):
        write_image(tmp_path / "pets" / name)
    return tmp_path / "pets"


def test_what_is_left_out_is_counted_and_named(folder, caplog):
    for name in ("cat/0.heic", "cat/notes.txt", "dog/more.txt", "dog/LICENSE", "dog/.DS_Store"):
        (folder / "train" / name).write_text("no image")
    write_image(folder / "train/stray.png")
    (folder / "train/cat/again").symlink_to(folder / "train/cat")
    images = open_source(str(folder)).images("train")
    assert dict(images.left_out) == {
        "image in no class folder": 1,
        "link to a folder that it lies in": 1,
        ".txt": 2,
        ".heic": 1,
        "without an ending": 1,
    }
    assert len(images) == 4  # each once, in spite of the circle
    with caplog.at_level(logging.INFO):
        ImageDataModule(str(folder)).images("train")
        ImageDataModule(str(folder)).images("val")
    (line,) = (record.getMessage() for record in caplog.records if "left out" in record.getMessage())
    assert line.startswith("the train split: 4 images; left out: 2 .txt, 1 ")


def break_links(folder):
    (folder / "train/cat/2.png").symlink_to("nowhere.png")
    (folder / "train/cat/3.png").symlink_to("3.png")


@pytest.mark.filterwarnings("ignore:.*training takes the next image")
def test_links_that_lead_nowhere_are_images_that_can_not_be_read(folder):
    break_links(folder)
    with pytest.raises(ValueError, match=r"train split: 2 .* empty or links that lead nowhere, the first .*2\.png"):
        ImageDataModule(str(folder)).setup("fit")
    data = ImageDataModule(str(folder), image_size=8, batch_size=6, num_workers=0, skip_unreadable=True)
    data.setup("fit")
    images, _ = next(iter(data.train_dataloader()))
    assert (len(images), data.unreadable) == (6, 2)


def test_a_class_folder_that_is_a_link_to_nowhere_is_no_missing_class(folder):
    os.symlink("gone", folder / "train/cow")
    with pytest.raises(ValueError, match="train/cow: a link that leads nowhere; mend or remove it"):
        open_source(str(folder))
