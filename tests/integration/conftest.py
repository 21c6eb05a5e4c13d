"""Shared by the tests of the command line."""

import shutil

import pytest
import torch
import yaml
from PIL import Image

from lit_modules.cli import main
from tests.integration.growing import fit, saving
from tests.integration.tiny import GROW_ONCE, write_config, write_vision


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


@pytest.fixture(scope="session")
def finished(tmp_path_factory, corpus):
    """(config, folder) of a run of 4 steps, saved after each, that others go on with."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_config(folder, corpus, trainer={"max_steps": 4, "log_every_n_steps": 1, "limit_val_batches": 0})
    config = yaml.safe_load(path.read_text()) | {"checkpoint": {"every_n_train_steps": 1, "save_top_k": -1}}
    config["model"]["init_args"]["optim"]["schedule"] = "constant"
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path), "--run_dir", str(folder / "run")])
    return path, folder / "run"


@pytest.fixture
def copied(finished, tmp_path):
    """The command line that goes on with a copy of it, and the copy."""
    config, run = finished
    shutil.copytree(run, tmp_path / "run")
    command = ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), "--ckpt_path", "last"]
    return [*command, "--trainer.max_steps=6"], tmp_path / "run"
