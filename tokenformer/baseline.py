"""The Transformer that a TokenFormer is compared with: the same backbone with linear projections, no biases."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenformer.int8 import dense


class MLP(nn.Module):
    """Linear, GELU, linear: what a feed-forward Pattention of `hidden` tokens is without its normalisation.

    Attributes:
        in_use: so many hidden units, the first ones, are used in training mode; None for all.
    """

    def __init__(self, dim: int, hidden: int, down_std: float) -> None:
        super().__init__()
        self.up: Linear = Linear(dim, hidden)
        self.down: Linear = Linear(hidden, dim, down_std)
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


class LowRank(nn.Module):
    """B A x: an update of low rank (LoRA, Hu et al. 2022), A `down` (rank, D_in), B `up` (D_out, rank)."""

    def __init__(self, in_features: int, out_features: int, rank: int, like: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(like.new_zeros(rank, in_features))
        self.up = nn.Parameter(like.new_zeros(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        return F.linear(F.linear(x, self.down), self.up)


class Linear(nn.Linear):
    """A projection without bias, weights N(0, std): GPT-2's and GPT-NeoX's initialisation.

    Attributes:
        lora: updates that are added to it; none to begin with.
    """

    def __init__(self, in_features: int, out_features: int, std: float = 0.02) -> None:
        super().__init__(in_features, out_features, bias=False)
        with torch.no_grad():
            self.weight.normal_(std=std)
        self.lora = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        out = F.linear(x, dense(self.weight))
        for update in self.lora:
            out = out + update(x)
        return out

    def append_lora(self, rank: int) -> LowRank:
        """Add an update of zeros."""
        self.lora.append(update := LowRank(self.in_features, self.out_features, rank, self.weight.detach()))
        return update

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight with all updates in it, (D_out, D_in)."""
        whole = self.weight.double()
        for update in self.lora:
            whole = whole + update.up.double() @ update.down.double()  # type: ignore[operator]
        return whole.to(self.weight.dtype)

    def match(self, shapes: Mapping[str, torch.Size], prefix: str = "") -> None:
        """Have the updates of a state dict, given the shapes of its tensors; new ones are zeros.

        A state dict that knows nothing of this layer changes nothing.
        """
        if f"{prefix}weight" not in shapes:
            return
        ranks: list[int] = []
        while (shape := shapes.get(f"{prefix}lora.{len(ranks)}.down")) is not None and len(shape) == 2:
            ranks.append(shape[0])
        present = [len(update.down) for update in self.lora]  # type: ignore[arg-type]
        fit = next((i for i, (a, b) in enumerate(zip(present, ranks, strict=False)) if a != b), len(ranks))
        del self.lora[fit:]
        for rank in ranks[len(self.lora) :]:
            self.append_lora(rank)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.match({name: t.shape for name, t in state_dict.items() if name.startswith(prefix)}, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@torch.no_grad()
def add_lora(model: nn.Module, rank: int, seed: int = 0) -> None:
    """LoRA: an update of low rank beside each linear projection of the blocks; the function stays.

    As peft has it with `lora_alpha` = rank: A is U(-1 / sqrt(D_in), 1 / sqrt(D_in)), B zero.

    Args:
        model: a Transformer baseline.
        rank: of the updates, at least 1.
        seed: of A, with the layer's name and its number of updates.

    Raises:
        ValueError: for a model without such projections, or a rank below 1.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    if not found:
        raise ValueError("lora: the model is no Transformer baseline of this project (model.config.baseline)")
    if rank < 1:
        raise ValueError(f"lora={rank}: the rank must be at least 1")
    for name, layer in found.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{len(layer.lora)}:{name}".encode()))
        down, bound = layer.append_lora(rank).down, layer.in_features**-0.5
        if not down.is_meta:
            down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=generator))
