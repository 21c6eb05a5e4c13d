"""Long context: a TokenFormer against a Transformer of equal parameters, which is wider and deeper.

    python -m benchmarks.context [--rounds 5] [--device cpu]

A TokenFormer's cost between tokens does not grow with its size. The ratio is the time of a training step over the
Transformer's, divided by the ratio of the FLOPs that are computed, which are those of half the T x T pairs, since
attention is causal: 1 where time follows FLOPs. `flop_ratio` counts all pairs, as the paper does. As many tokens a
step at each T.
"""

import statistics
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Case, Measured, benchmark, round_ratios, time_in_turn
from tokenformer import LMConfig, TokenFormerLM

TIME = ("time of a training step over FLOPs", "wider Transformer")
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "4.8M": (
        {"depth": 3, "dim": 192, "num_heads": 3, "qkv_tokens": 512, "proj_tokens": 512, "ffn_tokens": 2048},
        {"depth": 6, "dim": 256, "num_heads": 4},
    ),
    "354M": (
        {"depth": 12, "dim": 768, "num_heads": 12, "qkv_tokens": 2140, "proj_tokens": 2140, "ffn_tokens": 8560},
        {"depth": 24, "dim": 1024, "num_heads": 16},
    ),
    "757M": (
        {"depth": 12, "dim": 768, "num_heads": 12, "qkv_tokens": 4850, "proj_tokens": 4850, "ffn_tokens": 19400},
        {"depth": 24, "dim": 1536, "num_heads": 16},
    ),
}


def case(size: str, seq_len: int, tokens: int, vocab_size: int, device: str, quick: bool = False) -> Case:
    """One size at one length."""
    precision = "bf16, compiled" if device == "cuda" else "float32"
    arguments = {"size": size, "seq_len": seq_len, "tokens": tokens, "vocab_size": vocab_size}
    return Case(f"{size}, T {seq_len}, {precision}", {TIME: "within 10 %"}, arguments, device, quick, seconds=60)


CASES = [case("4.8M", T, 4096, 257, "cpu", quick=T == 256) for T in (256, 512, 1024, 2048, 4096)]
CASES += [case(size, 1024 * k, 32768, 50304, "cuda") for size in ("354M", "757M") for k in (1, 2, 4, 8, 16, 32)]


def step(model: TokenFormerLM, ids: torch.Tensor) -> None:
    """Forward and backward."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        loss = model.loss(ids, ids)
    loss.backward()
    model.zero_grad()


def measure(size: str, seq_len: int, tokens: int, vocab_size: int, device: str, rounds: int) -> Measured:
    """Training steps of both in turn."""
    ids = torch.randint(0, vocab_size, (tokens // seq_len, seq_len), device=device)
    shared = {"vocab_size": vocab_size, "max_seq_len": seq_len}
    ours, theirs = PAIRS[size]
    configs = {"ours": LMConfig(**shared, **ours), "wider": LMConfig(**shared, **theirs, baseline="width")}
    models = {name: TokenFormerLM(config).to(device) for name, config in configs.items()}
    if device == "cuda":
        torch.compiler.reset()  # static shapes, whatever the case before had
        for model in models.values():
            for block in model.backbone.blocks:
                block.compile(dynamic=False)
    seconds = time_in_turn({name: partial(step, model, ids) for name, model in models.items()}, rounds)
    paper, computed = (
        configs["ours"].flops_per_token(T) / configs["wider"].flops_per_token(T) for T in (seq_len, seq_len // 2)
    )
    times = round_ratios(seconds, "ours", "wider")
    columns: dict[str, object] = {"T": seq_len, "time_ratio": f"{statistics.median(times):.3f}"}
    columns |= {"flop_ratio": f"{paper:.3f}", "causal_flop_ratio": f"{computed:.3f}"}
    columns |= {f"{name}_params": model.num_params() for name, model in models.items()}
    return {TIME: [time / computed for time in times]}, columns


if __name__ == "__main__":
    benchmark("context", CASES, measure, rounds=5)
