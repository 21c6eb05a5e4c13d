"""Weights & Biases and MLflow from YAML, offline: what was logged is in files in the run's folder, in one run there."""

import csv
import json
import sqlite3
import struct

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger

from lit_modules.cli import main
from lit_modules.runs.trackers import ResumableMLFlowLogger, in_folder
from tests.integration.tiny import TINY_VISION, write_config


def logged(run_dir):
    """Steps and training losses in the run's own log, which is kept beside any other logger's."""
    with (run_dir / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row["train/loss"]]


def history(path):
    """The rows in a .wandb file: after a header of 7 bytes, LevelDB's log of protocol buffers in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, payload, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            record = Record.FromString(payload)
            payload = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_weights_and_biases(corpus, tmp_path, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb", reason="needs the package wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    init = {"offline": True, "project": "tokenformer"}
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": init}
    callbacks = [{"class_path": name} for name in ("SampleText", "CompressionBaseline", "LossCurve", "EMA")]
    config = write_config(tmp_path, corpus, trainer={"max_steps": 4, "logger": logger, "callbacks": callbacks})
    args = ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run")]
    with caplog.at_level("INFO"):
        main([*args, "--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--model.optim.warmup_steps=1"])
    assert "tokenformer predict --config" in caplog.text
    assert "tensorboard" not in caplog.text  # is not what this run logs to
    wandb.finish()
    main([*args, "--ckpt_path=last"])
    wandb.finish()
    wandb.teardown()  # at the end of a process it does so by itself: waits until all is written

    paths = sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    assert len(paths) == 2
    assert len({path.stem for path in paths}) == 1  # run-ID, of the process before and of this one
    found = [row for path in paths for row in history(path)]
    losses = [(row["trainer/global_step"], row["train/loss"]) for row in found if "train/loss" in row]
    assert [step for step, _ in losses] == [1, 3]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in logged(tmp_path / "run")])
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["trainer"]["logger"]["init_args"]["id"] is None
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.csv", "loss.png", "sample.txt"} <= names
    assert not any("tfevents" in name for name in names)


def test_mlflow(tmp_path, recwarn):
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    logger = {"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": {"experiment_name": "digits"}}
    config = json.loads(json.dumps(TINY_VISION))
    config["data"]["init_args"] |= {"source": "digits"}
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 2, "logger": logger}
    config["trainer"]["callbacks"] = [{"class_path": "LossCurve"}]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    args = [
        "fit",
        "--config",
        str(tmp_path / "tiny.yaml"),
        "--run_dir",
        str(tmp_path / "run"),
        "--model.optim.warmup_steps=0",
    ]
    main([*args, "--trainer.max_steps=1", "--trainer.limit_val_batches=0"])
    main([*args, "--ckpt_path=last", "--model.optim.lr=0.002"])
    assert "MLflow lets nobody change the parameters of a run: it keeps its optim/lr" in [
        str(w.message) for w in recwarn
    ]

    with sqlite3.connect(tmp_path / "run/mlflow.db") as store:
        assert len(store.execute("select * from runs").fetchall()) == 1
        losses = store.execute("select step, value from metrics where key = 'train/loss' order by step").fetchall()
        hyperparameters = dict(store.execute("select key, value from params").fetchall())
    assert [step for step, _ in losses] == [0, 1]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in logged(tmp_path / "run")])
    assert hyperparameters["config/depth"] == "2"
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.csv", "loss.png", "batch.png", "mistakes.png"} <= names

    (tmp_path / "run/trackers.json").write_text('{"MLflow": "lost"}')
    with pytest.raises(ValueError, match=r"MLflow, run lost: Run with id=lost not found.*trackers.json"):
        main([*args, "--ckpt_path=last", "--trainer.max_steps=3"])


def test_a_tracker_is_given_the_folder_of_the_run_and_its_id(tmp_path):
    """But what the user has set stays; without the packages of the trackers."""
    wandb = {"save_dir": ".", "dir": None, "version": None, "id": None}
    mlflow = {"tracking_uri": None, "save_dir": "./mlruns", "artifact_location": None, "run_id": None}
    ours = {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "artifact_location": f"{tmp_path}/mlruns"}
    for ids in ({}, {"Weights & Biases": "w", "MLflow": "m"}):
        (tmp_path / "trackers.json").write_text(json.dumps(ids))
        kind, arguments = in_folder(WandbLogger, wandb, tmp_path)
        assert kind is WandbLogger
        assert arguments == wandb | {"save_dir": str(tmp_path), "id": ids.get("Weights & Biases")}
        kind, arguments = in_folder(MLFlowLogger, mlflow, tmp_path)
        assert kind is ResumableMLFlowLogger
        assert arguments == mlflow | ours | {"run_id": ids.get("MLflow")}

    for given in ({"save_dir": "mine", "id": "mine"}, {"save_dir": "mine", "version": "mine"}):
        assert in_folder(WandbLogger, wandb | given, tmp_path)[1] == wandb | given
    assert in_folder(WandbLogger, wandb | {"dir": "mine"}, tmp_path)[1]["save_dir"] == "mine"
    for given in ({"tracking_uri": "http://there"}, {"save_dir": "mine"}):
        assert in_folder(MLFlowLogger, mlflow | given, tmp_path)[1] == mlflow | given | {"run_id": "m"}
    assert in_folder(CSVLogger, {"save_dir": "."}, tmp_path) == (CSVLogger, {"save_dir": "."})

    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(ValueError, match=r"trackers.json: no JSON .* delete it"):
        in_folder(WandbLogger, wandb, tmp_path)
