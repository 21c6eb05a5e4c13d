"""The Transformer that a TokenFormer is compared with: the same backbone with linear projections, no biases."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear, GELU, linear: what a feed-forward Pattention of `hidden` tokens is without its normalisation.

    Attributes:
        in_use: so many hidden units, the first ones, are used in training mode; None for all.
    """

    def __init__(self, dim: int, hidden: int, down_std: float) -> None:
        super().__init__()
        self.up = linear(dim, hidden)
        self.down = linear(hidden, dim, down_std)
        self.in_use: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.training and (n := self.in_use) is not None:
            return F.linear(F.gelu(F.linear(x, self.up.weight[:n])), self.down.weight[:, :n])
        return self.down(F.gelu(self.up(x)))

    @property
    def unused_params(self) -> int:
        """Parameters of the hidden units that are not used as it is now."""
        dim, hidden = self.down.weight.shape
        return 0 if self.in_use is None or not self.training else 2 * dim * (hidden - self.in_use)


def linear(in_features: int, out_features: int, std: float = 0.02) -> nn.Linear:
    """A projection without bias, weights N(0, std): GPT-2's and GPT-NeoX's initialisation."""
    layer = nn.Linear(in_features, out_features, bias=False)
    with torch.no_grad():
        layer.weight.normal_(std=std)
    return layer
