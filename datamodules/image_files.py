"""The images of one split: their list, their labels, and how a stored image becomes pixels of 8 bits."""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from datamodules.loader import IGNORE

ENDINGS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".ico"),
    *(".tif", ".tiff", ".ppm", ".pgm"),
)
# Pillow's names of these formats. It knows more, and lets Ghostscript run what is in an EPS.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "JPEG2000", "BMP", "DIB", "GIF", "ICO", "TIFF", "PPM")
# Modes of Pillow with 8 bits a channel, or a table of such colors.
EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF


class UnreadableImage(ValueError):
    """An image that can't be decoded; says which."""


class Images(ABC):
    """The images of one split.

    Attributes:
        labels: class of each image, (number of images); IGNORE where there is none.
        empty: names of files without a single byte, and of links that lead nowhere.
        left_out: how many files of the folder are none of its images, by what they are.
    """

    labels: NDArray[np.int64]
    empty: Sequence[str] = ()
    left_out: Mapping[str, int] = {}

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

    def read(self, index: int, mode: str = "RGB") -> Image.Image:
        """The image in RGB or in grey (L), whatever it is stored as.

        Raises:
            UnreadableImage: naming the image.
        """
        try:
            stored = Image.open(io.BytesIO(self.data(index)))
            if stored.format not in FORMATS:
                raise UnidentifiedImageError
            stored.load()
            image = in_8_bits(stored)
            return image if image.mode == mode else image.convert(mode)
        except Image.DecompressionBombError as error:
            problem = f"it is too large: {error} Store it smaller, at a few thousand pixels a side"
            raise UnreadableImage(f"{self.name(index)}: can't be read as an image: {problem}") from error
        except UnidentifiedImageError as error:
            raise UnreadableImage(f"{self.name(index)}: can't be read as an image: of no known format") from error
        except Exception as error:  # what Pillow raises for broken files has no common class
            raise UnreadableImage(f"{self.name(index)}: can't be read as an image: {error}") from error


def in_8_bits(image: Image.Image) -> Image.Image:
    """An image of 12 or 16 bits scaled by its range, by its upper 8 bits: 255 stands for white as 65535 did.

    (Pillow does so with colors; of grey it cuts off all above 255.)

    Raises:
        ValueError: for pixels whose range the format does not define: floats, signed numbers, 32 bits, LAB.
    """
    tags = getattr(image, "tag_v2", {})
    signed = any(kind != 1 for kind in np.atleast_1d(tags.get(SAMPLE_FORMAT, 1)))
    if image.mode in EIGHT_BITS and not signed:
        return image
    # A .pgm of more than 8 bits comes as numbers of 32 bits, from 0 to 65535.
    if signed or not (image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")):
        kind = f"{'signed or float, ' if signed else ''}mode {image.mode} of Pillow"
        raise ValueError(f"the range of its pixels is not known ({kind}): store it with 8 or 16 bits a channel")
    bits = np.atleast_1d(tags.get(BITS_PER_SAMPLE, 16))[0]
    pixels = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    white_is_zero = tags.get(PHOTOMETRIC) == 0  # which Pillow passes over here, not in images of 8 bits
    return Image.fromarray(255 - pixels if white_is_zero else pixels)


class Part(Images):
    """Some images of a split, (number of them) indices."""

    def __init__(self, whole: Images, chosen: NDArray[np.int64]) -> None:
        self.whole, self.chosen = whole, chosen
        self.labels, self.left_out = whole.labels[chosen], whole.left_out
        empty = set(whole.empty)
        self.empty = [name for i in chosen.tolist() if (name := whole.name(i)) in empty] if empty else []

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the whole split and of what is chosen."""
        return hashlib.blake2b(self.whole.fingerprint.encode() + self.chosen.tobytes(), digest_size=8).hexdigest()

    def name(self, index: int) -> str:
        """The whole split's."""
        return self.whole.name(self.chosen[index])

    def data(self, index: int) -> bytes:
        """The whole split's."""
        return self.whole.data(self.chosen[index])


def held_out(labels: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """Which images are held out: the same ones in every run, of each class as near to the fraction as can be."""
    places = np.arange(len(labels))
    order = np.lexsort((np.random.default_rng(0).permutation(len(labels)), labels))  # class by class, shuffled in each
    held = np.zeros(len(labels), dtype=bool)
    held[order] = np.floor((places + 1) * fraction) > np.floor(places * fraction)
    return held


class FileImages(Images):
    """Image files in the order of their names, which all lie in one string of bytes: a million Python objects would be
    copied into every worker.

    Args:
        root: a folder, or one file.
        places: folders in it, which are searched with all that is below them, and files. Default: all of the folder.
        labels: class of what is in each of the places. Default: the images have no labels.
    """  # noqa: D205

    def __init__(self, root: Path, places: Sequence[str] = ("",), labels: Sequence[int] | None = None) -> None:
        if root.is_file():
            root, places = root.parent, [root.name]
        with ThreadPoolExecutor(16) as pool:  # for file systems that answer slowly
            self.root, found = root, list(pool.map(partial(_scan, root), places))
        self.names = b"".join(names for names, _, _ in found)
        self.ends = np.flatnonzero(np.frombuffer(self.names, np.uint8) == 0)
        counts = [names.count(0) for names, _, _ in found]
        self.labels = np.repeat(np.asarray([IGNORE] * len(places) if labels is None else labels, np.int64), counts)
        self.empty = [str(self.root / name) for _, empty, _ in found for name in empty]
        self.left_out = sum((left_out for _, _, left_out in found), Counter())

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


class _Found(NamedTuple):
    names: bytes  # of images, from the root on, each with a 0 at its end
    empty: list[str]
    left_out: Counter[str]


def _scan(root: Path, start: str) -> _Found:
    """The images below a folder, or the one file that it is."""
    if start and not (root / start).is_dir():
        return _Found(_joined([start]), [start] if _is_empty(root / start) else [], Counter())
    names, empty, left_out, pending = [], [], Counter[str](), [start]
    while pending:
        place = pending.pop()
        with os.scandir(root / place) as entries:
            for entry in entries:
                name = f"{place}/{entry.name}" if place else entry.name
                if entry.name.startswith("."):
                    continue
                if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                    if entry.is_symlink() and _is_above(entry.path, root / place):
                        left_out["link to a folder that it lies in"] += 1
                    else:
                        pending.append(name)
                elif not name.lower().endswith(ENDINGS):
                    left_out[os.path.splitext(entry.name)[1].lower() or "without an ending"] += 1
                else:
                    names.append(name)
                    if _is_empty(Path(entry.path)):
                        empty.append(name)
    return _Found(_joined(sorted(names)), sorted(empty), left_out)


def _is_empty(path: Path) -> bool:
    """Whether it has no byte to read: an empty file, or a link to nothing or to itself."""
    try:
        return path.stat().st_size == 0
    except OSError:
        return True


def _is_above(link: str, place: Path) -> bool:
    target = Path(link).resolve()
    return target in (place.resolve(), *place.resolve().parents)


def _joined(names: Sequence[str]) -> bytes:
    return b"".join(os.fsencode(name) + b"\0" for name in names)  # the one byte that no name holds
