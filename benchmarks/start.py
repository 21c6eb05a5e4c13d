"""How long until something happens: `tokenformer --help`, `import tokenformer`, the first training step.

    python -m benchmarks.start [--rounds 5]

Fresh processes in turn. The first step: of `tokenformer fit` with the quickstart's config and AdamW, and of a bare loop
with the same model and batch, each from the start of the process to the end of its first optimizer step; tokens are
prepared.
"""

import subprocess
import sys
import tempfile
import time
from functools import partial
from statistics import median
from typing import Any

from lightning import Callback

from benchmarks.harness import ROOT, Case, Measured, benchmark, in_turn, round_ratios, time_in_turn
from benchmarks.loops import QUICKSTART, text

HELP, IMPORT = ("seconds of `tokenformer --help`", "1 s"), ("`import tokenformer`", "`import torch`")
FIRST = ("time to the first step of `tokenformer fit`", "bare loop")
CASES = [
    Case("fresh process", {HELP: "<= 1.0"}, {"what": "help"}),
    Case("fresh process", {IMPORT: "<= 1.2"}, {"what": "import"}, quick=True),
    Case("quickstart", {FIRST: ""}, {"what": "first step"}),
]
BARE = """
import sys, time
import numpy, torch
from tokenformer import LMConfig, TokenFormerLM
ids = numpy.fromfile(sys.argv[1], dtype="uint16", count=16 * 129).astype("int64")
batch = torch.from_numpy(ids).view(16, 129)
sizes = {"depth": 2, "dim": 128, "num_heads": 4, "qkv_tokens": 48, "proj_tokens": 48, "ffn_tokens": 192}
sizes |= {"init": "scaled", "scale": "learned", "rotary_fraction": 1.0}
model = TokenFormerLM(LMConfig(**sizes, vocab_size=257, max_seq_len=128))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
model.loss(batch[:, :-1], batch[:, 1:]).backward()
optimizer.step()
print("first step", time.time())
"""


class FirstStep(Callback):
    """Prints the time after each step."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Lightning's hook."""
        print("\nfirst step", time.time(), flush=True)


def python(*arguments: str) -> str:
    """Run Python in a fresh process; what it prints."""
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return run.stdout


def first_step(*arguments: str) -> float:
    """Seconds from the start of a process to the line that it prints."""
    start = time.time()
    line = next(line for line in python(*arguments).splitlines() if line.startswith("first step"))
    return float(line.split()[2]) - start


def fit_one_step() -> float:
    """The quickstart, one step of it."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "trainer.accelerator=cpu",
            "trainer.devices=1",
            "trainer.max_steps=1",
            "model.optim.name=adamw",
            "model.optim.warmup_steps=0",
            "trainer.limit_val_batches=0",
        ]
        options += [f"run_dir={folder}/run", f"data.cache_dir={ROOT}/data"]
        options += ["trainer.callbacks={class_path: benchmarks.start.FirstStep}"]
        arguments = [f"--{option}" for option in options]
        return first_step("-m", "lit_modules.cli", "fit", "--config", str(QUICKSTART), *arguments)


def measure(what: str, device: str, rounds: int) -> Measured:
    """One of the three."""
    if what == "help":
        seconds = time_in_turn({"help": partial(python, "-m", "lit_modules.cli", "--help")}, rounds)
        return {HELP: seconds["help"]}, {}
    if what == "import":
        imports = {name: partial(python, "-c", f"import {name}") for name in ("tokenformer", "torch")}
        seconds = time_in_turn(imports, rounds)
        ratios = {IMPORT: round_ratios(seconds, "tokenformer", "torch")}
    else:
        tokens = text(128, 16, 257).folder / "train.bin"
        seconds = in_turn({"fit": fit_one_step, "bare": lambda: first_step("-c", BARE, str(tokens))}, rounds)
        ratios = {FIRST: round_ratios(seconds, "fit", "bare")}
    return ratios, {f"{name}_s": f"{median(found):.2f}" for name, found in seconds.items()}


if __name__ == "__main__":
    benchmark("start", CASES, measure, rounds=5)
