"""`tokenformer predict MODEL ...`: what an image model itself says of its sizes, input and classes, as options.

MODEL is a checkpoint or the folder of an exported model. No config of the run and no training data are needed.
"""

import json
from pathlib import Path
from typing import Any

from lit_modules.checkpoints.reading import config_of, read_header
from tokenformer.files import is_exported

OF_DATA = ("interpolation", "crop_pct", "mean", "std")


def described(checkpoint: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Timm's `pretrained_cfg` of the image model in a checkpoint, as far as it is on record.

    Args:
        checkpoint: of an older version it has no `preprocessing`.
        config: of the run that wrote it, which then tells; may be empty.
    """
    cfg = checkpoint.get("preprocessing")
    if cfg is None:
        data = config.get("data", {}).get("init_args", {})
        cfg = {name: data[name] for name in OF_DATA if name in data}
        if size := data.get("image_size"):
            cfg["input_size"] = [3, size, size]
    names = checkpoint.get("class_names")
    return cfg | ({"label_names": names} if names else {})


def with_model(args: list[str]) -> list[str]:
    """The arguments of `predict`, with a MODEL in front replaced by the options that it stands for.

    Raises:
        ValueError: for what is no model, a language model, and one that does not say what its classes are.
    """
    if not args or args[0].startswith("-"):
        return args
    path, rest = Path(args[0]), args[1:]
    model: dict[str, Any]
    if is_exported(path):
        from tokenformer.interop import read_config, read_json

        config, cfg = vars(read_config(path)), read_json(path).get("pretrained_cfg", {})
        model = {"config": config, "init_from": str(path)}
    else:
        checkpoint = read_header(path)
        hyper = checkpoint.get("hyper_parameters", {})
        config, cfg = hyper.get("config", {}), described(checkpoint, config_of(path))
        model = {name: hyper[name] for name in ("config", "timm_model", "timm_args") if hyper.get(name)}
        rest = ["--ckpt_path", str(path), *rest]
    if "patch_size" not in config:
        raise ValueError(f"{path} is no image model: `predict --config FILE --ckpt_path FILE` reads a language model")
    if "label_names" not in cfg:
        raise ValueError(f"{path} does not say what its classes are called: give --config and --ckpt_path of its run")
    config = {name: value for name, value in config.items() if name != "num_classes"}  # the data's
    data = {name: cfg[name] for name in OF_DATA if name in cfg} | {"class_names": cfg["label_names"]}
    channels, *_, data["image_size"] = cfg.get("input_size", [3, config["image_size"]])
    if channels != 3:
        data["in_channels"] = channels
    given = {"model": ("VisionModule", model | {"config": config}), "data": ("ImageDataModule", data)}
    options = [
        f"--{key}={json.dumps({'class_path': name, 'init_args': arguments})}"
        for key, (name, arguments) in given.items()
    ]
    return ["--name", path.stem, *options, *rest]
