"""Models that are trained from the start, each at its own best rate.

task        bytes          of Python's standard library; nats a byte
            web            900 pages of OpenWebText, in a BPE of 2,048 tokens trained on them; nats a token
            digits         scikit-learn's, 8 x 8 pixels; per cent of the validation images that are named wrong
            cifar          5,000 images of CIFAR-10, 32 x 32; the same
            tiny-imagenet  4,000 images of 20 classes of it, 64 x 64; the same
            Of web, cifar and tiny-imagenet, all that the hub has where these parts do not lie beside the project.
size        parameters, roughly: 0.1M has 2 blocks of 48 channels, 0.3M 4 of 64, 1M 4 of 128, 3M 6 of 192, 10M 6 of
            320; D tokens a layer, 4 D in the feed-forward ones
model       tokenformer; transformer, its twin of as many parameters; equal width, the twin of as many channels and
            blocks, whose blocks have 12 D^2 parameters in place of 16 D^2; or grown, the TokenFormer that has half of
            its tokens in the first half of the steps, then all (anchored, the optimizer's state kept, a new schedule)
dim         another number of channels D in heads of 32, with so many tokens that parameters stay: few wide, many narrow
share       of all tokens, that of the projections: 0.5 unless it is said
score_norm  l2_norm_gelu unless it is said; gelu_l2_norm, softmax (exp, then L1) or l1_norm_gelu (the sum of |score|)
attention   softmax unless it is said; or differential (arXiv 2410.05258), with half of the heads, as published
augment     images: published, RandAugment, mixup and CutMix as for ImageNet; else flips and crops
seq_len     bytes of a sequence, 8,192 in a step; else 12 sequences of 128
norms       LayerNorms inside blocks: without weight and bias unless it is said; bias, or affine (both)
precision   of matrix products in training: float32 unless it is said; bfloat16, by autocast

TFLOP are those of the training's matrix products, CPU s the processor time of all its threads, data with it and
validation left out; MB what a step's forward and backward pass allocate at their worst moment.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.memory import peak
from datamodules.images import ImageDataModule
from studies.training import (
    DEVICE,
    matched_stds,
    missing,
    ready,
    scaled,
    source,
    text,
    train,
    validation_loss,
    widened,
)
from tokenformer import LMConfig, TokenFormerLM, TokenFormerViT, ViTConfig
from tokenformer.growth import grow_layers, pattention_layers, plan_growth
from tokenformer.pattention import Pattention

SEQ_LEN = 128
TEXT_BATCH, IMAGE_BATCH = 12, 64
IMAGES: dict[str, dict[str, Any]] = {
    "digits": {"image_size": 8, "crop": "none", "hflip": 0.0},
    "cifar": {"image_size": 32, "crop": "padded"},
    "tiny-imagenet": {"image_size": 64, "crop": "padded"},
}
PATCH_SIZE = {"digits": 2, "cifar": 4, "tiny-imagenet": 8}
SIZES = {"0.1M": (2, 48, 3), "0.3M": (4, 64, 4), "1M": (4, 128, 4), "3M": (6, 192, 6), "10M": (6, 320, 5)}
PUBLISHED = {"rand_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0}  # configs/vision/imagenet-base.yaml
TOKENS = 8192  # of a step, where seq_len is given
BASELINES = {"transformer": "parameters", "equal width": "width"}


def run(
    task: str,
    size: str,
    model: str,
    optimizer: str,
    steps: int,
    lr: float,
    seed: int,
    dim: int | str = "",
    share: float | str = "",
    score_norm: str = "l2_norm_gelu",
    norms: str = "",
    attention: str = "softmax",
    augment: str = "",
    seq_len: int | str = "",
    precision: str = "float32",
) -> dict[str, Any]:
    """Train one model; the figures of its row."""
    torch.manual_seed(seed)
    shape = shape_of(size, dim, share, 0.5 if model == "grown" else 1.0)
    shape |= {"norm_affine": bool(norms), "attention": attention}
    shape["num_heads"] //= 2 if attention == "differential" else 1
    shape |= {"baseline": BASELINES[model]} if model in BASELINES else {}
    shape |= {"score_norm": score_norm} if score_norm != "l1_norm_gelu" else {}
    length, batch_size = int(seq_len or SEQ_LEN), IMAGE_BATCH if task in IMAGES else TEXT_BATCH
    if seq_len:
        batch_size = TOKENS // length
    if task not in IMAGES:
        bpe_of = "" if task == "bytes" else task
        data: Any = text(length, batch_size, seed, bpe_of)
        net: Any = TokenFormerLM(LMConfig(vocab_size=data.vocab_size, max_seq_len=length, **shape))
        loss_of = net.loss
    else:
        images = {"crop_pct": 1.0, "batch_size": batch_size, "num_workers": 0, "seed": seed}
        images |= IMAGES[task] | (PUBLISHED if augment else {})
        data = ready(ImageDataModule(source=source(task), **images))
        shape |= {"image_size": data.image_size, "patch_size": PATCH_SIZE[task], "num_classes": len(data.class_names)}
        net = TokenFormerViT(ViTConfig(pool="avg", position="learned", **shape))

        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(net(images), labels, label_smoothing=0.1)

    if norms == "bias":
        for norm in (m for block in net.backbone.blocks for m in block.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight.requires_grad_(False)
    if score_norm == "l1_norm_gelu":
        for layer in pattention_layers(net).values():
            layer.forward = lambda x, layer=layer: l1_norm_gelu(layer, x)  # type: ignore[method-assign]

    def step_flops() -> int:
        sample = net.flops_per_image() if task in IMAGES else length * net.flops_per_token(length)
        return 3 * batch_size * int(sample)

    start, done, flops, state = time.process_time(), 0, 0, None
    products: torch.dtype = getattr(torch, precision)
    net.to(DEVICE)
    if model == "grown":
        done = scaled(steps) // 2
        state, flops = train(net, data, loss_of, optimizer, lr, done, precision=products), done * step_flops()
        stds = matched_stds(net, data, loss_of)
        grow_layers(net, plan_growth(net, {}, factor=2), init="anchored", seed=seed, key_stds=stds)
    train(net, data, loss_of, optimizer, lr, scaled(steps) - done, skip=done, state=state, precision=products)
    flops += (scaled(steps) - done) * step_flops()
    seconds = time.process_time() - start
    figures = {"params": sum(p.numel() for p in net.parameters() if p.requires_grad), "flops": flops}
    if seq_len:
        batch = [part.to(DEVICE) for part in next(iter(data.train_dataloader()))]
        figures["peak"] = peak(lambda: loss_of(*batch).backward(), DEVICE)
    net.eval()
    loss = error_rate(net, data) if task in IMAGES else validation_loss(net, text(length, batch_size, 0, bpe_of))
    return figures | {"loss": loss, "cpu_seconds": round(seconds)}


def lacks(cell: dict[str, Any]) -> str:
    """Which of its data do not lie beside the project, and would be downloaded."""
    return "" if cell["task"] == "bytes" else missing(cell["task"])


def shape_of(size: str, dim: int | str = "", share: float | str = "", part: float = 1.0) -> dict[str, Any]:
    """The fields of a config that say how large a model is, or one with a part of its tokens."""
    depth, width, heads = SIZES[size][0], *map(widened, SIZES[size][1:])
    tokens, projections = 8 * width, float(share or 0.5)  # of the five layers of a block together
    if dim:
        tokens, width, heads = tokens * width // widened(int(dim)), widened(int(dim)), widened(int(dim)) // 32
    tokens = round(tokens * part)
    each = round(projections * tokens / 4)
    counts = {"qkv_tokens": each, "proj_tokens": each, "ffn_tokens": tokens - 4 * each}
    return {"depth": depth, "dim": width, "num_heads": heads, "init": "scaled", "scale": "learned", **counts}


def l1_norm_gelu(layer: Pattention, x: Tensor) -> Tensor:
    """GELU(g N A / sum |A|) V: scores with a mean size of 1 times the trained gain g, as those of l2_norm_gelu."""
    (segment,) = layer.segments
    scores = x @ segment.keys.T  # type: ignore[operator]
    tau = layer.current_tau().to(x.dtype) * layer.num_tokens**0.5
    return F.gelu(scores * tau / scores.abs().sum(-1, keepdim=True)) @ segment.values  # type: ignore[operator]


@torch.no_grad()
def error_rate(model: TokenFormerViT, data: ImageDataModule) -> float:
    """The share of validation images that are named wrong, in per cent."""
    wrong = count = 0
    for images, labels, places in data.val_dataloader():
        real = places >= 0  # the others fill up a batch
        wrong += int((model(images.to(DEVICE)).argmax(-1).cpu() != labels)[real].sum())
        count += int(real.sum())
    return 100 * wrong / count
