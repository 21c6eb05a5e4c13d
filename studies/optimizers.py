"""AdamW or Muon, for the TokenFormer and for its Transformer twin of as many parameters, each at its own best rate.

Tasks: `bytes` of Python's standard library, the loss in nats a byte; scikit-learn's `digits` and `cifar`, 5,000 images
of CIFAR-10 (all 50,000 where those do not lie beside the project), the share of validation images that are named wrong,
in per cent.

`cpu_seconds` are those of all threads of a training, with its data, validation left out.
"""

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.images import ImageDataModule
from studies.runner import ROOT
from studies.training import DEVICE, ready, scaled, text, train, validation_loss, widened
from tokenformer import LMConfig, TokenFormerLM, TokenFormerViT, ViTConfig

BATCH_SIZE = {"bytes": 12, "digits": 64, "cifar": 64}
SEQ_LEN = 128
CIFAR = ROOT.parent / "shared/data/images/cifar10"  # real images, re-encoded as JPEG
IMAGES: dict[str, dict[str, Any]] = {
    "digits": {"source": "digits", "image_size": 8, "crop": "none", "hflip": 0.0},
    "cifar": {"source": str(CIFAR) if CIFAR.exists() else "hf:uoft-cs/cifar10", "image_size": 32, "crop": "padded"},
}
PATCH_SIZE = {"digits": 2, "cifar": 4}
# By parameters, roughly, in the language model: depth, channels, heads; N = D, and 4 D in the feed-forward layer.
SIZES = {"0.3M": (4, 64, 4), "1M": (4, 128, 4), "10M": (6, 320, 5)}


def run(task: str, size: str, model: str, optimizer: str, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one model; the figures of its row."""
    torch.manual_seed(seed)
    depth, dim, heads = SIZES[size][0], *map(widened, SIZES[size][1:])
    sizes: dict[str, Any] = {"depth": depth, "dim": dim, "num_heads": heads, "init": "scaled", "scale": "learned"}
    sizes |= {"qkv_tokens": dim, "proj_tokens": dim, "ffn_tokens": 4 * dim}
    sizes |= {"baseline": "parameters"} if model == "transformer" else {}
    if task == "bytes":
        data: Any = text(SEQ_LEN, BATCH_SIZE[task], seed)
        net: Any = TokenFormerLM(LMConfig(vocab_size=data.vocab_size, max_seq_len=SEQ_LEN, **sizes))
        loss_of = net.loss
    else:
        images = {"crop_pct": 1.0, "batch_size": BATCH_SIZE[task], "num_workers": 0, "seed": seed}
        data = ready(ImageDataModule(**IMAGES[task], **images))
        shape = {"image_size": data.image_size, "patch_size": PATCH_SIZE[task], "num_classes": len(data.class_names)}
        net = TokenFormerViT(ViTConfig(**shape, pool="avg", position="learned", **sizes))

        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(net(images), labels, label_smoothing=0.1)

    start = time.process_time()
    train(net.to(DEVICE), data, loss_of, optimizer, lr, scaled(steps))
    seconds = time.process_time() - start
    net.eval()
    loss = validation_loss(net, text(SEQ_LEN, BATCH_SIZE[task], 0)) if task == "bytes" else error_rate(net, data)
    return {"params": net.num_params(), "loss": loss, "cpu_seconds": round(seconds)}


@torch.no_grad()
def error_rate(model: TokenFormerViT, data: ImageDataModule) -> float:
    """The share of validation images that are named wrong, in per cent."""
    wrong = count = 0
    for images, labels, places in data.val_dataloader():
        real = places >= 0  # the others fill up a batch
        wrong += int((model(images.to(DEVICE)).argmax(-1).cpu() != labels)[real].sum())
        count += int(real.sum())
    return 100 * wrong / count
