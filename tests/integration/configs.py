"""What the tests of language and vision configs share."""

from pathlib import Path
from typing import Any

import torch
import yaml

from lit_modules.cli import main
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"


def configs(task: str) -> list[Path]:
    """All files of a task, language or vision."""
    return sorted((CONFIGS / task).glob("*.yaml"))


def given(path: Path) -> dict[str, Any]:
    """What the file says."""
    return yaml.safe_load(path.read_text())


def growth_of(path: Path) -> dict[str, Any]:
    """Arguments of its GrowParameterTokens, which comes first among its callbacks; empty without."""
    callbacks = given(path)["trainer"].get("callbacks", [])
    return callbacks[0]["init_args"] if callbacks and callbacks[0]["class_path"] == "GrowParameterTokens" else {}


def run_shrunken(path: Path, shrink: str, folder: Path) -> Path:
    """Train with some settings of a config changed; returns the run's folder.

    Where it grows, it does so with its own recipe, but doubles, at steps that come.
    """
    settings = yaml.safe_load(shrink)
    stages = len(growth_of(path).get("stages", []))
    steps = 3 * stages + 3 if stages else 2
    settings["trainer"]["max_steps"] = steps
    if stages:
        settings["trainer"]["callbacks"] = given(path)["trainer"]["callbacks"]
        sizes = {"factor": 2.0, "qkv": None, "proj": None, "ffn": None}
        early = [{"at_step": 3 * (i + 1)} | sizes for i in range(stages)]
        settings["trainer"]["callbacks"][0]["init_args"]["stages"] = early
    (folder / "shrink.yaml").write_text(yaml.safe_dump(settings))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: more would only wait for each other
    try:
        main(["fit", "--config", str(path), "--config", str(folder / "shrink.yaml"), "--run_dir", str(folder / "run")])
    finally:
        torch.set_num_threads(threads)
    assert (folder / "run" / "checkpoints" / f"step-{steps:08d}.ckpt").exists()
    assert (folder / "run" / "growth.csv").exists() == bool(stages)
    return folder / "run"
