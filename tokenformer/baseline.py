"""The Transformer that a TokenFormer is compared with: the same backbone with linear projections, no biases."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear, GELU, linear: what a feed-forward Pattention of `hidden` tokens is without its normalisation."""

    def __init__(self, dim: int, hidden: int, down_std: float) -> None:
        super().__init__()
        self.up = linear(dim, hidden)
        self.down = linear(hidden, dim, down_std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(F.gelu(self.up(x)))


def linear(in_features: int, out_features: int, std: float = 0.02) -> nn.Linear:
    """A projection without bias, weights N(0, std): GPT-2's and GPT-NeoX's initialisation."""
    layer = nn.Linear(in_features, out_features, bias=False)
    with torch.no_grad():
        layer.weight.normal_(std=std)
    return layer
