"""TokenFormerViT in timm's registry: after `import tokenformer`, `timm.create_model` knows the names below.

Arguments are timm's (`num_classes`, `img_size`, `in_chans`, `global_pool`, `drop_path_rate`, `features_only`, ...)
and the other fields of ViTConfig by their names (`ffn_tokens`, `scale`, `baseline`, ...). No weights are published.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model

from tokenformer.config import ViTConfig

if TYPE_CHECKING:
    from tokenformer.vision import TokenFormerViT

# "matched": with as many parameters as the ViT of that width (86.6M, 304.3M), which the paper marks with a dagger. The
# others have as many tokens as channels, four times that in the feed-forward layer, and a third more in the blocks.
SIZES = {  # depth, dim, heads, tokens of query, key, value and out, tokens of the feed-forward layer
    "tokenformer_vit_tiny_patch16_224": (12, 192, 3, 192, 768),  # 7.5M, not in the paper; see ViT-Ti/16, 5.7M
    "tokenformer_vit_small_patch16_224": (12, 384, 6, 384, 1536),  # 29.1M, not in the paper; see ViT-S/16, 22.1M
    "tokenformer_vit_base_matched_patch16_224": (12, 768, 12, 576, 2304),  # 86.4M; paper: 86M
    "tokenformer_vit_base_patch16_224": (12, 768, 12, 768, 3072),  # 114.8M; paper: 109M, which these sizes don't give
    "tokenformer_vit_large_matched_patch16_224": (24, 1024, 16, 768, 3072),  # 304.0M; paper: 307M, and 768 for the 3072
    "tokenformer_vit_large_patch16_224": (24, 1024, 16, 1024, 4096),  # 404.7M; paper: 407M
}
SIZE_NAMES = ("depth", "dim", "num_heads", "qkv_tokens", "proj_tokens", "ffn_tokens")

# timm's argument for each field of the config.
TIMM_NAMES = {"image_size": "img_size", "in_channels": "in_chans", "pool": "global_pool", "drop_path": "drop_path_rate"}
FIELD_OF = {TIMM_NAMES.get(field.name, field.name): field.name for field in fields(ViTConfig)}

INPUT = ("input_size", "interpolation", "crop_pct", "mean", "std")  # what evaluation does to an image, in timm's words

default_cfgs = {  # where `register_model` looks for them
    name: {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "crop_pct": 0.875,  # the paper's recipe, MAE's: resize to 256, crop 224
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    for name in SIZES
}


def square(img_size: int | Sequence[int]) -> int:
    """Height and width of an image, from one number or two equal ones.

    Raises:
        ValueError: where they differ.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if height != width:
        raise ValueError(f"img_size={img_size}: positions are of square images; call the model with others as they are")
    return height


def build(
    img_size: int | Sequence[int] = 224,
    drop_rate: float = 0.0,
    global_pool: str = "token",
    dynamic_img_size: bool = True,
    device: Any = None,
    dtype: Any = None,
    **arguments: Any,
) -> "TokenFormerViT":
    """A model from timm's arguments.

    Args:
        img_size: height and width, one number or two equal ones.
        drop_rate: timm's scripts give it always; must be 0.
        global_pool: token, avg, or "" for a model with a class token that pools nothing.
        dynamic_img_size: must be true: every model takes images of other sizes.
        device: for the model.
        dtype: of the model.
        arguments: see `FIELD_OF`.

    Raises:
        ValueError: for sizes that the config refuses, an image that is not square, dropout, other pooling.
        TypeError: for unknown arguments.
    """
    if unknown := arguments.keys() - FIELD_OF.keys():
        raise TypeError(f"unknown arguments {', '.join(sorted(unknown))}: choose from {', '.join(FIELD_OF)}")
    if drop_rate:
        raise ValueError(f"drop_rate={drop_rate}: the model has no dropout; drop_path_rate is stochastic depth")
    if not dynamic_img_size:
        raise ValueError("dynamic_img_size=False: the model takes images of any whole number of patches; leave it out")
    from tokenformer.vision import TokenFormerViT  # imports timm, during whose import this module is run

    arguments |= {"img_size": square(img_size), "global_pool": global_pool or "token"}
    config = ViTConfig(**{FIELD_OF[name]: value for name, value in arguments.items()})
    with nullcontext() if device is None else torch.device(device):
        model = TokenFormerViT(config).to(dtype=dtype)
    model.global_pool = global_pool
    return model


def folder_config(config: ViTConfig, described: Mapping[str, Any]) -> dict[str, Any]:
    """What timm reads of an exported model's config.json: how to build it, its input, the names of its classes.

    Args:
        config: at the present size.
        described: its `pretrained_cfg` as far as that is known, of which the keys of `INPUT` and `label_names` are
            taken. What is missing is the default of our models.
    """
    sizes = {name: getattr(config, name) for name in SIZE_NAMES}
    other = {field.name: getattr(config, field.name) for field in fields(ViTConfig) if field.name not in sizes}
    other = {name: value for name, value in other.items() if value != getattr(ViTConfig, name)}
    architecture, cfg = next(iter(default_cfgs.items()))
    cfg = cfg | {"input_size": (config.in_channels, config.image_size, config.image_size)}
    cfg |= {name: described[name] for name in INPUT if name in described} | {"num_classes": config.num_classes}
    if len(names := described.get("label_names") or ()) == config.num_classes > 0:  # not those of an earlier classifier
        cfg |= {"label_names": list(names)}
    arguments = {TIMM_NAMES.get(name, name): value for name, value in (sizes | other).items()}
    return {"architecture": architecture, "model_args": arguments, "pretrained_cfg": cfg}


def transformers_config(cfg: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What transformers reads of a `pretrained_cfg`: names of classes, and preprocessor_config.json.

    The latter is for tools that know no timm, and crops half a pixel off where a margin is odd; AutoImageProcessor does
    what timm does. It is None for images that are not RGB, which CLIP's processor does not make.
    """
    names = cfg.get("label_names", ())
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    channels, height, width = cfg["input_size"]
    processor = {
        "image_processor_type": "CLIPImageProcessor",  # resizes the shorter side, crops the middle, as timm does
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": math.floor(height / cfg["crop_pct"])},
        "resample": {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[cfg["interpolation"]],  # Pillow's numbers
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(cfg["mean"]),
        "image_std": list(cfg["std"]),
    }
    return labels if names else {}, processor if channels == 3 else None


def entrypoint(name: str, sizes: dict[str, int]) -> Callable[..., Any]:
    """What `timm.create_model` calls for a name."""

    def create(pretrained: bool = False, **arguments: Any) -> Any:
        features = {"out_indices": 3, "feature_cls": "getter"}  # the last three blocks, as in timm's own ViT
        return build_model_with_cfg(build, name, pretrained, feature_cfg=features, **(sizes | arguments))

    create.__name__ = create.__qualname__ = name
    return create


for name, (depth, dim, num_heads, tokens, ffn_tokens) in SIZES.items():
    sizes = dict(zip(SIZE_NAMES, (depth, dim, num_heads, tokens, tokens, ffn_tokens), strict=True))
    globals()[name] = register_model(entrypoint(name, sizes))
