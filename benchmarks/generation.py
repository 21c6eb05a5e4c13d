"""Generation with the KV cache: against the Transformer baseline, against itself without a cache, and over length.

    python -m benchmarks.generation [--rounds 3] [--device cpu]

Tokens/s of `generate`, greedy, after a prompt of 8 tokens. Without the cache the whole text is read again for each
token. Linear in length: the time of a text over twice that of one half as long. Compiled: `generate` of transformers
with its static cache, which compiles a step itself on a GPU.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Case, Measured, Row, Unavailable, benchmark, round_ratios, time_in_turn
from tokenformer import LMConfig, TokenFormerLM, generate

CACHED, STATIC = "tokens/s with the KV cache", "tokens/s compiled, static cache of transformers"
BASELINE, UNCACHED = (CACHED, "Transformer baseline"), (CACHED, "without the cache")
LINEAR = ("time with the KV cache", "2 x half the length")
STATIC_BASELINE, EAGER = (STATIC, "Transformer baseline"), (STATIC, "with the KV cache, eager")
SMALL = {"depth": 4, "dim": 256, "num_heads": 4, "qkv_tokens": 192, "proj_tokens": 192, "ffn_tokens": 768}
PUBLISHED = {"depth": 12, "dim": 768, "num_heads": 12, "qkv_tokens": 576, "proj_tokens": 576, "ffn_tokens": 2304}
PUBLISHED |= {"vocab_size": 50304}
PROMPT = 8


def case(name: str, batch_size: int, length: int, device: str, quick: bool = False, static: bool = False) -> Case:
    """One batch size at one length."""
    sizes = {"4 x 256": SMALL, "124M": PUBLISHED}[name]
    return Case(
        f"{name}, batch {batch_size}, {length} tokens, {'bfloat16' if device == 'cuda' else 'float32'}",
        {STATIC_BASELINE: ">= 0.9", EAGER: ""} if static else {BASELINE: ">= 0.9", UNCACHED: "", LINEAR: "<= 1.1"},
        {"sizes": sizes, "batch_size": batch_size, "length": length} | ({"static": True} if static else {}),
        device,
        quick,
        seconds=90 if static else 5 + length / 2,
    )


CASES = [case("4 x 256", 1, length, "cpu", length == 128) for length in (128, 256, 512)]
CASES += [case("4 x 256", 16, length, "cpu", length == 64) for length in (64, 128)]
CASES += [case("124M", batch, length, "cpu") for batch, length in ((1, 32), (16, 16))]
CASES += [case("124M", batch, length, "cuda") for batch in (1, 16) for length in (128, 512)]
CASES += [case("4 x 256", batch, 128, "cpu", static=True) for batch in (1, 16)]
CASES += [case("124M", batch, 256, "cuda", static=True) for batch in (1, 16)]  # after what `gpu` wants first


@torch.no_grad()
def without_cache(model: TokenFormerLM, prompts: torch.Tensor, length: int) -> torch.Tensor:
    """What :func:`generate` gives, greedily, reading the whole text for each token."""
    ids = prompts
    for _ in range(length):
        last = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        ids = torch.cat((ids, model(ids, only_at=last).argmax(-1, keepdim=True)), dim=1)
    return ids


def compiled(config: LMConfig, prompts: torch.Tensor, length: int, dtype: torch.dtype) -> Callable[[], object]:
    """`generate` of transformers, which compiles a step of a static cache on GPUs alone: elsewhere it is done here."""
    try:
        from tokenformer.hf import TokenFormerConfig, TokenFormerForCausalLM
    except ImportError as error:
        raise Unavailable(str(error)) from error
    model = TokenFormerForCausalLM(TokenFormerConfig(**asdict(config))).to(prompts.device, dtype).eval()
    if not prompts.is_cuda:
        model.forward = torch.compile(model.forward, fullgraph=True)
    greedily = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return partial(model.generate, prompts, **greedily, cache_implementation="static")


def measure(
    sizes: dict[str, Any], batch_size: int, length: int, device: str, rounds: int, static: bool = False
) -> Measured:
    """All in turn."""
    shared = {"vocab_size": 257, "max_seq_len": PROMPT + length, **sizes}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config, twin = LMConfig(**shared), LMConfig(**shared, baseline="parameters")
    ours, baseline = TokenFormerLM(config).to(device, dtype), TokenFormerLM(twin).to(device, dtype)
    prompts = torch.randint(0, 257, (batch_size, PROMPT), device=device)
    columns: Row = {"length": length, "batch_size": batch_size}
    if static:
        torch.compiler.reset()
        steps = {name: compiled(of, prompts, length, dtype) for name, of in (("static", config), ("twin", twin))}
        seconds = time_in_turn(steps | {"cached": partial(generate, ours, prompts, length, temperature=0)}, rounds)
        columns["static_tokens_per_s"] = f"{batch_size * length / statistics.median(seconds['static']):.0f}"
        pairs = {STATIC_BASELINE: "twin", EAGER: "cached"}
        return {pair: round_ratios(seconds, peer, "static") for pair, peer in pairs.items()}, columns
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
    for name in ("cached", "baseline", "uncached"):
        columns[f"{name}_tokens_per_s"] = f"{batch_size * length / statistics.median(seconds[name]):.0f}"
    return ratios, columns


if __name__ == "__main__":
    benchmark("generation", CASES, measure, rounds=3)
