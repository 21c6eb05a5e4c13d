"""Weights & Biases and MLflow from YAML, in their offline modes: what was logged is in their local files."""

import csv
import json
import sqlite3
import struct

import pytest
import yaml

from lit_modules.cli import main
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
    init = {"offline": True, "save_dir": str(tmp_path), "project": "tokenformer"}
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": init}
    callbacks = [{"class_path": name} for name in ("SampleText", "CompressionBaseline", "LossCurve", "EMA")]
    config = write_config(tmp_path, corpus, trainer={"max_steps": 4, "logger": logger, "callbacks": callbacks})
    with caplog.at_level("INFO"):
        main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run")])
    assert "tokenformer predict --config" in caplog.text
    assert "tensorboard" not in caplog.text  # is not what this run logs to
    wandb.teardown()  # at the end of a process it does so by itself: waits until all is written

    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    losses = [(row["trainer/global_step"], row["train/loss"]) for row in history(path) if "train/loss" in row]
    assert [step for step, _ in losses] == [1, 3]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in logged(tmp_path / "run")])
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.csv", "loss.png", "sample.txt"} <= names
    assert not any("tfevents" in name for name in names)


def test_mlflow(tmp_path):
    for package in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    init = {"experiment_name": "digits", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    logger = {"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": init}
    config = json.loads(json.dumps(TINY_VISION))
    config["data"]["init_args"] |= {"source": "digits"}
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 2, "logger": logger}
    config["trainer"]["callbacks"] = [{"class_path": "LossCurve"}]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "tiny.yaml"), "--run_dir", str(tmp_path / "run")])

    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        losses = store.execute("select step, value from metrics where key = 'train/loss' order by step").fetchall()
        hyperparameters = dict(store.execute("select key, value from params").fetchall())
    assert [step for step, _ in losses] == [0, 1]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in logged(tmp_path / "run")])
    assert hyperparameters["config/depth"] == "2"
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.csv", "loss.png", "batch.png", "mistakes.png"} <= names
