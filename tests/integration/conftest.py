"""Shared by the tests of the command line."""

import pytest
import torch
from PIL import Image

from lit_modules.cli import main
from tests.integration.growing import fit, saving
from tests.integration.tiny import GROW_ONCE, write_vision


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of three classes, 30 images to train on and 23 to validate: dark, middling, bright."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, sizes in (("train", (10, 10, 10)), ("val", (8, 8, 7))):
        for label, (name, count) in enumerate(zip(("bright", "dark", "grey"), sizes, strict=True)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 100, (20, 24, 3), generator=generator)
                pixels = (noise + (150, 0, 75)[label]).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, images):
    """(config, run folder) of a run that has grown and learned."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_vision(folder, images, [GROW_ONCE, {"class_path": "LossCurve"}])
    length = ["--trainer.max_steps=40", "--trainer.val_check_interval=20"]
    main(fit(config, folder / "run", *length, *saving(every=3)))  # 3 and 40 are looked at
    return config, folder / "run"
