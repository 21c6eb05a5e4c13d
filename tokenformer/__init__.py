"""TokenFormer in pure PyTorch: layers, models, growth, import. Knows nothing of Lightning, data or YAML."""

import tokenformer.timm_models  # noqa: F401 - puts the image models in timm's registry
from tokenformer.config import LMConfig, ViTConfig
from tokenformer.generation import generate
from tokenformer.growth import grow
from tokenformer.interop import from_pretrained, save_pretrained
from tokenformer.language import TokenFormerLM
from tokenformer.pattention import Pattention, pattention
from tokenformer.released import load_official
from tokenformer.vision import TokenFormerViT

__all__ = [
    "LMConfig",
    "Pattention",
    "TokenFormerLM",
    "TokenFormerViT",
    "ViTConfig",
    "from_pretrained",
    "generate",
    "grow",
    "load_official",
    "pattention",
    "save_pretrained",
]
