"""Every file of configs/continual/, with the overlays that go after it, on small models and small data."""

import csv

import pytest
import yaml

from lit_modules.cli import main
from tests.integration.configs import configs, given, pairs

ALONE = [(path,) for path in configs("continual") if path.stem in ("language", "vision")]
SMALL = {"depth": 1, "dim": 32, "num_heads": 2, "qkv_tokens": 64, "proj_tokens": 64, "ffn_tokens": 128}
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "val_check_interval": 2,
    "limit_val_batches": 1,
    "logger": False,
}


def test_all_of_them_are_run():
    assert {files[-1] for files in (*ALONE, *pairs("continual"))} == set(configs("continual"))


@pytest.mark.parametrize("files", [*ALONE, *pairs("continual")], ids=lambda files: "+".join(f.stem for f in files))
def test_it_runs_on_a_small_model(files, corpus, tmp_path):
    asked = given(*files)
    phases = asked["data"]["init_args"]["phases"]
    trained = [phase["name"] for phase in phases if phase["steps"]]
    assert asked["trainer"]["max_steps"] == sum(phase["steps"] for phase in phases)
    for phase in phases:
        phase["steps"] = min(2, phase["steps"])
        settings = phase["data"]["init_args"]
        if phase["data"]["class_path"] == "TextDataModule":
            mixed = isinstance(settings["source"], dict)
            settings |= {"source": {str(corpus[0]): 1} if mixed else str(corpus[0]), "batch_size": 2, "seq_len": 16}
            settings |= {"cache_dir": str(tmp_path / "tokens"), "streaming": False}
        else:
            settings["batch_size"] = 2
    asked["trainer"] |= TRAINER | {"max_steps": 2 * len(trained)}
    model = asked["model"]["init_args"]
    widens = "net2net" in files[-1].stem
    model["config"] |= {"depth": 1} if widens else SMALL
    model["optim"]["warmup_steps"] = 1
    for callback in asked["trainer"]["callbacks"]:
        for stage in callback.get("init_args", {}).get("stages", ()):
            if "qkv" in stage:
                stage |= {"qkv": None, "proj": None, "ffn": None, "factor": 2.0}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(asked))
    main(["fit", "--config", str(tmp_path / "small.yaml"), "--run_dir", str(tmp_path / "run")])
    rows = list(csv.DictReader((tmp_path / "run/continual.csv").open()))
    assert [row["phase"] for row in rows] == ["start", *trained]
    assert all(rows[-1][f"{phase['name']}/loss"] for phase in phases)
    grows = "GrowParameterTokens" in str(asked["trainer"]["callbacks"])
    assert (tmp_path / "run/growth.csv").exists() == grows
