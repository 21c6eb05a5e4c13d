"""What growth costs: the growth itself, and the steps after it against those of a model built at that size.

    python -m benchmarks.growth [--rounds 7]

The growth is the published step 124M -> 354M (12 blocks of 768 channels, 576/2304 -> 2140/8560 tokens), with AdamW's
state there. The steps are forward, backward and AdamW of 2 such blocks at 2140/8560 tokens, 16 sequences of 128 a step.
"""

import statistics
import time

import torch

from benchmarks.harness import Case, Measured, benchmark, round_ratios, time_in_turn
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.groups import make_optimizer, param_groups, update_param_groups
from tokenformer import LMConfig, TokenFormerLM, grow

SMALL = {"qkv_tokens": 576, "proj_tokens": 576, "ffn_tokens": 2304}
LARGE = {"qkv": 2140, "proj": 2140, "ffn": 8560}
# How the tokens came: sizes of each growth as parts of the way, kind.
GROWN = {
    "2 segments, zero_keys": ([1.0], "zero_keys"),
    "3 segments, zero_keys": ([0.5, 1.0], "zero_keys"),
    "2 segments, norms of their own": ([1.0], "pairs"),
    "3 segments, norms of their own": ([0.5, 1.0], "pairs"),
    "2 segments, anchored": ([1.0], "anchored"),
    "3 segments, anchored": ([0.5, 1.0], "anchored"),
}
GROWTH = ("seconds of the growth 124M -> 354M", "5 s")
KINDS = ("zero_keys", "segment_norm", "pairs", "anchored")


def steps_after(name: str) -> tuple[str, str]:
    """What is measured of models that have grown, against what."""
    return f"speed of steps after growth, {name}", "built at its size"


CASES = [Case(init, {GROWTH: "<= 5.0"}, {"init": init}) for init in KINDS]
CASES += [
    Case("2 blocks, 2140/8560 tokens, 16 x 128 a step", {steps_after(name): ">= 0.97" for name in GROWN}, quick=True)
]


def seconds_of_growth(init: str) -> float:
    """124M -> 354M, the optimizer told."""
    model = TokenFormerLM(LMConfig(**SMALL))
    optimizer = make_optimizer(param_groups(model, 0.1), OptimConfig())
    model.loss(*torch.randint(0, 50304, (2, 1, 8)).unbind()).backward()
    optimizer.step()
    start = time.perf_counter()
    grow(model, **LARGE, init=init)  # type: ignore[arg-type]
    update_param_groups(optimizer, param_groups(model, 0.1))
    optimizer.zero_grad()
    return time.perf_counter() - start


class Trainee:
    """A model with its optimizer; calling it makes a step."""

    def __init__(self, model: TokenFormerLM) -> None:
        self.model = model
        self.optimizer = make_optimizer(param_groups(model, 0.1), OptimConfig())
        self.batch = torch.randint(0, 257, (2, 16, 128))

    def __call__(self) -> None:
        """Forward, backward, AdamW."""
        self.model.loss(*self.batch.unbind()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def trainees() -> dict[str, Trainee]:
    """The built one and the grown ones, all of one size."""
    shared = {"vocab_size": 257, "depth": 2, "max_seq_len": 128}
    large = {f"{kind}_tokens": count for kind, count in LARGE.items()}
    found = {"built at its size": Trainee(TokenFormerLM(LMConfig(**shared, **large)))}
    for name, (parts, init) in GROWN.items():
        model = TokenFormerLM(LMConfig(**shared, **SMALL))
        for part in parts:
            counts = {
                kind: SMALL[f"{kind}_tokens"] + int(part * (n - SMALL[f"{kind}_tokens"])) for kind, n in LARGE.items()
            }
            grow(model, **counts, init=init)  # type: ignore[arg-type]
        found[name] = Trainee(model)
    return found


def measure(device: str, rounds: int, init: str | None = None) -> Measured:
    """A kind of growth itself, or the steps after all of them."""
    if init is not None:
        return {GROWTH: [seconds_of_growth(init) for _ in range(3)]}, {}
    seconds = time_in_turn(dict(trainees()), rounds)
    slowest = {f"{name.replace(',', '')} s": f"{statistics.median(found):.2f}" for name, found in seconds.items()}
    return {steps_after(name): round_ratios(seconds, "built at its size", name) for name in GROWN}, slowest


if __name__ == "__main__":
    benchmark("growth", CASES, measure, rounds=7)
