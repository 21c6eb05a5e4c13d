"""Net2Net (Chen et al. 2016): a wider Transformer baseline with the same function."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokenformer.baseline import Linear
from tokenformer.config import widened

Model = TypeVar("Model", bound=nn.Module)


def divide(total: Tensor, parts: int, generator: torch.Generator | None) -> Tensor:
    """Random parts of like size that add up to a tensor, (parts, *shape)."""
    shares = torch.rand(parts, *total.shape, generator=generator).add_(0.5)
    divided = (shares / shares.sum(0)).to(total) * total
    divided[0] = total - divided[1:].sum(0)  # whatever the shares were rounded to
    return divided


@torch.no_grad()
def widen(model: Model, factor: int, seed: int = 0) -> Model:
    """A Transformer baseline of `factor` times the channels, heads and hidden units, with the same function.

    Net2Net (Chen et al. 2016): every channel becomes `factor` equal ones, and the weights that read them are divided in
    random shares, so that the copies can part. A whole number, because a LayerNorm's mean and variance stay only if
    every channel is copied equally often. Updates of low rank become part of their weights.

    Args:
        model: a baseline; it is left as it is.
        factor: channels afterwards over channels now, at least 2.
        seed: of the shares.

    Raises:
        ValueError: for a TokenFormer, which grows by tokens, a model that is not of this project, positions that are
            computed from the width, or a factor below 2.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"width: {type(model).__name__} is not a baseline of this project (model.config.baseline)")
    if config.baseline is None:
        raise ValueError("width: a TokenFormer grows by parameter tokens (qkv, proj, ffn, factor), not in width")
    if getattr(config, "position", "learned") != "learned":
        raise ValueError("width: position: sincos depends on the width, so the function would change: use learned")
    if factor < 2:
        raise ValueError(f"width={factor}: must be a whole number, at least 2")
    wide = type(model)(widened(config, factor))
    wide.to(next(model.parameters()))
    generator = torch.Generator().manual_seed(seed)
    old: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.lora:
            old[f"{name}.weight"] = module.merged()
    for name, parameter in wide.named_parameters():
        source = old[name]
        times = [new // old for new, old in zip(parameter.shape, source.shape, strict=True)]
        if source.ndim != 2 or "embedding" in name:  # norms, embeddings, a classifier's bias
            # A tied output matrix reads `factor` equal channels with the weights that the input has.
            shrink = factor if name.startswith("backbone.norm") and getattr(config, "tie_embeddings", False) else 1
            parameter.copy_(source.repeat(times) / shrink)
        else:
            rows = times[0]
            blocks = torch.stack([divide(source, factor, generator) for _ in range(rows)])  # (rows, factor, out, in)
            parameter.copy_(blocks.transpose(1, 2).flatten(2, 3).flatten(0, 1))
    return wide
