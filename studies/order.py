"""In which order should a model see the pixels of an image that it writes? Randomised order, annealed to raster order.

After RAR (Yu et al. 2024, arXiv 2411.00776): each pixel is predicted from those before it in the order, and the input
is told which place comes next, by a learned embedding. Digits of scikit-learn, 8 x 8 pixels of 17 greys, 360 of 1,797
held out; the 0.3M of pretraining.py, AdamW, 32 images a step. `loss` is in nats a pixel, in raster order.

order       raster    line by line
            random    one drawn for each image and step
            annealed  random with a probability that falls from 1 to 0 between a quarter and three quarters of the steps
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from studies.pretraining import BASELINES, shape_of
from studies.training import DEVICE, scaled, train
from tokenformer import LMConfig, TokenFormerLM
from tokenformer.loss import linear_cross_entropy

GREYS, SIDE, BATCH_SIZE, HELD_OUT = 17, 8, 32, 360
PIXELS = SIDE * SIDE


class PixelModel(nn.Module):
    """A language model of greys that is told the place of the pixel that comes next."""

    def __init__(self, **shape: Any) -> None:
        super().__init__()
        # One id more, with which an image begins; the order is in the embeddings of places.
        self.lm = TokenFormerLM(LMConfig(vocab_size=GREYS + 1, max_seq_len=PIXELS, rotary_fraction=0.0, **shape))
        self.place = nn.Embedding(PIXELS, self.lm.config.dim)
        self.next_place = nn.Embedding(PIXELS, self.lm.config.dim)
        for embedding in (self.place, self.next_place):
            nn.init.normal_(embedding.weight, std=0.02)

    def loss(self, images: Tensor, order: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the greys (B, 64) in an order of places, (B, 64)."""
        greys = images.gather(1, order)
        x = self.lm.embedding(torch.cat((greys.new_full((len(greys), 1), GREYS), greys[:, :-1]), dim=1))
        seen = nn.functional.pad(self.place(order[:, :-1]), (0, 0, 1, 0))  # (B, 64, D), none for the first
        hidden = self.lm.backbone(x + seen + self.next_place(order))
        return linear_cross_entropy(hidden.flatten(0, 1), self.lm.output_weight, greys.flatten())


class Batches:
    """Digits in an order of their own in each epoch."""

    def __init__(self, images: Tensor, seed: int) -> None:
        self.images, self.generator = images, torch.Generator().manual_seed(seed)

    def train_dataloader(self) -> "Batches":
        """As of a data module."""
        return self

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        """An epoch, in whole batches."""
        shuffled = self.images[torch.randperm(len(self.images), generator=self.generator)]
        return ((batch,) for batch in shuffled.split(BATCH_SIZE) if len(batch) == BATCH_SIZE)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Greys (n, 64) to train on and held out, the same ones always."""
    greys = torch.as_tensor(load_digits().data).long()
    greys = greys[torch.randperm(len(greys), generator=torch.Generator().manual_seed(0))]
    return greys[HELD_OUT:], greys[:HELD_OUT]


def run(order: str, model: str, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train one model; the figures of its row."""
    torch.manual_seed(seed)
    seen, held_out = digits()
    shape = shape_of("0.3M") | ({"baseline": BASELINES[model]} if model in BASELINES else {})
    net = PixelModel(**shape).to(DEVICE)
    total, step = scaled(steps), 0
    generator = torch.Generator().manual_seed(seed)

    def at_random() -> float:
        annealed = min(1.0, max(0.0, 1.5 - 2 * step / total))
        return {"raster": 0.0, "random": 1.0, "annealed": annealed}[order]

    def loss_of(images: Tensor) -> Tensor:
        return net.loss(images, orders(len(images), at_random(), generator).to(images.device))

    def count(now: int) -> None:
        nonlocal step
        step = now

    train(net, Batches(seen, seed), loss_of, "adamw", lr, total, before_step=count)  # type: ignore[arg-type]
    with torch.no_grad():
        loss = net.loss(held_out.to(DEVICE), orders(HELD_OUT, 0.0, generator).to(DEVICE))
    return {"params": sum(p.numel() for p in net.parameters()), "loss": float(loss)}


def orders(num: int, at_random: float, generator: torch.Generator) -> Tensor:
    """An order of places for each image, (n, 64): raster, or drawn with this probability."""
    drawn = torch.rand(num, PIXELS, generator=generator).argsort(1)
    return torch.where(torch.rand(num, 1, generator=generator) < at_random, drawn, torch.arange(PIXELS))
