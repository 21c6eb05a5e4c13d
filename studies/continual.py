"""What does a model forget that learns one thing after another? Runs of `tokenformer fit` in phases of 200 steps.

task        phases, and what is counted
texts       Python's standard library, WikiText-2, web pages; nats a byte
digits      0-4, then 5-9, one classifier for all ten; per cent of the images named wrong
new text    web pages, then WikiText-2 by a model of four times the parameters; nats a byte of WikiText-2 alone (the
            paper's figure 6, its first phase without what came before)

`loss` is the mean over all phases at the end, `learned` that of each phase right after it, `forgotten` how much the
earlier ones have risen since. `matrix` in the results has a line for the start and each phase, with the losses of all
phases after it.

method        before each later phase
new tokens    grows (anchored); what is older is frozen: the model after each phase of texts is there to the bit
              (`--segments first K`)
all tokens    grows (anchored); all is trained
zero keys     the same from keys of zero, as in the paper
tokenformer   nothing: it has its last size from the start
transformer   nothing: the same of the Transformer twin
net2net       the channels of the Transformer are doubled, all is trained; it begins and ends with fewer parameters than
              the others (new text: with as many)
lora          the Transformer, of as many parameters as the TokenFormer begins with, gets updates of low rank, as many
              parameters as tokens; the rest is frozen
joint         all data at once, by the TokenFormer at its last size: as if there were no phases

New image classes train the classifier too, whatever is frozen. Optimizers and schedules are those of configs/continual.
"""

import csv
import logging
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from lit_modules.cli import main
from lit_modules.modules.loading import load_model
from studies.runner import ROOT
from studies.training import SCALE, missing, scaled, source, widened

STEPS = scaled(200)  # of a phase
TEXTS = ["code", "wiki", "web"]
TEXT_DATA = {"tokenizer": "bytes", "seq_len": 128, "batch_size": 16}
DIGITS = {"low": ["0", "1", "2", "3", "4"], "high": ["5", "6", "7", "8", "9"]}
IMAGE_DATA = {"source": "digits", "image_size": 8, "batch_size": 64, "crop": "none", "crop_pct": 1.0, "hflip": 0.0}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Phases, and the models that go through them.

    Attributes:
        config: of configs/continual, to begin with.
        phases: their names.
        first: parameter tokens to begin with: query, key and value, projection, feed-forward.
        last: at the end.
        dim: channels, in four heads.
        narrow: channels and heads with which Net2Net begins.
        rank: of the updates of LoRA.
    """

    config: str
    phases: list[str]
    first: tuple[int, int, int] = (64, 64, 256)
    last: tuple[int, int, int] = (128, 128, 512)
    dim: int
    narrow: tuple[int, int]
    rank: int = 0


TASKS = {
    "texts": Task(config="language", phases=TEXTS, dim=128, narrow=(32, 1), rank=37),
    "digits": Task(config="vision", phases=[*DIGITS], dim=64, narrow=(32, 2), rank=47),
    "new text": Task(
        config="language",
        phases=["web", "wiki"],
        first=(48, 48, 192),
        last=(192, 192, 768),
        dim=64,
        narrow=(64, 4),
    ),
}


def run(task: str, method: str, lr: float, seed: int) -> dict[str, Any]:
    """Train through all phases; the figures of its row."""
    logging.disable(logging.WARNING)  # of what a run says of itself
    with TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        (Path(folder) / "study.yaml").write_text(yaml.safe_dump(experiment(TASKS[task], method, seed)))
        base = ROOT / f"configs/continual/{TASKS[task].config}.yaml"
        given = ["--config", str(base), "--config", f"{folder}/study.yaml", "--run_dir", f"{folder}/run"]
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            main(["fit", *given, f"--model.optim.lr={lr}", f"--seed_everything={seed}"])
        found = figures(Path(folder) / "run", TASKS[task].phases)
    return found | ({"loss": found["last"]} if task == "new text" else {})


def experiment(task: Task, method: str, seed: int) -> dict[str, Any]:
    """What a run has otherwise than the config of its task."""
    names, texts = task.phases, task.config == "language"
    phases = [{"name": name, "steps": STEPS, "data": data(name, seed)} for name in names]
    if method == "joint":
        whole = data(names[0], seed)
        whole["init_args"] |= {"source": {source(name): 1 for name in names}} if texts else {"classes": None}
        phases = [{"name": "joint", "steps": STEPS * len(names), "data": whole}]
        phases += [{"name": name, "steps": 0, "data": data(name, seed)} for name in names]
    size, stages = models(task, method)
    frozen = ["new"] if texts else ["new", "head"]
    growth = {"stages": stages, "schedule": "continue", "train": frozen if method in ("new tokens", "lora") else "all"}
    growth |= {"init": "zero_keys"} if method == "zero keys" else {}
    return {
        "model": {"init_args": {"config": size, "optim": {"warmup_steps": STEPS // 10}}},
        "data": {"class_path": "PhasedDataModule", "init_args": {"phases": phases}},
        "trainer": {
            "max_steps": STEPS * len(names),
            "callbacks": [{"class_path": "GrowParameterTokens", "init_args": growth}] if stages else [],
            "accelerator": "auto",
            "devices": 1,
            "enable_progress_bar": False,
            "logger": False,
            "val_check_interval": None,
            **({"limit_val_batches": 2} if SCALE < 1 else {}),
        },
        "checkpoint": {"every_n_train_steps": STEPS * len(names), "save_top_k": 1},
        "best": {"save_top_k": 0},
    }


def models(task: Task, method: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Sizes to begin with, and the growths."""
    later, kinds = task.phases[1:], ("qkv", "proj", "ffn")
    first, last = ([*map(widened, counts)] for counts in (task.first, task.last))
    size: dict[str, Any] = {"depth": 2, "dim": widened(task.dim), "num_heads": widened(4)}
    begin, end = (
        size | {f"{kind}_tokens": n for kind, n in zip(kinds, counts, strict=True)} for counts in (first, last)
    )
    if method in ("new tokens", "all tokens", "zero keys"):
        pairs = [*zip(kinds, first, last, strict=True)]
        return begin, [
            {"at_phase": name} | {kind: a + (b - a) * i // len(later) for kind, a, b in pairs}
            for i, name in enumerate(later, 1)
        ]
    if method == "net2net":
        dim, heads = map(widened, task.narrow)
        size |= {"baseline": "width", "dim": dim, "num_heads": heads}
        return size, [{"at_phase": name, "width": 2} for name in later]
    if method == "lora":
        return begin | {"baseline": "parameters"}, [{"at_phase": name, "lora": widened(task.rank)} for name in later]
    return end | ({"baseline": "parameters"} if method == "transformer" else {}), []


def lacks(cell: dict[str, Any]) -> str:
    """Which of its data do not lie beside the project, and would be downloaded."""
    return missing(*(name for name in TASKS[cell["task"]].phases if name in TEXTS))


def data(name: str, seed: int) -> dict[str, Any]:
    """The data module of a phase."""
    if name in TEXTS:
        return {"class_path": "TextDataModule", "init_args": TEXT_DATA | {"source": source(name), "seed": seed}}
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
    found["last"] = loss(names[-1], last)
    if names[0] in rows:
        found["learned"] = mean(loss(name, name) for name in names)
        found["forgotten"] = mean(loss(name, last) - loss(name, name) for name in names[:-1])
    found["matrix"] = "; ".join(" ".join(f"{loss(name, after):.3f}" for name in names) for after in rows)
    return found
