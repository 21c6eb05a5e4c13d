"""A small TokenFormer-ViT, also grown, against its baseline and timm's ViT of equal size, on 5,000 real images.

    python -m benchmarks.vision_study                              # what is not in the results yet
    python -m benchmarks.vision_study --models tokenformer baseline    # some of them, to run several at a time

Every run is a `tokenformer fit --config configs/vision/cifar-10.yaml` with the options of `options`, which the results
name whole: same images, augmentation and epochs for all. Each model gets its own learning rate, the best of a grid in
shorter runs with seed 0. The grown one begins with half of the tokens, doubles them after half of the steps, and takes
the rate of the one that is not grown.

The images (CIFAR-10 re-encoded as JPEG: 500 of each class to train on, 100 to validate) are not part of this project;
results on them can't be compared with those on CIFAR-10.
"""

import argparse
import csv
import os
import shlex
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, machine
from lit_modules.cli import main as tokenformer

ROOT = Path(__file__).parents[1]
CONFIG = "configs/vision/cifar-10.yaml"
RATES = (5e-4, 1e-3, 2e-3)
STEPS_PER_EPOCH = 78  # of 64 images
EPOCHS = {"rate": 4, "final": 12}
SEEDS = (0, 1)
SIZE = {"depth": 4, "dim": 96, "num_heads": 3, "qkv_tokens": 72, "proj_tokens": 72, "ffn_tokens": 288}
HALF = {"qkv_tokens": 36, "proj_tokens": 36, "ffn_tokens": 144}
TIMM_ARGS = {"embed_dim": 96, "depth": 4, "num_heads": 3, "patch_size": 4, "global_pool": "avg", "class_token": False}
MODELS = ("tokenformer", "baseline", "timm", "grown")


def options(model: str, images: Path, rate: float, epochs: int, seed: int) -> list[str]:
    """What is given to `tokenformer fit` besides the config."""
    steps = epochs * STEPS_PER_EPOCH
    sizes: dict[str, Any] = SIZE | (HALF if model == "grown" else {})
    given: dict[str, Any] = {f"model.config.{name}": value for name, value in sizes.items()}
    given |= {"data.source": images, "data.batch_size": 64, "data.num_workers": 0, "model.optim.lr": rate}
    given |= {"model.optim.warmup_steps": steps // 20, "trainer.max_steps": steps, "seed_everything": seed}
    given |= {"trainer.val_check_interval": 2 * STEPS_PER_EPOCH, "checkpoint.every_n_train_steps": steps}
    given |= {"data.mixup": 0.0, "data.cutmix": 0.0, "data.rand_augment": "null"}  # too strong for so few epochs
    given |= {"data.seed": seed, "model.config.drop_path": 0.0, "trainer.accelerator": "cpu", "trainer.devices": 1}
    given |= {"trainer.strategy": "auto", "trainer.precision": "32-true", "model.compile": False}
    if model == "baseline":
        given["model.config.baseline"] = "parameters"
    if model == "timm":
        given["model.timm_model"] = "vit_tiny_patch16_224"
        given["model.timm_args"] = TIMM_ARGS
    words = [f"--{name}={value}" for name, value in given.items()]
    if model == "grown":
        stage = f"{{at_step: {steps // 2}, factor: 2.0}}"
        arguments = f"{{stages: [{stage}], init: zero_keys, schedule: continue}}"
        growth = f"{{class_path: GrowParameterTokens, init_args: {arguments}}}"
        words.append(f"--trainer.callbacks+={growth}")
    return words


def measured(table: Path) -> list[dict[str, str]]:
    """The rows that there are."""
    return list(csv.DictReader(table.open())) if table.exists() else []


def measure(phase: str, model: str, images: Path, rate: float, seed: int, table: Path) -> float:
    """Train, and append a row to the table, unless it is there; the accuracy after the last step, in per cent."""
    key = {"phase": phase, "model": model, "lr": f"{rate:g}", "seed": str(seed)}
    for row in measured(table):
        if key.items() <= row.items():
            return float(row["top1"])
    run_dir = Path("runs/vision-study") / "-".join(key.values())
    words = options(model, images, rate, EPOCHS[phase], seed)
    tokenformer(["fit", "--config", str(ROOT / CONFIG), *words, f"--run_dir={run_dir}"])
    lines = list(csv.DictReader((run_dir / "metrics.csv").open()))
    last = {name: value for line in lines for name, value in line.items() if value}  # of each column
    shown = shlex.join(["tokenformer", "fit", "--config", CONFIG, *words]).replace(f"{images}", "IMAGES")
    row = key | {"epochs": EPOCHS[phase], "top1": f"{100 * float(last['val/top1']):.2f}", "loss": last["val/loss"]}
    row |= {"train_loss": last["train/loss"], "train_flops": last["train/flops"], "seconds": last["train/seconds"]}
    row |= machine() | {"command": shown}
    new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    return float(row["top1"])


def main() -> None:
    """Measure what is asked for, then print all that is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    images = ROOT.parent / "shared" / "data" / "images" / "cifar10"
    parser.add_argument("--images", type=Path, default=Path(os.path.relpath(images)), help="train/CLASS/, val/CLASS/")
    given = parser.parse_args()
    table = RESULTS / "vision_study.csv"
    for model in given.models:
        tuned = "tokenformer" if model == "grown" else model
        grid = {rate: measure("rate", tuned, given.images, rate, 0, table) for rate in RATES}
        best = max(grid, key=grid.__getitem__)
        for seed in SEEDS:
            measure("final", model, given.images, best, seed, table)
    for row in measured(table):
        print(*(row[name] for name in ("phase", "model", "lr", "seed", "top1", "loss", "seconds")), sep="\t")


if __name__ == "__main__":
    main()
