"""A bare training loop, and `tokenformer fit`: what trains a model in the benchmarks."""

import contextlib
import csv
import io
import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import ROOT, seconds_of
from datamodules.text import TextDataModule
from lit_modules.cli import main as tokenformer
from tokenformer import LMConfig

QUICKSTART = ROOT / "configs/language/quickstart.yaml"
LR = 1e-3


class Loop:
    """Forward, backward, clipping, fused AdamW, over batches that are in memory; nothing is logged.

    Args:
        model: to be trained.
        loss: of a batch.
        batches: handed out again and again.
        precision: Lightning's name, 32-true or bf16-mixed.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], batches: list[Any], precision: str) -> None:
        self.model, self.loss, self.batches, self.steps = model, loss, batches, 0
        self.device = batches[0][0].device.type
        self.autocast = precision == "bf16-mixed"
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)

    def bytes(self) -> int:
        """Of its parameters and the optimizer's state."""
        states = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *states))

    def step(self) -> None:
        """One optimizer step."""
        batch = self.batches[self.steps % len(self.batches)]
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def run(self, steps: int) -> None:
        """Some steps."""
        for _ in range(steps):
            self.step()

    def samples_per_second(self, steps: int, count: int) -> float:
        """Speed over `steps` steps after one that warms up; `count` is what a batch counts for."""
        self.run(1)
        return steps * count / seconds_of(lambda: self.run(steps))


def text(seq_len: int, batch_size: int, vocab_size: int) -> TextDataModule:
    """The standard library's text: bytes for 257 ids, else a BPE of that size. Prepared where the configs put it."""
    tokenizer = "bytes" if vocab_size == 257 else "bpe"
    data = TextDataModule(
        tokenizer=tokenizer,
        bpe_vocab_size=vocab_size,
        seq_len=seq_len,
        batch_size=batch_size,
        cache_dir=str(ROOT / "data"),
    )
    data.prepare_data()
    data.setup("fit")
    return data


def batches_in_memory(data: TextDataModule, count: int, device: str) -> list[Any]:
    """The first batches of a training."""
    return [tuple(t.to(device) for t in batch) for batch in islice(data.train_dataloader(), count)]


def fit_arguments(config: LMConfig, data: TextDataModule, steps: int, log_every: int, **settings: Any) -> list[str]:
    """`tokenformer fit` on the quickstart's config with another model and length, without its callbacks and growth."""
    from_data = ("vocab_size", "max_seq_len")
    sizes = {
        f"model.config.{name}": value
        for name, value in asdict(config).items()
        if name not in from_data and value is not None
    }
    settings = {
        "data.tokenizer": data.tokenizer_name,
        "data.bpe_vocab_size": data.bpe_vocab_size,
        "data.seq_len": data.seq_len,
        "data.batch_size": data.batch_size,
        "data.cache_dir": data.cache_dir,
        "trainer.devices": 1,
        "trainer.max_steps": steps,
        "trainer.log_every_n_steps": log_every,
        "trainer.limit_val_batches": 0,
        "trainer.callbacks": "null",
        "model.optim.name": "adamw",
        "model.optim.lr": LR,
        "model.optim.warmup_steps": 1,
        "checkpoint.every_n_train_steps": steps,
    } | settings
    return ["fit", "--config", str(QUICKSTART), *(f"--{key}={value}" for key, value in (sizes | settings).items())]


def fit(arguments: list[str], run_dir: Path | None = None) -> list[dict[str, float]]:
    """Run `tokenformer fit` in this process; the lines of its log. What it prints is shown only if it fails.

    Args:
        arguments: of the command line.
        run_dir: what the run leaves behind; by default nothing.
    """
    printed = io.StringIO()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = run_dir or Path(folder) / "run"
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                tokenformer([*arguments, f"--run_dir={run_dir}"])
        except (Exception, SystemExit):
            print(printed.getvalue())
            raise
        finally:
            logging.disable(logging.NOTSET)
        return read_log(run_dir)


def read_log(run_dir: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.csv` that tell of training."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/seconds")]
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def speed(log: list[dict[str, float]]) -> float:
    """Tokens a second after the first line of the log, which has the warm-up."""
    first, last = log[0], log[-1]
    return (last["train/tokens"] - first["train/tokens"]) / (last["train/seconds"] - first["train/seconds"])
