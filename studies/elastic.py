"""One model for several sizes, or a smaller one made of it: what does it cost? Shares of the tokens that are left.

Bytes of Python's standard library, 800 steps of 12 sequences of 96, Muon; of a Transformer (of as many parameters) the
hidden units of its MLPs take the place of tokens. `loss` is the mean over all shares, the whole model among them.

method       how a model comes to a size
alone        it was trained at that size, for as many steps
elastic      one model was trained at all shares in turn, the first tokens each (ElasticTokens)
first        one model was trained whole, then cut to its first tokens
use          the same, to the tokens with the largest mean |weight| x |value| on 20 batches
gradient     the same, to those without which the loss there rises most, |dL/dv . v|
use, trained      as `use`, then trained for a tenth of the steps with a tenth of the rate
whole, trained    as that, and nothing was taken away: what the training alone does; its loss is that of the whole

`speed` in the results: for each share how many times faster than the whole model it reads, processor time alone.
"""

import time
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import torch
from torch import Tensor

from lit_modules.callbacks import ElasticTokens
from lit_modules.commands.inspect_inputs import Batch
from lit_modules.commands.shrink import rank
from studies.training import DEVICE, LEAST, once, scaled, text, train, validation_loss, widened
from tokenformer import LMConfig, TokenFormerLM
from tokenformer.elastic import elastic_layers, first, shrunk, use_first
from tokenformer.pruning import keep_tokens

SEQ_LEN, BATCH_SIZE, STEPS = 96, 12, scaled(800)
SHARES = (1.0, 0.9, 0.7, 0.5, 0.25)
SIZES = {"depth": 2, "dim": widened(96), "num_heads": widened(4)}
TOKENS = {kind: widened(n) for kind, n in (("qkv_tokens", 96), ("proj_tokens", 96), ("ffn_tokens", 384))}
WHOLE = Path("runs/studies/elastic")


def run(model: Literal["tokenformer", "transformer"], method: str, lr: float, seed: int) -> dict[str, Any]:
    """The losses at all shares, those of one row."""
    data, shown = text(SEQ_LEN, BATCH_SIZE, seed), text(SEQ_LEN, BATCH_SIZE, 0)

    def go(net: TokenFormerLM, steps: int = STEPS, rate: float = lr, **more: Any) -> TokenFormerLM:
        train(net.train(), data, net.loss, "muon", rate, steps, **more)
        return net.eval()

    @cache
    def whole() -> TokenFormerLM:
        return trained_once(model, lr, seed, go)

    def at(share: float) -> TokenFormerLM:
        if method == "alone":
            return go(build(model, seed, share))
        if method == "elastic":
            return shrunk(elastic(), share)
        net = deepcopy(whole())
        if method == "first":
            return shrunk(net, share)
        if share < 1:
            keep_tokens(net, rank(net, Shown(net, data), share, "gradient" if method == "gradient" else "use")[0])  # type: ignore[arg-type]
        return go(net, max(LEAST, STEPS // 10), lr / 10, skip=STEPS) if method.endswith("trained") else net

    @cache
    def elastic() -> TokenFormerLM:
        net = build(model, seed)
        layers, draws = elastic_layers(net), ElasticTokens([*SHARES], seed)
        go(net, before_step=lambda step: use_first(layers, draws.share(step)))
        use_first(layers, 1.0)
        return net

    shares = SHARES[:1] if method == "whole, trained" else SHARES
    nets = [at(share) for share in shares]
    losses = [validation_loss(net, shown) for net in nets]
    found: dict[str, Any] = {"params": nets[0].num_params(), "loss": mean(losses)}
    found |= {f"at {share:g}": loss for share, loss in zip(shares, losses, strict=True)}
    return found | {"speed": " ".join(f"{speed:.2f}" for speed in speeds(nets))}


def build(model: str, seed: int, share: float = 1.0) -> TokenFormerLM:
    """A model of its size, or of a share of its tokens or hidden units."""
    torch.manual_seed(seed)
    baseline = "parameters" if model == "transformer" else None
    shape: dict[str, Any] = {"vocab_size": 257, "max_seq_len": SEQ_LEN, "init": "scaled", "scale": "learned", **SIZES}
    if baseline is None:
        net = TokenFormerLM(LMConfig(**shape, **{kind: first(n, share) for kind, n in TOKENS.items()}))
    else:
        net = shrunk(TokenFormerLM(LMConfig(**shape, **TOKENS, baseline=baseline)), share)  # type: ignore[arg-type, assignment]
    return net.to(DEVICE)


def trained_once(model: str, lr: float, seed: int, go: Any) -> TokenFormerLM:
    """The whole model, trained by whoever needs it first."""
    sizes = "-".join(map(str, (*SIZES.values(), *TOKENS.values())))
    path = WHOLE / f"{model}-{sizes}-{lr:g}-{STEPS}x{BATCH_SIZE}x{SEQ_LEN}-{seed}.pt"
    net = build(model, seed)
    net.load_state_dict(once(path, lambda: go(net).state_dict()))
    return net.eval()


class Shown:
    """The first training batches, for the ranking of tokens."""

    def __init__(self, model: TokenFormerLM, data: Any) -> None:
        self.model, self.data = model, data

    def batches(self) -> Iterator[Batch]:
        """20 of them."""
        for inputs, targets in islice(self.data.train_dataloader(), 20):
            places = torch.arange(inputs.numel())
            yield Batch(inputs, places, places >= 0, targets, torch.ones(inputs.numel(), 1, dtype=torch.bool))

    def loss(self, batch: Batch) -> Tensor:
        """Nats a byte."""
        return self.model.loss(batch.inputs, batch.targets)  # on the model's device, where `rank` has put them


def clock() -> float:
    """Seconds of this process's work; on a GPU, once all of it is done."""
    if DEVICE == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def speeds(nets: list[TokenFormerLM]) -> list[float]:
    """How many times faster than the first each of them reads: medians of rounds in turn, processor time alone."""
    ids = torch.randint(257, (4 * BATCH_SIZE, SEQ_LEN), device=DEVICE)
    times: list[list[float]] = [[] for _ in nets]
    for _ in range(7):
        for net, seconds in zip(nets, times, strict=True):
            start = clock()
            net.hidden(ids)
            seconds.append(clock() - start)
    return [median(times[0]) / median(seconds) for seconds in times]
