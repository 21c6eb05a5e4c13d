"""A prepared data module on the small corpus; two folders of images."""

import numpy as np
import pytest
from PIL import Image

from datamodules.text import TextDataModule
from tests.conftest import write_images


def module(corpus, tmp_path, **changes):
    return TextDataModule(
        **{"source": str(corpus[0]), "seq_len": 16, "batch_size": 4, "cache_dir": str(tmp_path)} | changes
    )


@pytest.fixture
def data(corpus, tmp_path):
    data = module(corpus, tmp_path)
    data.prepare_data()
    data.setup("fit")
    return data


def documents_of(ids, tokenizer):
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)
    assert len(pieces[-1]) == 0  # every document ends in the end-of-text token
    return [tokenizer.decode(piece.tolist()) for piece in pieces[:-1]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """23 images of noise in 3 classes, no two of a size, as train/ and as val/."""
    draw = np.random.default_rng(0)
    noise = (draw.integers(0, 256, (20 + i, 43 - i, 3), dtype=np.uint8) for i in range(23))
    return write_images(tmp_path_factory.mktemp("noise"), map(Image.fromarray, noise))


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """12 images, each all in the color of its class."""
    colors = 4 * [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    return write_images(tmp_path_factory.mktemp("plain"), (Image.new("RGB", (16, 16), color) for color in colors))
