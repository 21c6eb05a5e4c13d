"""Two DDP processes against one, each with one thread and as much work: tokens/s of two over twice those of one.

    python -m benchmarks.scaling [--rounds 3]

Both through `tokenformer fit`, in fresh processes. Needs two cores that nobody else uses.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Case, Measured, Unavailable, benchmark, in_turn, round_ratios
from benchmarks.loops import fit_arguments, read_log, speed, text
from tokenformer import LMConfig

SCALING = ("tokens/s of 2 DDP processes", "2 x one process")
SMALL = {"depth": 4, "dim": 384, "num_heads": 6, "qkv_tokens": 288, "proj_tokens": 288, "ffn_tokens": 1152}
CASES = [
    Case(
        "4 x 384, 2048 tokens a step and process, 1 thread each, gloo",
        {SCALING: ">= 0.9"},
        {"sizes": SMALL, "text_size": {"seq_len": 256, "batch_size": 8, "vocab_size": 8192}, "steps": 8},
    )
]


def fit_alone(arguments: list[str]) -> float:
    """`tokenformer fit` in a process of its own, with one thread; tokens/s."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lit_modules.cli", *arguments, f"--run_dir={folder}/run"]
        run = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise RuntimeError(run.stderr)
        return speed(read_log(Path(folder) / "run"))


def measure(sizes: dict[str, Any], text_size: dict[str, int], steps: int, device: str, rounds: int) -> Measured:
    """One process and two, in turn."""
    if (os.cpu_count() or 1) < 2:
        raise Unavailable("needs two cores")
    data = text(**text_size)
    config = LMConfig(**sizes, vocab_size=data.vocab_size, max_seq_len=data.seq_len)
    log_every = steps // 4

    def tokens_per_second(processes: int) -> float:
        settings = {"trainer.accelerator": "cpu", "trainer.devices": processes}
        settings["trainer.strategy"] = "ddp" if processes > 1 else "auto"
        return fit_alone(fit_arguments(config, data, steps + log_every, log_every, **settings))

    speeds = in_turn({"one": partial(tokens_per_second, 1), "two": partial(tokens_per_second, 2)}, rounds, warm_up=0)
    ratios = [ratio / 2 for ratio in round_ratios(speeds, "two", "one")]
    return {SCALING: ratios}, {f"{name}_tokens_per_s": f"{statistics.median(v):.0f}" for name, v in speeds.items()}


if __name__ == "__main__":
    benchmark("scaling", CASES, measure, rounds=3)
