"""The plain loop of all studies: the suite's models, data, optimizers and schedules, without Lightning."""

import os
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from datamodules.loader import StreamDataModule
from datamodules.text import TextDataModule
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.groups import make_optimizer, param_groups
from lit_modules.optim.schedule import lr_scheduler
from studies.runner import ROOT
from tokenformer import TokenFormerLM
from tokenformer.backbone import block_matrices
from tokenformer.matched_keys import matched_key_stds, measuring_scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = float(os.environ.get("STUDY_SCALE", "1"))  # `--scale`
LEAST = 6  # steps of a training, however small the scale
# Real data that lie beside the project, or what the Hugging Face hub has of their kind.
BESIDE = ROOT.parent / "shared/data"
SOURCES: dict[str, tuple[Path | None, str]] = {
    "code": (None, "stdlib"),
    "wiki": (BESIDE / "text/wikitext-2/train.txt", "hf:Salesforce/wikitext:wikitext-2-raw-v1"),
    "web": (BESIDE / "text/openwebtext-sample/train.jsonl", "hf:Skylion007/openwebtext"),
    "digits": (None, "digits"),
    "cifar": (BESIDE / "images/cifar10", "hf:uoft-cs/cifar10"),
    "tiny-imagenet": (BESIDE / "images/tiny-imagenet-20", "hf:zh-plus/tiny-imagenet"),
}


def scaled(steps: int) -> int:
    """So many steps, times the scale of a larger machine, or of a trial."""
    return max(LEAST, round(steps * SCALE))


def widened(size: int) -> int:
    """So many channels, heads or tokens, times the whole root of the scale, so that matrices grow by about as much."""
    return size * max(1, round(SCALE**0.5))


def source(name: str) -> str:
    """What a data module reads."""
    beside, elsewhere = SOURCES[name]
    return str(beside) if beside is not None and beside.exists() else elsewhere


def missing(*names: str) -> str:
    """Which of these data do not lie beside the project, and would be downloaded."""
    paths = [SOURCES[name][0] for name in names]
    return ", ".join(str(path) for path in paths if path is not None and not path.exists())


@cache
def text(seq_len: int, batch_size: int, seed: int, bpe_of: str = "") -> TextDataModule:
    """Bytes of Python's standard library, in the order of a seed; or a source in a BPE of its own, of 2,048 tokens."""
    words = {"source": source(bpe_of), "tokenizer": "bpe", "bpe_vocab_size": 2048} if bpe_of else {}
    return ready(TextDataModule(seq_len=seq_len, batch_size=batch_size, seed=seed, **words))


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, tensors, from a file that the first of several processes writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            torch.save(make(), path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
    return torch.load(path, DEVICE, weights_only=True)


def ready(data: Any) -> Any:
    """The data module, once its data are there."""
    data.prepare_data()
    data.setup("fit")
    return data


def train(
    model: nn.Module,
    data: StreamDataModule,
    loss_of: Callable[..., Tensor],
    optimizer_name: str,
    lr: float,
    steps: int,
    *,
    skip: int = 0,
    state: dict[str, Any] | None = None,
    before_step: Callable[[int], None] = lambda step: None,
    precision: torch.dtype = torch.float32,
    clip: float = 1.0,
    on_gradients: Callable[[Tensor], None] = lambda norm: None,
) -> dict[str, Any]:
    """Warm-up over a tenth of the steps, cosine to a tenth of the rate, gradients clipped; returns the optimizer's
    state.

    Args:
        model: what is trained, in place.
        data: its batches, as many epochs as it takes.
        loss_of: of a batch.
        optimizer_name: adamw or muon.
        lr: peak.
        steps: their number.
        skip: batches that were trained on before.
        state: of the optimizer that trained the model so far; of new parameters it knows nothing. None: afresh.
        before_step: called with the number of each step before it.
        precision: of matrix products, by autocast.
        clip: the largest norm of all gradients.
        on_gradients: called with their norm before they are clipped, of each step.
    """  # noqa: D205
    config = OptimConfig(name=optimizer_name, lr=lr, warmup_steps=max(1, steps // 10))  # type: ignore[arg-type]
    muon = block_matrices(model) if optimizer_name == "muon" else None
    optimizer = make_optimizer(param_groups(model, config.weight_decay, muon=muon), config)
    if state is not None:
        optimizer.load_state_dict(deepcopy(state))  # torch would train on the tensors of the caller
        for group in optimizer.param_groups:
            group |= {"lr": lr, "initial_lr": lr}
    scheduler = lr_scheduler(optimizer, config, steps)
    loader = data.train_dataloader()
    batches = (batch for _ in iter(int, 1) for batch in loader)
    for step, batch in enumerate(islice(batches, skip, skip + steps)):
        before_step(step)
        with torch.autocast(DEVICE, precision, enabled=precision != torch.float32):
            loss = loss_of(*(part.to(DEVICE) for part in batch))
        loss.backward()
        on_gradients(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return optimizer.state_dict()


@torch.no_grad()
def matched_stds(model: nn.Module, data: StreamDataModule, loss_of: Callable[..., Tensor]) -> dict[str, float]:
    """Deviations of new keys that have scores like the old ones on the first batch."""
    with measuring_scores(model) as sums:
        loss_of(*(part.to(DEVICE) for part in next(iter(data.train_dataloader()))))
    return matched_key_stds(model, sums)


@torch.no_grad()
def validation_loss(model: TokenFormerLM, data: TextDataModule, num_batches: int = 40) -> float:
    """Nats a byte on held-out text."""
    batches = islice(data.val_dataloader(), max(2, round(num_batches * min(1.0, SCALE))))
    losses = [model.nats_and_entropy(*(part.to(DEVICE) for part in batch))[0].mean() for batch in batches]
    return float(torch.stack(losses).mean())
