"""The model in a checkpoint or in an exported folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lit_modules.checkpoints.reading import read_checkpoint
from lit_modules.growth.structure import match_structure
from lit_modules.modules.language import LanguageModule
from lit_modules.modules.vision import VisionModule
from tokenformer import TokenFormerLM, TokenFormerViT, from_pretrained
from tokenformer.adapters import add_adapters
from tokenformer.files import check_size, is_exported

Weights = Literal["average", "raw"]

# `--adapter` of the commands that take a model.
ADAPTER_OPTION: Any = {
    "action": "append",
    "default": [],
    "metavar": "FILE[=WEIGHT]",
    "help": "put this adapter on the model; several times too",
}

# `--int8` of those that do not change it.
INT8_OPTION: Any = {
    "action": "store_true",
    "help": "keep the weights of all blocks in int8, a quarter of float32's memory (tokenformer.int8)",
}


def load_model(
    path: Path, weights: Weights = "average", adapters: Sequence[str] = ()
) -> TokenFormerLM | TokenFormerViT:
    """The model in a checkpoint or in an exported folder, in eval mode.

    Args:
        path: the file or folder.
        weights: of a checkpoint that has both (EMA): their average, or the weights themselves.
        adapters: files to put on it, see :func:`tokenformer.adapters.add_adapters`.

    Raises:
        ValueError: for what is neither, is corrupted, or is a timm model's; for adapters of another model.
    """
    model = from_pretrained(path) if is_exported(path) else model_from_checkpoint(read_checkpoint(path), weights)
    add_adapters(model, path, adapters)
    return model


def model_from_checkpoint(checkpoint: dict[str, Any], weights: Weights = "average") -> TokenFormerLM | TokenFormerViT:
    """The model in a checkpoint that has been read; see :func:`load_model`."""
    if weights not in get_args(Weights):
        raise ValueError(f"weights={weights!r}: choose average or raw")
    raw = weights == "raw" and "current_model_state" in checkpoint
    model: Any = module_from_checkpoint(checkpoint, "current_model_state" if raw else "state_dict").model
    return model


def module_from_checkpoint(checkpoint: dict[str, Any], key: str = "state_dict") -> LanguageModule | VisionModule:
    """The module in a checkpoint, grown as it was; `key` says which of its weights."""
    hyper = checkpoint["hyper_parameters"]
    if "patch_size" in hyper["config"]:
        if hyper["timm_model"] is not None:
            raise ValueError(
                f"{hyper['timm_model']} is a timm model, without parameter tokens: timm reads and saves it"
            )
        module: Any = VisionModule(hyper["config"], hyper["optim"])
    else:
        module = LanguageModule(hyper["config"], hyper["optim"])
    check_size(module.config, checkpoint[key], "the checkpoint")
    module.configure_model()
    match_structure(module, checkpoint[key], checkpoint.get("growths", []))
    dtype = next(tensor.dtype for name, tensor in checkpoint[key].items() if name.startswith("model."))
    module.to(dtype).load_state_dict(checkpoint[key])
    return module.eval()
