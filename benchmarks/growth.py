"""What growth costs: the growth itself, and the steps after it against those of a model built at that size.

    python -m benchmarks.growth [--rounds 7]

The growth is the published step 124M -> 354M (12 blocks of 768 channels, 576/2304 -> 2140/8560 tokens), with AdamW's
state there. The steps are forward, backward and AdamW of 2 such blocks at 2140/8560 tokens, 16 sequences of 128 a step.
"""

import argparse
import time

import torch

from benchmarks.harness import ratio, time_in_turn, write_csv
from lit_modules.optim import OptimConfig, adamw, param_groups, regroup
from tokenformer import LMConfig, TokenFormerLM, grow

SMALL = {"qkv_tokens": 576, "proj_tokens": 576, "ffn_tokens": 2304}
LARGE = {"qkv": 2140, "proj": 2140, "ffn": 8560}
# How the tokens came: sizes of each growth as parts of the way, kind.
GROWN = {
    "2 segments, zero_keys": ([1.0], "zero_keys"),
    "3 segments, zero_keys": ([0.5, 1.0], "zero_keys"),
    "2 segments, norms of their own": ([1.0], "pairs"),
    "3 segments, norms of their own": ([0.5, 1.0], "pairs"),
}
GOAL = 0.97


def seconds_of_growth(init: str) -> float:
    """124M -> 354M, the optimizer told."""
    model = TokenFormerLM(LMConfig(**SMALL))
    optimizer = adamw(param_groups(model, 0.1), OptimConfig(), fused=True)
    model.loss(*torch.randint(0, 50304, (2, 1, 8)).unbind()).backward()
    optimizer.step()
    start = time.perf_counter()
    grow(model, **LARGE, init=init)  # type: ignore[arg-type]
    regroup(optimizer, param_groups(model, 0.1))
    optimizer.zero_grad()
    return time.perf_counter() - start


class Trainee:
    """A model with its optimizer; calling it makes a step."""

    def __init__(self, model: TokenFormerLM) -> None:
        self.model = model
        self.optimizer = adamw(param_groups(model, 0.1), OptimConfig(), fused=True)
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


def main() -> None:
    """Print the table and write benchmarks/results/growth.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for init in ("zero_keys", "segment_norm", "pairs"):
        best = sorted(seconds_of_growth(init) for _ in range(3))[1]
        rows.append({"what": f"growth 124M -> 354M, {init}", "seconds": f"{best:.2f}"})
        print(f"growth 124M -> 354M, {init:<14} {best:.2f} s (median of 3)", flush=True)
    seconds = time_in_turn(dict(trainees()), args.rounds)
    for name in GROWN:
        slower, lowest, highest = ratio(seconds, name, "built at its size")
        speed = {"speed": f"{1 / slower:.3f}", "lowest": f"{1 / highest:.3f}", "highest": f"{1 / lowest:.3f}"}
        rows.append({"what": f"steps, {name}", "seconds": f"{sorted(seconds[name])[args.rounds // 2]:.2f}"} | speed)
        reached = "reached" if 1 / slower >= GOAL else "not reached"
        print(f"{name:<32} speed over built: {1 / slower:.3f} ({1 / highest:.3f}-{1 / lowest:.3f}), {GOAL} {reached}")
    print(f"rows in {write_csv('growth', [dict.fromkeys(rows[-1], '') | row for row in rows])}")


if __name__ == "__main__":
    main()
