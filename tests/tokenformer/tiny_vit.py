"""A tiny image model and its input, for tests."""

import torch

from tokenformer import TokenFormerViT, ViTConfig

TINY = {"image_size": 32, "patch_size": 8, "num_classes": 10, "depth": 3, "dim": 32, "num_heads": 4}
TINY |= {"qkv_tokens": 24, "proj_tokens": 20, "ffn_tokens": 64}
GROWN = {"qkv": 32, "proj": 28, "ffn": 80}


def build(dtype=torch.float64, **changes):
    """A tiny model with weights so large that everything in it matters."""
    torch.manual_seed(0)
    model = TokenFormerViT(ViTConfig(**TINY | changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1:  # not the gain of tau
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def images(model, height=32, width=32, batch=2):
    generator = torch.Generator().manual_seed(1)
    size = (batch, model.config.in_channels, height, width)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(model.patch_embed.proj.weight)
