"""TokenFormer in pure PyTorch: layers, models, growth, import. Knows nothing of Lightning, data or YAML."""

from tokenformer.config import LMConfig
from tokenformer.generation import generate
from tokenformer.growth import grow
from tokenformer.interop import load_official
from tokenformer.language import TokenFormerLM
from tokenformer.pattention import Pattention, pattention

__all__ = ["LMConfig", "Pattention", "TokenFormerLM", "generate", "grow", "load_official", "pattention"]
