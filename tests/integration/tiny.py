"""Tiny experiments, language and vision: their configs, and what a run of one has logged."""

import csv
import json

import yaml

TINY = {
    "model": {
        "class_path": "LanguageModule",
        "init_args": {
            "config": {"depth": 2, "dim": 32, "num_heads": 2, "qkv_tokens": 16, "proj_tokens": 16, "ffn_tokens": 32},
            "optim": {"lr": 1e-3, "warmup_steps": 2},
        },
    },
    "data": {"class_path": "TextDataModule", "init_args": {"seq_len": 32, "batch_size": 4}},
    "trainer": {
        "max_steps": 8,
        "log_every_n_steps": 2,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "gradient_clip_val": 1.0,
        "accelerator": "cpu",
        "enable_progress_bar": False,
    },
    "checkpoint": {"every_n_train_steps": 4},
}


def write_config(folder, corpus, **changes):
    config = json.loads(json.dumps(TINY))
    config["data"]["init_args"] |= {"source": str(corpus[0]), "cache_dir": str(folder.parent / "tokens")}
    for key, value in changes.items():
        config[key] |= value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def rows(run_dir, column):
    with (run_dir / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]


GROW_ONCE = {"class_path": "GrowParameterTokens", "init_args": {"stages": [{"at_step": 6, "factor": 2.0}]}}
TINY_VISION = {
    "model": {
        "class_path": "VisionModule",
        "init_args": {
            "config": {
                "image_size": 16,
                "patch_size": 8,
                "depth": 2,
                "dim": 32,
                "num_heads": 2,
                "qkv_tokens": 16,
                "proj_tokens": 16,
                "ffn_tokens": 32,
                "drop_path": 0.2,
            },
            "optim": {"lr": 1e-3, "warmup_steps": 1},
        },
    },
    "data": {"class_path": "ImageDataModule", "init_args": {"image_size": 16, "batch_size": 4, "num_workers": 0}},
    "trainer": {
        "max_steps": 8,
        "log_every_n_steps": 1,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "accelerator": "cpu",
        "devices": 1,
        "enable_progress_bar": False,
    },
    "checkpoint": {"every_n_train_steps": 1, "save_top_k": -1},
    "best": {"monitor": "val/top1", "mode": "max"},
}


def write_vision(folder, images, callbacks=(), **data):
    config = json.loads(json.dumps(TINY_VISION))
    config["data"]["init_args"] |= {"source": str(images)} | data
    config["trainer"]["callbacks"] = list(callbacks)
    path = folder / "images.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
