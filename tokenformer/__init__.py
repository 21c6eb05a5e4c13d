"""TokenFormer in pure PyTorch: layers, models, growth, import. Knows nothing of Lightning, data or YAML.

timm takes longer to import than torch. So what needs it is imported when it is first asked for, and the image models
are put in timm's registry when timm is imported.
"""

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from tokenformer.config import LMConfig, ViTConfig
from tokenformer.generation import generate
from tokenformer.growth import grow
from tokenformer.language import TokenFormerLM
from tokenformer.operator import pattention
from tokenformer.pattention import Pattention
from tokenformer.released import load_official

if TYPE_CHECKING:
    from tokenformer.interop import from_pretrained, save_pretrained
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

_LATER = {"TokenFormerViT": "vision", "from_pretrained": "interop", "save_pretrained": "interop"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"tokenformer.{_LATER[name]}"), name)


class _WhenTimmIsImported:
    """Finds timm as Python does, and has our models registered when it has run."""

    @classmethod
    def find_spec(cls, name: str, *_: Any) -> Any:
        if name != "timm":
            return None
        sys.meta_path.remove(cls)  # type: ignore[arg-type]
        try:
            spec: Any = importlib.util.find_spec(name)
        finally:  # it may only have been asked whether timm is there
            sys.meta_path.insert(0, cls)  # type: ignore[arg-type]
        if spec is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                importlib.import_module("tokenformer.timm_models")

            spec.loader.exec_module = run_and_register
        return spec


if "timm" in sys.modules:
    importlib.import_module("tokenformer.timm_models")
else:
    sys.meta_path.insert(0, _WhenTimmIsImported)  # type: ignore[arg-type]
