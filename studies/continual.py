"""What does a model forget that learns one thing after another? Runs of `tokenformer fit` in phases.

Three texts (Python's standard library, WikiText-2, web pages: 200 steps each, nats a byte), or two groups of digits
(0-4, then 5-9, one classifier for all ten: 200 steps each, per cent of the images named wrong). `loss` is the mean over
all phases at the end, `learned` that of each phase right after it, `forgotten` how much the earlier ones have risen
since. `matrix` in the results has a line for the start and each phase, with the losses of all phases after it.

method        before each later phase
new tokens    grows; what is older is frozen, so `learned` can be had back to the bit (`--segments of PHASE`)
all tokens    grows; all is trained
tokenformer   nothing: it has its last size from the start
transformer   nothing: the same of the Transformer twin
net2net       the channels of the Transformer are doubled, to the same number of channels, all is trained
lora          the Transformer, of half the parameters, gets updates of low rank, as many as tokens; the rest is frozen
joint         all data at once, by the TokenFormer at its last size: as if there were no phases

New image classes train the classifier too, whatever is frozen. Optimizers and schedules are those of configs/continual.
"""

import csv
import logging
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from lit_modules.cli import main
from lit_modules.modules.loading import load_model
from studies.runner import ROOT

STEPS = 200  # of a phase
# Real text that lies beside the project, or what the Hugging Face hub has of its kind.
TEXTS = ROOT.parent / "shared/data/text"
SOURCES = {
    "code": ("stdlib", "stdlib"),
    "wiki": (TEXTS / "wikitext-2/train.txt", "hf:Salesforce/wikitext:wikitext-2-raw-v1"),
    "web": (TEXTS / "openwebtext-sample/train.jsonl", "hf:Skylion007/openwebtext"),
}
TEXT_DATA = {"tokenizer": "bytes", "seq_len": 128, "batch_size": 16}
DIGITS = {"low": ["0", "1", "2", "3", "4"], "high": ["5", "6", "7", "8", "9"]}
IMAGE_DATA = {"source": "digits", "image_size": 8, "batch_size": 64, "crop": "none", "crop_pct": 1.0, "hflip": 0.0}
HALF = {"qkv_tokens": 64, "proj_tokens": 64, "ffn_tokens": 256}
FULL = {"qkv_tokens": 128, "proj_tokens": 128, "ffn_tokens": 512}


def run(task: str, method: str, lr: float, seed: int) -> dict[str, Any]:
    """Train through all phases; the figures of its row."""
    logging.disable(logging.WARNING)  # of what a run says of itself
    with TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        (Path(folder) / "study.yaml").write_text(yaml.safe_dump(experiment(task, method, seed)))
        base = ROOT / f"configs/continual/{'language' if task == 'texts' else 'vision'}.yaml"
        given = ["--config", str(base), "--config", f"{folder}/study.yaml", "--run_dir", f"{folder}/run"]
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            main(["fit", *given, f"--model.optim.lr={lr}", f"--seed_everything={seed}"])
        return figures(Path(folder) / "run", [*(SOURCES if task == "texts" else DIGITS)])


def experiment(task: str, method: str, seed: int) -> dict[str, Any]:
    """What a run has otherwise than the config of its task."""
    texts = task == "texts"
    names = [*(SOURCES if texts else DIGITS)]
    phases = [{"name": name, "steps": STEPS, "data": data(name, seed)} for name in names]
    if method == "joint":
        whole = data("code", seed) if texts else data("low", seed)
        changed: Any = {"source": {str(source_of(name)): 1 for name in names}} if texts else {"classes": None}
        whole = {**whole, "init_args": whole["init_args"] | changed}
        phases = [{"name": "joint", "steps": STEPS * len(names), "data": whole}]
        phases += [{"name": name, "steps": 0, "data": data(name, seed)} for name in names]
    later, train = names[1:], "new" if texts else ["new", "head"]
    size: dict[str, Any] = dict(FULL)
    stages: list[dict[str, Any]] = []
    if method in ("new tokens", "all tokens"):
        size = HALF
        for i, name in enumerate(later, 1):
            counts = {kind.removesuffix("_tokens"): n + n * i // len(later) for kind, n in HALF.items()}
            stages.append({"at_phase": name} | counts)
    elif method == "net2net":
        size = {"baseline": "width", "dim": 32, "num_heads": 4 // 2 ** len(later)}
        stages = [{"at_phase": name, "width": 2} for name in later]
    elif method == "lora":
        size = HALF | {"baseline": "parameters"}
        stages = [{"at_phase": name, "lora": 37 if texts else 47} for name in later]
    elif method == "transformer":
        size = FULL | {"baseline": "parameters"}
    growth = {"stages": stages, "schedule": "continue", "train": train if method in ("new tokens", "lora") else "all"}
    callbacks = [{"class_path": "GrowParameterTokens", "init_args": growth}] if stages else []
    return {
        "model": {"init_args": {"config": {"depth": 2} | size}},
        "data": {"class_path": "PhasedDataModule", "init_args": {"phases": phases}},
        "trainer": {
            "max_steps": STEPS * len(names),
            "callbacks": callbacks,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "logger": False,
            "val_check_interval": None,
        },
        "checkpoint": {"every_n_train_steps": STEPS * len(names), "save_top_k": 1},
        "best": {"save_top_k": 0},
    }


def source_of(name: str) -> Path | str:
    """Of a text."""
    here, elsewhere = SOURCES[name]
    return here if not isinstance(here, Path) or here.exists() else elsewhere


def data(name: str, seed: int) -> dict[str, Any]:
    """The data module of a phase."""
    if name in SOURCES:
        return {"class_path": "TextDataModule", "init_args": TEXT_DATA | {"source": str(source_of(name)), "seed": seed}}
    images = IMAGE_DATA | {"classes": DIGITS[name], "num_workers": 0, "seed": seed}
    return {"class_path": "ImageDataModule", "init_args": images}


def figures(run_dir: Path, names: list[str]) -> dict[str, Any]:
    """What is known of each phase at the end and right after it, of texts in nats, of images in per cent wrong."""
    rows = {row["phase"]: row for row in csv.DictReader((run_dir / "continual.csv").open())}

    def loss(phase: str, after: str) -> float:
        row = rows[after]
        return 100 - 100 * float(row[f"{phase}/top1"]) if f"{phase}/top1" in row else float(row[f"{phase}/loss"])

    *_, last = rows
    (checkpoint,) = (run_dir / "checkpoints").glob("*.ckpt")
    params = load_model(checkpoint).num_params()
    found: dict[str, Any] = {"params": params, "loss": mean(loss(name, last) for name in names)}
    if names[0] in rows:
        found["learned"] = mean(loss(name, name) for name in names)
        found["forgotten"] = mean(loss(name, last) - loss(name, name) for name in names[:-1])
    found["matrix"] = "; ".join(" ".join(f"{loss(name, after):.3f}" for name in names) for after in rows)
    return found
