"""Peak memory of a forward and backward pass, besides what is there before it: operator, and language model.

    python -m benchmarks.memory [--device cpu]

Against the straightforward transcription of the operator and against an MLP of its shape; a model against itself with
the transcription in its layers, and against Transformer baseline. On the CPU all of torch's allocations, as the
profiler sees them; on a GPU `torch.cuda.max_memory_allocated`. One round: nothing here is random.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Case, Measured, benchmark
from benchmarks.operator import MLP, TRANSCRIPTION, mlp, recomputing, saved_bytes, transcription
from tokenformer import LMConfig, TokenFormerLM, pattention

OPERATOR, MODEL = "peak memory of the operator", "peak memory of a model's step"
KEPT, KEPT_RECOMPUTING = ((f"what the operator keeps{how}", "one score buffer") for how in ("", ", recompute_scores"))
RECOMPUTING = f"{MODEL}, recompute_scores"
BASELINE = "Transformer baseline"
SMALL = {"depth": 4, "dim": 384, "num_heads": 6, "qkv_tokens": 288, "proj_tokens": 288, "ffn_tokens": 1152}
PUBLISHED = {"depth": 12, "dim": 768, "num_heads": 12, "qkv_tokens": 576, "proj_tokens": 576, "ffn_tokens": 2304}


def cases(
    device: str, tokens: int, sizes: dict[str, int], vocab_size: int, batch_size: int, seq_len: int
) -> list[Case]:
    """Both precisions of the operator, one of a model."""
    found = [
        Case(
            f"T {tokens}, D 768, N 3072, {dtype}",
            {
                (OPERATOR, TRANSCRIPTION): "<= 0.5",
                (OPERATOR, MLP): "<= 1.0",
                KEPT: "<= 1.01",  # a factor for each row comes with it
                KEPT_RECOMPUTING: "<= 0.01",
            },
            {"shape": (tokens, 768, 3072), "dtype": dtype},
            device,
            quick=True,
            seconds=5,
        )
        for dtype in ("float32", "bfloat16")
    ]
    model = Case(
        f"{sizes['depth']} x {sizes['dim']}, {batch_size} x {seq_len} tokens, vocabulary {vocab_size}, float32",
        {
            (what, peer): goal
            for what in (MODEL, RECOMPUTING)
            for peer, goal in ((TRANSCRIPTION, "<= 0.5"), (BASELINE, "<= 1.0"))
        },
        {"shape": (batch_size, seq_len), "sizes": {"vocab_size": vocab_size, **sizes}},
        device,
        quick=True,
    )
    return [*found, model]


CASES = cases("cpu", 4096, SMALL, 257, 8, 256) + cases("cuda", 16384, PUBLISHED, 50304, 8, 1024)


def peak(run: Callable[[], object], device: str) -> int:
    """Bytes that a call has allocated at the worst moment, after another call of it."""
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    live = most = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def operator_step(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> None:
    """Forward and backward."""
    torch.autograd.grad(function(*inputs), inputs, grad)


def model_step(model: TokenFormerLM, ids: Tensor) -> None:
    """Forward and backward; gradients are added to those that are there."""
    model.loss(ids, ids).backward()


def measure(
    shape: tuple[int, ...], device: str, rounds: int, dtype: str = "float32", sizes: dict[str, Any] | None = None
) -> Measured:
    """Peaks of an operator's contenders (shape T, D, N) or of a model's (shape B, T)."""
    if sizes is None:
        tokens, dim, num_tokens = shape
        factory: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}
        inputs = tuple(torch.randn(n, dim, **factory).requires_grad_() for n in (tokens, num_tokens, num_tokens))
        grad = torch.randn(tokens, dim, **factory)
        peaks = {
            name: peak(partial(operator_step, function, inputs, grad), device)
            for name, function in (("ours", pattention), (TRANSCRIPTION, transcription), (MLP, mlp))
        }
        ours, peers = {OPERATOR: "ours"}, (TRANSCRIPTION, MLP)
        scores = tokens * num_tokens * grad.itemsize
        kept = {
            pair: [saved_bytes(function, *inputs) / scores]
            for pair, function in ((KEPT, pattention), (KEPT_RECOMPUTING, recomputing))
        }
    else:
        kept = {}
        sizes = {"max_seq_len": shape[1], **sizes}
        ids = torch.randint(0, sizes["vocab_size"], shape, device=device)
        model = TokenFormerLM(LMConfig(**sizes)).to(device)
        peaks = {"ours": peak(partial(model_step, model, ids), device)}
        with mock.patch("tokenformer.pattention.attend", lambda x, keys, values, *_: transcription(x, *keys, *values)):
            peaks[TRANSCRIPTION] = peak(partial(model_step, model, ids), device)
        baseline = TokenFormerLM(LMConfig(baseline="parameters", **sizes)).to(device)
        peaks[BASELINE] = peak(partial(model_step, baseline, ids), device)
        model.backbone.recompute_scores()
        peaks["recomputing"] = peak(partial(model_step, model, ids), device)
        ours, peers = {MODEL: "ours", RECOMPUTING: "recomputing"}, (TRANSCRIPTION, BASELINE)
    ratios = {(what, peer): [peaks[name] / peaks[peer]] for what, name in ours.items() for peer in peers}
    return ratios | kept, {f"{name.split()[-1].lower()}_bytes": count for name, count in peaks.items()}


if __name__ == "__main__":
    benchmark("memory", CASES, measure, rounds=1)
