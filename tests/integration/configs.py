"""What the tests of language and vision configs share."""

import re
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_modules.cli import main
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"

Files = tuple[Path, ...]  # of an experiment, the later wins


def configs(folder: str) -> list[Path]:
    """All files of a folder."""
    return sorted((CONFIGS / folder).glob("*.yaml"))


def baselines() -> list[Files]:
    """Pairs of a config and an overlay that makes a baseline of it."""
    return pairs("baseline")


def pairs(folder: str) -> list[Files]:
    """Pairs of a config and an overlay of this folder, as the headers of the overlays have them."""
    command = re.compile(r"^#   tokenformer fit --config (\S+) --config (\S+)$", re.M)
    return [
        tuple(ROOT / name for name in pair) for path in configs(folder) for pair in command.findall(path.read_text())
    ]


def experiments(task: str) -> dict[str, Files]:
    """The experiments of language or vision by name: `wikitext-2`, and `wikitext-2+parameters` for its baseline."""
    overlaid = [pair for folder in ("baseline", task) for pair in pairs(folder) if pair[0].parent.name == task]
    overlays = {overlay for _, overlay in overlaid}
    found = [(path,) for path in configs(task) if path not in overlays] + overlaid
    return {"+".join(path.stem for path in files): files for files in found}


def given(*files: Path) -> dict[str, Any]:
    """What the files say together: dictionaries are merged, everything else is replaced."""
    return _merged({}, *(yaml.safe_load(path.read_text()) for path in files))


def _merged(first: Any, *others: Any) -> Any:
    for other in others:
        if isinstance(first, dict) and isinstance(other, dict):
            first = first | {key: _merged(first.get(key), value) for key, value in other.items()}
        else:
            first = other
    return first


def growth_of(*files: Path) -> dict[str, Any]:
    """Arguments of its GrowParameterTokens, which comes first among its callbacks; empty without."""
    callbacks = given(*files)["trainer"].get("callbacks", [])
    return callbacks[0]["init_args"] if callbacks and callbacks[0]["class_path"] == "GrowParameterTokens" else {}


def run_shrunken(files: Files, shrink: str, folder: Path) -> Path:
    """Train with some settings of an experiment changed; returns the run's folder.

    Where it grows, it does so with its own recipe, but doubles, at steps that come.
    """
    settings = yaml.safe_load(shrink)
    stages = len(growth_of(*files).get("stages", []))
    steps = 3 * stages + 3 if stages else 2
    settings["trainer"]["max_steps"] = steps
    if stages:
        settings["trainer"]["callbacks"] = given(*files)["trainer"]["callbacks"]
        early = [{"at_step": 3 * (i + 1), "factor": 2.0} for i in range(stages)]
        settings["trainer"]["callbacks"][0]["init_args"]["stages"] = early
    (folder / "shrink.yaml").write_text(yaml.safe_dump(settings))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: more would only wait for each other
    options = [option for path in (*files, folder / "shrink.yaml") for option in ("--config", str(path))]
    try:
        main(["fit", *options, "--run_dir", str(folder / "run")])
    finally:
        torch.set_num_threads(threads)
    assert (folder / "run" / "checkpoints" / f"step-{steps:08d}.ckpt").exists()
    assert (folder / "run" / "growth.csv").exists() == bool(stages)
    return folder / "run"
