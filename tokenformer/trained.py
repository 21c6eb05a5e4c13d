"""Models in the checkpoints of a training, of `tokenformer fit` (.ckpt) or of timm's train.py (.pth.tar).

They are read without running code. A checkpoint in parts, and one whose model was widened, has to be exported first.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenformer.config import LMConfig, ViTConfig
from tokenformer.files import check_size, claims_more, unpacks_to_more, wrong_kind
from tokenformer.language import TokenFormerLM
from tokenformer.timm_models import FIELD_OF, INPUT, SIZES
from tokenformer.vision import TokenFormerViT


def read_trained(path: Path) -> tuple[TokenFormerLM | TokenFormerViT, dict[str, Tensor]]:
    """The model in a checkpoint, still without its weights, and its state dict: the average where there is one.

    Raises:
        ValueError: for what is no such checkpoint, is corrupted, or has a model that is not ours.
    """
    if not path.is_file() or path.suffix not in (".ckpt", ".tar"):
        raise wrong_kind(path, "wanted is the folder of an exported model, a .ckpt in one file or timm's .pth.tar")
    try:
        if problem := unpacks_to_more(path):
            raise ValueError(problem)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's arguments
            saved: Any = torch.load(path, "cpu", weights_only=True, mmap=True)
        if problem := claims_more(saved, path):
            raise ValueError(problem)
    except Exception as error:  # of corrupted files torch.load raises whatever it stumbles over
        raise ValueError(f"{path}: truncated, or no checkpoint: {error}") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("state_dict"), dict):
        raise ValueError(f"{path}: holds no state_dict, so neither `tokenformer fit` nor timm has written it")
    try:
        return _of_timm(saved, path) if "arch" in saved else _of_fit(saved, path)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: corrupted, its tensors or settings are not those of a model: {error!r}") from error


def _of_fit(saved: Mapping[str, Any], path: Path) -> tuple[TokenFormerLM | TokenFormerViT, dict[str, Tensor]]:
    hyper = saved.get("hyper_parameters", {})
    if "config" not in hyper or hyper.get("timm_model"):
        raise ValueError(f"{path}: holds no TokenFormer; its model is {hyper.get('timm_model') or 'another one'}")
    config, start = dict(hyper["config"]), "model."
    tensors = {n.removeprefix(start): t for n, t in saved["state_dict"].items() if n.startswith(start)}
    sizes = ViTConfig(**config) if "patch_size" in config else LMConfig(**config)
    check_size(sizes, tensors, path)
    if isinstance(sizes, LMConfig):
        return TokenFormerLM(sizes), tensors
    model = TokenFormerViT(sizes)
    names = saved.get("class_names")
    model.pretrained_cfg = saved.get("preprocessing", {}) | ({"label_names": names} if names else {})
    return model, tensors


def _of_timm(saved: Mapping[str, Any], path: Path) -> tuple[TokenFormerViT, dict[str, Tensor]]:
    if saved["arch"] not in SIZES:
        raise ValueError(f"{path}: its model is {saved['arch']!r}, not one of {', '.join(SIZES)}")
    tensors = {n.removeprefix("module."): t for n, t in (saved.get("state_dict_ema") or saved["state_dict"]).items()}
    given = vars(saved["args"]) if "args" in saved else {}
    # What shapes don't tell, from the command line of the training; what they do tell, from them.
    known = {field.name for field in fields(ViTConfig)}
    options = {FIELD_OF.get(name, name): value for name, value in (given.get("model_kwargs") or {}).items()}
    block = "backbone.blocks.0."
    dim, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    pool = "token" if "class_token" in tensors else "avg"
    side = given.get("img_size") or 224
    if "position" in tensors:
        side = patch * math.isqrt(tensors["position"].shape[1] - (pool == "token"))
    counts = {"qkv_tokens": "attention.query", "proj_tokens": "attention.out", "ffn_tokens": "ffn"}
    sizes: dict[str, Any] = {
        name: tensors[f"{block}{layer}.segments.0.keys"].shape[0]
        for name, layer in counts.items()
        if f"{block}{layer}.segments.0.keys" in tensors
    }
    sizes |= {"dim": dim, "in_channels": channels, "patch_size": patch, "image_size": side, "pool": pool}
    sizes["depth"] = len({name.split(".")[2] for name in tensors if name.startswith("backbone.blocks.")})
    sizes["num_classes"] = tensors["head.weight"].shape[0] if "head.weight" in tensors else 0
    sizes["position"] = "learned" if "position" in tensors else "sincos"
    sizes["norm_affine"] = f"{block}attention_norm.weight" in tensors
    sizes["attention"] = "differential" if f"{block}attention.lambda_q1" in tensors else "softmax"
    if f"{block}ffn.tau_gain" in tensors:
        sizes["scale"] = "learned"
    options = {"num_heads": SIZES[saved["arch"]][2]} | {n: v for n, v in options.items() if n in known} | sizes
    config = ViTConfig(**options)
    check_size(config, tensors, path)
    model = TokenFormerViT(config)
    model.pretrained_cfg = {name: given[name] for name in INPUT if given.get(name)}
    return model, tensors
