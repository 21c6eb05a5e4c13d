"""Training a language model through `tokenformer fit`, against a bare loop of the same model and against a plain GPT.

    python -m benchmarks.training [--rounds 5] [--device cpu]

Tokens/s of a short run, without its first line of the log; the bare loops have their batches in memory. The GPT has as
many parameters. Text and tokenizer: the standard library. On a GPU compiled and in bf16-mixed, with the MFU, the share
of the time that is spent waiting for data, and peak memory.
"""

import gc
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpt import GPT
from benchmarks.harness import Case, Measured, Pair, Row, Unavailable, benchmark, in_turn, round_ratios
from benchmarks.loops import Loop, batches_in_memory, fit, fit_arguments, speed, text
from tokenformer import LMConfig, TokenFormerLM

FIT = "training tokens/s of `tokenformer fit`"
BARE, PLAIN_GPT, BASELINE = (FIT, "bare loop"), (FIT, "plain GPT"), (FIT, "Transformer baseline")
MFU, WAIT = ("MFU", "peak"), ("waiting for data", "training time")
PEAK = ("peak memory of `tokenformer fit`", "plain GPT")


def sizes(depth: int, dim: int, num_heads: int, tokens: int, ffn_tokens: int) -> dict[str, int]:
    """Of a TokenFormer."""
    names = ("depth", "dim", "num_heads", "qkv_tokens", "proj_tokens", "ffn_tokens")
    return dict(zip(names, (depth, dim, num_heads, tokens, tokens, ffn_tokens), strict=True))


SMALL = sizes(4, 384, 6, 288, 1152)
CPU_GOALS = {BARE: ">= 0.97", PLAIN_GPT: ">= 0.95", BASELINE: ""}
GPU_GOALS = {BARE: ">= 0.97", PLAIN_GPT: ">= 1.0", WAIT: "<= 0.01", PEAK: "<= 1.0"}


def gpu_case(
    name: str, size: dict[str, int], gpt: tuple[int, int, int, int], batch_size: int, mfu: str, seconds: float
) -> Case:
    """A published size, T 1024."""
    text_size = {"seq_len": 1024, "batch_size": batch_size, "vocab_size": 50304}
    return Case(
        f"{name}, T 1024, bf16, compiled",
        GPU_GOALS | {MFU: mfu},
        {"size": size, "gpt": gpt, "text_size": text_size, "steps": 24},
        device="cuda",
        seconds=seconds,
    )


CASES = [
    Case(
        "small: 4 x 128, T 128, 2048 tokens a step, float32",
        CPU_GOALS,
        {
            "size": sizes(4, 128, 4, 128, 512),
            "gpt": (4, 128, 4, 768),
            "text_size": {"seq_len": 128, "batch_size": 16, "vocab_size": 257},
            "steps": 20,
        },
        quick=True,
    ),
    Case(
        "4 x 384, T 256, 2048 tokens a step, vocabulary 8192, float32",
        CPU_GOALS,
        {
            "size": SMALL,
            "gpt": (4, 384, 6, 1536),
            "text_size": {"seq_len": 256, "batch_size": 8, "vocab_size": 8192},
            "steps": 8,
        },
    ),
    gpu_case("124M", sizes(12, 768, 12, 576, 2304), (12, 768, 12, 3072), 32, ">= 0.45", 120),
    gpu_case("354M", sizes(12, 768, 12, 2140, 8560), (24, 1024, 16, 4096), 16, "", 150),
    gpu_case("757M", sizes(12, 768, 12, 4850, 19400), (24, 1536, 16, 6144), 8, ">= 0.55", 180),
]


def measure(
    size: dict[str, int],
    gpt: tuple[int, int, int, int],
    text_size: dict[str, int],
    steps: int,
    device: str,
    rounds: int,
) -> Measured:
    """Take turns: fit, bare loop, GPT, and on the CPU the baseline through fit."""
    on_gpu = device == "cuda"
    precision = "bf16-mixed" if on_gpu else "32-true"
    data = text(**text_size)
    config = LMConfig(**size, max_seq_len=data.seq_len, vocab_size=data.vocab_size)  # type: ignore[arg-type]
    batches = batches_in_memory(data, 8, device)
    log_every = steps // 4
    settings = {"trainer.accelerator": device, "trainer.precision": precision, "model.compile": str(on_gpu).lower()}
    shares: dict[Pair, list[float]] = {MFU: [], WAIT: []}
    peaks: dict[str, float] = {}

    def noting_peak(name: str, run: Callable[[], float], mine: Loop | None = None) -> float:
        """What a contender says of itself. Its peak is without what lies there of the others."""
        if not on_gpu:
            return run()
        gc.collect()
        others = torch.cuda.memory_allocated() - (mine.bytes() if mine else 0)
        torch.cuda.reset_peak_memory_stats()
        said = run()
        peaks[name] = torch.cuda.max_memory_allocated() - others
        return said

    def through_fit(model: LMConfig) -> float:
        log = fit(fit_arguments(model, data, steps + log_every, log_every, **settings))
        if on_gpu and "train/mfu" not in log[1]:
            raise Unavailable("the peak of this GPU is not in lit_modules/hardware.py")
        for pair, name in ((MFU, "train/mfu"), (WAIT, "train/data_wait")):
            shares[pair].append(statistics.median(line.get(name, 0.0) for line in log[1:]))
        return speed(log)

    ours = TokenFormerLM(config).to(device)
    theirs = GPT(data.vocab_size, data.seq_len, *gpt).to(device)
    params = {"params": ours.num_params(), "gpt_params": sum(p.numel() for p in theirs.parameters())}
    if on_gpu:
        torch.compiler.reset()  # static shapes, whatever the case before had
        for block in ours.backbone.blocks:
            block.compile()
        theirs.compile_parts()
    ours_loop = Loop(ours, ours.loss, batches, precision)
    their_loop = Loop(theirs, theirs, batches, precision)
    bare, plain = (partial(loop.samples_per_second, steps, data.tokens_per_batch) for loop in (ours_loop, their_loop))
    contenders = {
        "fit": lambda: noting_peak("fit", partial(through_fit, config)),
        "bare": bare,
        "gpt": lambda: noting_peak("gpt", plain, their_loop),
    }
    pairs = {BARE: "bare", PLAIN_GPT: "gpt"}
    if not on_gpu:
        contenders["baseline"] = lambda: through_fit(replace(config, baseline="parameters"))
        pairs[BASELINE] = "baseline"
    speeds = in_turn(contenders, rounds)
    ratios = {pair: round_ratios(speeds, "fit", peer) for pair, peer in pairs.items()}
    columns: Row = params | {f"{name}_tokens_per_s": f"{statistics.median(v):.0f}" for name, v in speeds.items()}
    if on_gpu:
        ratios |= {pair: found[1:] for pair, found in shares.items()}  # without the warm-up's
        ratios[PEAK] = [peaks["fit"] / peaks["gpt"]]
        columns |= {f"{name}_peak_gib": f"{found / 2**30:.2f}" for name, found in peaks.items()}
    return ratios, columns


if __name__ == "__main__":
    benchmark("training", CASES, measure, rounds=5)
