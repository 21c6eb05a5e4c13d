"""Generation with the KV cache: against the Transformer baseline, against itself without a cache, and over length.

    python -m benchmarks.generation [--rounds 3] [--device cpu]

Tokens/s of `generate`, greedy, after a prompt of 8 tokens. Without the cache the whole text is read again for each
token. Linear in length: the time of a text over twice that of one half as long.
"""

import statistics
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Case, Measured, Row, benchmark, round_ratios, time_in_turn
from tokenformer import LMConfig, TokenFormerLM, generate

CACHED = "tokens/s with the KV cache"
BASELINE, UNCACHED = (CACHED, "Transformer baseline"), (CACHED, "without the cache")
LINEAR = ("time with the KV cache", "2 x half the length")
SMALL = {"depth": 4, "dim": 256, "num_heads": 4, "qkv_tokens": 192, "proj_tokens": 192, "ffn_tokens": 768}
PUBLISHED = {"depth": 12, "dim": 768, "num_heads": 12, "qkv_tokens": 576, "proj_tokens": 576, "ffn_tokens": 2304}
PUBLISHED |= {"vocab_size": 50304}
PROMPT = 8


def case(name: str, sizes: dict[str, int], batch_size: int, length: int, device: str, quick: bool = False) -> Case:
    """One batch size at one length."""
    return Case(
        f"{name}, batch {batch_size}, {length} tokens, {'bfloat16' if device == 'cuda' else 'float32'}",
        {BASELINE: ">= 0.9", UNCACHED: "", LINEAR: "<= 1.1"},
        {"sizes": sizes, "batch_size": batch_size, "length": length},
        device,
        quick,
        seconds=5 + length / 2,
    )


CASES = [case("4 x 256", SMALL, 1, length, "cpu", length == 128) for length in (128, 256, 512)]
CASES += [case("4 x 256", SMALL, 16, length, "cpu", length == 64) for length in (64, 128)]
CASES += [case("124M", PUBLISHED, batch, length, "cpu") for batch, length in ((1, 32), (16, 16))]
CASES += [case("124M", PUBLISHED, batch, length, "cuda") for batch in (1, 16) for length in (128, 512)]


@torch.no_grad()
def without_cache(model: TokenFormerLM, prompts: torch.Tensor, length: int) -> torch.Tensor:
    """What :func:`generate` gives, greedily, reading the whole text for each token."""
    ids = prompts
    for _ in range(length):
        last = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        ids = torch.cat((ids, model(ids, only_at=last).argmax(-1, keepdim=True)), dim=1)
    return ids


def measure(sizes: dict[str, Any], batch_size: int, length: int, device: str, rounds: int) -> Measured:
    """All in turn."""
    shared = {"vocab_size": 257, "max_seq_len": PROMPT + length, **sizes}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ours = TokenFormerLM(LMConfig(**shared)).to(device, dtype)
    baseline = TokenFormerLM(LMConfig(**shared, baseline="parameters")).to(device, dtype)
    prompts = torch.randint(0, 257, (batch_size, PROMPT), device=device)
    seconds = time_in_turn(
        {
            "cached": partial(generate, ours, prompts, length, temperature=0),
            "half": partial(generate, ours, prompts, length // 2, temperature=0),
            "baseline": partial(generate, baseline, prompts, length, temperature=0),
            "uncached": partial(without_cache, ours, prompts, length),
        },
        rounds,
    )
    ratios = {
        BASELINE: round_ratios(seconds, "baseline", "cached"),
        UNCACHED: round_ratios(seconds, "uncached", "cached"),
        LINEAR: [ratio / 2 for ratio in round_ratios(seconds, "cached", "half")],
    }
    columns: Row = {"length": length, "batch_size": batch_size}
    for name in ("cached", "baseline", "uncached"):
        columns[f"{name}_tokens_per_s"] = f"{batch_size * length / statistics.median(seconds[name]):.0f}"
    return ratios, columns


if __name__ == "__main__":
    benchmark("generation", CASES, measure, rounds=3)
