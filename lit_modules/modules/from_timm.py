"""timm's models, for the images and classes of a config."""

from difflib import get_close_matches
from typing import Any

import timm
import torch
from torch import nn

from tokenformer import ViTConfig

WEIGHTS = ("pretrained", "checkpoint_path")  # timm's arguments that read some


def check_name(name: str, setting: str) -> None:
    """Whether timm has a model of this name.

    Raises:
        ValueError: if not; `setting` says where the name was given.
    """
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models())
        hint = f": did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"{setting}={name!r}: timm has no such model{hint}")


def create(name: str, args: dict[str, Any], config: ViTConfig, setting: str = "model.timm_model") -> nn.Module:
    """A model of timm's; on `meta` without reading weights.

    Args:
        name: of the model.
        args: of `timm.create_model`; they win over the config.
        config: says `num_classes`, `in_channels` and `image_size`.
        setting: where the name was given, for the error.

    Raises:
        ValueError: for arguments and weights that don't fit.
    """
    options: dict[str, Any] = {"num_classes": config.num_classes, "in_chans": config.in_channels} | args
    if torch.get_default_device().type == "meta":
        options = {name: value for name, value in options.items() if name not in WEIGHTS}
    for sized in ({"img_size": config.image_size}, {}):  # a convolutional model takes any size and no such argument
        try:
            return timm.create_model(name, **sized | options)
        except TypeError as error:
            problem: Exception = error
        except (RuntimeError, OSError) as error:  # of weights
            problem = error
            break
    raise ValueError(f"{setting}={name!r} with {options}: {str(problem) or 'no such file'}")
