"""`tokenformer fit` beside the training scripts that others use, unmodified: nanoGPT's, litgpt's and timm's.

    git clone https://github.com/karpathy/nanoGPT peers/nanoGPT
    git clone https://github.com/Lightning-AI/litgpt peers/litgpt
    git clone https://github.com/huggingface/pytorch-image-models peers/timm
    PEERS=peers python -m benchmarks.others [--rounds 3] [--device cpu]

Each is a process of its own that trains a model of as many parameters on the same tokens or images, in turn with ours.
Speed is what it logs itself, without the first steps; the columns have the seconds of a whole process too, its start
and its last checkpoint included. nanoGPT does not compile here and litgpt always does, as ours beside it. The commits
are in the rows.
"""

import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Case, Measured, Pair, Row, Unavailable, benchmark, in_turn, round_ratios
from benchmarks.images import IMAGES
from benchmarks.loops import fit_arguments, read_log, text
from benchmarks.training import FIT, SMALL
from tokenformer import LMConfig

PEERS = Path(os.environ.get("PEERS", "peers"))
GPT = {"n_layer": 4, "n_head": 6, "n_embd": 384}  # of as many parameters as SMALL
TEXT = {"seq_len": 256, "batch_size": 8, "vocab_size": 8192}
SETTING = "4 x 384, T 256, 2048 tokens a step, vocabulary 8192, float32"
IMAGES_FIT = "training images/s of `tokenformer fit`"
NANOGPT, LITGPT = (FIT, "nanoGPT's train.py"), (FIT, "litgpt pretrain, compiled")
TIMM = (IMAGES_FIT, "timm's train.py")
WARM_UP = 4  # steps that do not count
CASES = [
    Case(SETTING, {NANOGPT: ">= 1.0"}, {"peer": "nanoGPT", "steps": 20}),
    Case(SETTING, {LITGPT: ">= 1.0"}, {"peer": "litgpt", "steps": 20}),
    Case("ViT-tiny/16, 8 images, RandAugment, mixup, float32", {TIMM: ">= 0.97"}, {"peer": "timm", "steps": 16}),
]


def measure(peer: str, steps: int, device: str, rounds: int) -> Measured:
    """Ours and theirs in turn."""
    folder = (PEERS / peer).resolve()
    if not folder.is_dir():
        raise Unavailable(f"needs a clone of {peer} at {folder}: git clone it there, or name another folder by PEERS")
    pair, ours, theirs = {"nanoGPT": nanogpt, "litgpt": litgpt, "timm": timm}[peer](folder, steps)
    seconds: dict[str, list[float]] = {"fit": [], peer: []}

    def timed(name: str, call: Any) -> float:
        start = time.perf_counter()
        speed = call()
        seconds[name].append(time.perf_counter() - start)
        return float(speed)

    speeds = in_turn({name: partial(timed, name, call) for name, call in (("fit", ours), (peer, theirs))}, rounds)
    columns: Row = {"peer_commit": commit(folder), "steps": steps}
    for name, key in (("fit", "fit"), (peer, "peer")):
        columns |= {f"{key}_per_s": f"{statistics.median(speeds[name]):.1f}"}
        columns |= {f"{key}_process_s": f"{statistics.median(seconds[name][1:]):.1f}"}
    return {pair: round_ratios(speeds, "fit", peer)}, columns


Contenders = tuple[Pair, partial[float], partial[float]]


def nanogpt(folder: Path, steps: int) -> Contenders:
    """On tokens that it finds in data/ours of the folder it runs in, beside a link to its configurator."""
    data = text(**TEXT)
    options = {
        "dataset": "ours",
        "device": "cpu",
        "dtype": "float32",
        "compile": False,
        "block_size": data.seq_len,
        "batch_size": data.batch_size,
        "gradient_accumulation_steps": 1,
        "eval_iters": 1,
        "max_iters": steps + WARM_UP - 1,
        **GPT,
    }
    command = [str(folder / "train.py"), *(f"--{name}={value}" for name, value in options.items())]

    def theirs() -> float:
        with tempfile.TemporaryDirectory() as name:
            here = Path(name)
            (here / "configurator.py").symlink_to(folder / "configurator.py")
            (here / "data/ours").mkdir(parents=True)
            for split in ("train", "val"):
                (here / f"data/ours/{split}.bin").symlink_to(data.folder / f"{split}.bin")
            (here / "data/ours/meta.pkl").write_bytes(pickle.dumps({"vocab_size": data.vocab_size}))
            milliseconds = re.findall(r"^iter .* time ([\d.]+)ms", python(command, here), re.M)[WARM_UP:]
        return data.tokens_per_batch * len(milliseconds) / (sum(map(float, milliseconds)) / 1000)

    return NANOGPT, partial(fit_text, data, steps), partial(theirs)


def litgpt(folder: Path, steps: int) -> Contenders:
    """Its GPT-NeoX, with the tokens from a data module of `benchmarks/litgpt_tokens.py`."""
    data = text(**TEXT)
    model = GPT | {
        "block_size": data.seq_len,
        "vocab_size": data.vocab_size,
        "padded_vocab_size": data.vocab_size,
        "intermediate_size": 4 * GPT["n_embd"],
        "bias": False,
        "norm_class_name": "LayerNorm",
        "mlp_class_name": "GptNeoxMLP",
        "parallel_residual": False,
    }
    train = {
        "max_tokens": data.tokens_per_batch * (steps + WARM_UP),
        "max_seq_length": data.seq_len,
        "micro_batch_size": data.batch_size,
        "global_batch_size": data.batch_size,
        "tie_embeddings": True,
        "log_interval": 1,
    }

    def theirs() -> float:
        with tempfile.TemporaryDirectory() as here:
            config = {
                "model_name": "pythia-14m",
                "model_config": model,
                "precision": "32-true",
                "devices": 1,
                "logger_name": "csv",
                "out_dir": here,
                "data": {"class_path": "benchmarks.litgpt_tokens.Tokens", "init_args": {"folder": str(data.folder)}},
                "train": train | {"lr_warmup_steps": 1, "max_norm": 1.0},
                "eval": {"initial_validation": False, "final_validation": False},
            }
            path = Path(here) / "config.json"
            path.write_text(json.dumps(config))
            said = python(["-m", "litgpt", "pretrain", "--config", str(path)], ROOT, paths=(folder, ROOT))
        milliseconds = re.findall(r"iter time: ([\d.]+) ms", said)[WARM_UP:]
        return data.tokens_per_batch * len(milliseconds) / (sum(map(float, milliseconds)) / 1000)

    return LITGPT, partial(fit_text, data, steps, **{"model.compile": "true"}), partial(theirs)


def timm(folder: Path, steps: int) -> Contenders:
    """ViT-tiny on a folder of images, each read and augmented by one worker."""
    if not IMAGES.is_dir():
        raise Unavailable(f"needs a folder of class folders with images, there is none at {IMAGES}: BENCHMARK_IMAGES")
    sizes = {"depth": 12, "dim": 192, "num_heads": 3, "qkv_tokens": 144, "proj_tokens": 144, "ffn_tokens": 576}
    sizes |= {"patch_size": 16, "drop_path": 0.0}
    data = {"image_size": 224, "batch_size": 8, "num_workers": 1, "rand_augment": "rand-m9-mstd0.5-inc1"}
    data |= {"random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0}
    trainer = {"max_steps": steps + WARM_UP, "log_every_n_steps": WARM_UP, "limit_val_batches": 0}
    trainer |= {"accelerator": "cpu", "precision": "32-true", "accumulate_grad_batches": 1}
    settings = {f"model.config.{name}": value for name, value in sizes.items()}
    settings |= {f"data.{name}": value for name, value in data.items()}
    settings |= {f"trainer.{name}": value for name, value in trainer.items()}
    settings |= {"model.compile": "false", "model.optim.warmup_steps": 1}
    command = "--model vit_tiny_patch16_224 -b 8 -j 1 --device cpu --opt adamw --lr 1e-3 --clip-grad 1.0 --epochs 1"
    command += " --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --sched step --warmup-epochs 0"
    command += f" --train-batches-per-epoch {steps + WARM_UP} --val-split train --val-num-samples 8 --log-interval 1"

    def link(here: Path) -> Path:
        for split in ("train", "val"):
            (here / "images" / split).parent.mkdir(exist_ok=True)
            (here / "images" / split).symlink_to(IMAGES.resolve())
        return here / "images"

    def ours() -> float:
        with tempfile.TemporaryDirectory() as name:
            options = settings | {"data.source": link(Path(name)), "run_dir": f"{name}/run"}
            config = ROOT / "configs/vision/imagenet-small.yaml"
            python(["-m", "lit_modules.cli", "fit", f"--config={config}", *(f"--{k}={v}" for k, v in options.items())])
            log = read_log(Path(name) / "run")
        taken = log[-1]["train/seconds"] - log[0]["train/seconds"]
        return 8 * (log[-1]["step"] - log[0]["step"]) / taken

    def theirs() -> float:
        with tempfile.TemporaryDirectory() as name:
            where = ["--data-dir", str(link(Path(name))), "--output", f"{name}/out"]
            said = python([str(folder / "train.py"), *command.split(), *where], Path(name))
        seconds = re.findall(r"Train: .* Time: ([\d.]+)s", said)[WARM_UP:]
        return 8 * len(seconds) / sum(map(float, seconds))

    return TIMM, partial(ours), partial(theirs)


def fit_text(data: Any, steps: int, **settings: str) -> float:
    """Tokens/s of `tokenformer fit` in a process of its own."""
    config = LMConfig(**SMALL, max_seq_len=data.seq_len, vocab_size=data.vocab_size)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        arguments = fit_arguments(config, data, steps + WARM_UP, WARM_UP, **settings)
        python(["-m", "lit_modules.cli", *arguments, f"--run_dir={folder}/run"])
        log = read_log(Path(folder) / "run")
    taken = log[-1]["train/seconds"] - log[0]["train/seconds"]
    return (log[-1]["train/tokens"] - log[0]["train/tokens"]) / taken


def python(arguments: list[str], folder: Path = ROOT, paths: tuple[Path, ...] = ()) -> str:
    """Run Python in a process of its own, in a folder; what it prints."""
    env = os.environ | ({"PYTHONPATH": os.pathsep.join(map(str, paths))} if paths else {})
    run = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{arguments}:\n{run.stdout[-2000:]}\n{run.stderr[-6000:]}")
    return run.stdout + run.stderr


def commit(folder: Path) -> str:
    """Which one was cloned, and when it was made."""
    command = ["git", "-C", str(folder), "log", "-1", "--format=%h %as"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    benchmark("others", CASES, measure, rounds=3)
