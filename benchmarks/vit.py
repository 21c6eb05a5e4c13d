"""TokenFormer-ViT against timm's ViT of as many parameters: images/s in training and in evaluation.

    python -m benchmarks.vit [--rounds 7] [--device cpu]

Training: forward, cross-entropy, backward, fused AdamW. Evaluation: forward without gradients. Images are random, in
memory, 224 x 224; both models from timm's `create_model`. On a GPU in bf16-mixed, compiled.
"""

import statistics
from functools import partial
from typing import Any

import timm
import torch
from torch.nn import functional as F

import tokenformer  # noqa: F401  (registers its models)
from benchmarks.harness import Case, Measured, Row, benchmark, round_ratios, time_in_turn
from benchmarks.loops import Loop

TRAIN, EVALUATE = ("training images/s", "timm's ViT"), ("evaluation images/s", "timm's ViT")
MATCHED = {  # tokens that give a TokenFormer-ViT the parameters of the ViT of that width
    "tiny": {"qkv_tokens": 144, "proj_tokens": 144, "ffn_tokens": 576},
    "base": {"qkv_tokens": 576, "proj_tokens": 576, "ffn_tokens": 2304},
}


def case(size: str, batch_size: int, device: str = "cpu", quick: bool = False) -> Case:
    """One size."""
    precision = "bf16, compiled" if device == "cuda" else "float32"
    goals = {TRAIN: ">= 0.95", EVALUATE: ">= 0.95"}
    return Case(
        f"ViT-{size}/16, {batch_size} images, {precision}",
        goals,
        {"size": size, "batch_size": batch_size},
        device,
        quick,
        seconds=30,
    )


CASES = [case("tiny", 8, quick=True), case("base", 8), case("base", 256, "cuda")]


def measure(size: str, batch_size: int, device: str, rounds: int, **sizes: Any) -> Measured:
    """Both in turn, training and then evaluation. `sizes` are given to both models."""
    on_gpu = device == "cuda"
    torch.compiler.reset()
    models = {
        "ours": timm.create_model(f"tokenformer_vit_{size}_patch16_224", **MATCHED[size], **sizes),
        "timm": timm.create_model(f"vit_{size}_patch16_224", **sizes),
    }
    images = torch.randn(batch_size, 3, *[sizes.get("img_size", 224)] * 2, device=device)
    batch = images, torch.randint(0, 1000, (batch_size,), device=device)
    loops = {}
    for name, model in models.items():
        model.to(device).train()
        if on_gpu:
            for block in model.blocks if name == "timm" else model.backbone.blocks:
                block.compile(dynamic=False)  # all share a graph: seconds, where a whole model takes minutes
        loops[name] = Loop(model, partial(loss, model), [batch], "bf16-mixed" if on_gpu else "32-true")
    repeats = 5 if on_gpu else 1
    trained = time_in_turn({name: partial(loop.run, repeats) for name, loop in loops.items()}, rounds)
    for model in models.values():
        model.eval()
    evaluations = {name: partial(evaluate, model, images, repeats) for name, model in models.items()}
    evaluated = time_in_turn(evaluations, rounds)
    columns: Row = {f"{name}_params": sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    for what, seconds in (("train", trained), ("eval", evaluated)):
        speeds = {name: repeats * batch_size / statistics.median(found) for name, found in seconds.items()}
        columns |= {f"{name}_{what}_per_s": f"{speed:.1f}" for name, speed in speeds.items()}
    return {TRAIN: round_ratios(trained, "timm", "ours"), EVALUATE: round_ratios(evaluated, "timm", "ours")}, columns


def loss(model: Any, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(images), classes)


@torch.no_grad()
def evaluate(model: Any, images: torch.Tensor, repeats: int) -> None:
    """Forward."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        for _ in range(repeats):
            model(images)


if __name__ == "__main__":
    benchmark("vit", CASES, measure, rounds=7)
