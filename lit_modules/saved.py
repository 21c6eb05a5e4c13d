"""What a run leaves behind, read without running code of it: any checkpoint, its model, its config, its tokenizer.

A checkpoint is one file, or a folder to which each process has written its part (FSDP2). Both come back as the
dictionary that the one file holds.
"""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded

from datamodules.text import TextDataModule
from datamodules.tokenizer import Tokenizer, load_tokenizer
from lit_modules.checkpoint_files import damage
from lit_modules.fsdp2 import CURRENT
from lit_modules.language import LanguageModule
from lit_modules.sharded import ShardReader
from lit_modules.tokenizer_files import write_tokenizer_files
from lit_modules.vision import VisionModule
from tokenformer import TokenFormerLM, TokenFormerViT, from_pretrained
from tokenformer.files import SHARDED, is_exported, is_sharded, wrong_kind

Weights = Literal["average", "raw"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def load_saved(path: Path, weights: Weights = "average") -> TokenFormerLM | TokenFormerViT:
    """The model in a checkpoint or in an exported folder, in eval mode.

    Args:
        path: the file or folder.
        weights: of a checkpoint that has both (EMA): their average, or the weights themselves.

    Raises:
        ValueError: for what is neither, is damaged, or is a timm model's.
    """
    return from_pretrained(path) if is_exported(path) else model_of(read_checkpoint(path), weights)


def model_of(checkpoint: dict[str, Any], weights: Weights = "average") -> TokenFormerLM | TokenFormerViT:
    """The model in a checkpoint that has been read; see :func:`load_saved`."""
    if weights not in get_args(Weights):
        raise ValueError(f"weights={weights!r}: choose average or raw")
    raw = weights == "raw" and "current_model_state" in checkpoint
    model: Any = module_of(checkpoint, "current_model_state" if raw else "state_dict").model
    return model


def module_of(checkpoint: dict[str, Any], key: str = "state_dict") -> LanguageModule | VisionModule:
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
    module.configure_model()
    module.restore_growth(checkpoint[key], checkpoint.get("growths", []))
    dtype = next(tensor.dtype for name, tensor in checkpoint[key].items() if name.startswith("model."))
    module.to(dtype).load_state_dict(checkpoint[key])
    return module.eval()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of `tokenformer fit` in the form of a single file; of a sharded one without the optimizer's state.

    Raises:
        ValueError: for what is damaged or no checkpoint of this project; says which command reads it.
    """
    head = read_head(path)
    hyper = head.get("hyper_parameters", {})
    if not {"config", "optim"} <= hyper.keys():
        raise ValueError(f"{path} is the checkpoint of another LightningModule: `tokenformer fit` has not written it")
    return head | _sharded_tensors(path) if is_sharded(path) else head


def read_head(path: Path) -> dict[str, Any]:
    """A checkpoint of Lightning; of a sharded one what it says beside its tensors.

    Raises:
        ValueError: as :func:`read_checkpoint`.
    """
    wanted = "wanted is a checkpoint of `tokenformer fit`"
    if not path.is_file() and not is_sharded(path):
        raise wrong_kind(path, wanted)
    if problem := damage(path):
        raise ValueError(f"{path}: {problem}") if path.suffix == ".ckpt" else wrong_kind(path, wanted)
    head: Any = torch.load(path / SHARDED if path.is_dir() else path, "cpu", weights_only=True, mmap=True)
    if not isinstance(head, dict) or "pytorch-lightning_version" not in head or is_sharded(path.parent):
        raise (
            wrong_kind(path, wanted) if path.suffix != ".ckpt" else ValueError(f"{path} is no checkpoint of Lightning")
        )
    return head


def _sharded_tensors(path: Path) -> dict[str, Any]:
    """The weights in a sharded checkpoint, and those beside an average, by the keys of a single file."""
    reader = ShardReader(path)
    entries = reader.read_metadata().state_dict_metadata
    start = "state_dict."
    state = {
        name.removeprefix(start): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(start) and isinstance(entry, TensorStorageMetadata)
    }
    load_sharded({"state_dict": state}, storage_reader=reader, no_dist=True)
    current = {name.removeprefix(CURRENT): t for name, t in state.items() if name.startswith(CURRENT)}
    weights = {name: t for name, t in state.items() if not name.startswith(CURRENT)}
    return {"state_dict": weights} | ({"current_model_state": current} if current else {})


def run_of(path: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint (RUN/checkpoints/NAME.ckpt); None where it is not there."""
    run = path.absolute().parent.parent
    return run if (run / "config.yaml").is_file() else None


def config_of(path: Path) -> dict[str, Any]:
    """The config of the run that wrote a checkpoint; empty where it is not beside it."""
    run = run_of(path)
    return yaml.safe_load((run / "config.yaml").read_text()) if run else {}


def tokenizer_of(path: Path, given: str | None = None) -> Tokenizer:
    """The tokenizer of an exported language model, or of the run that wrote a checkpoint.

    Args:
        path: the folder or the checkpoint.
        given: in place of that: bytes, the path of a tokenizer.json or hub:NAME.

    Raises:
        ValueError: when it is not to be had.
    """
    if given is not None:
        return load_tokenizer(given)
    if (path / "tokenizer.json").is_file():
        return load_tokenizer(str(path / "tokenizer.json"))
    data = config_of(path).get("data", {})
    if data.get("class_path", "").rsplit(".", 1)[-1] != TextDataModule.__name__:
        raise ValueError(
            f"{path}: has no tokenizer.json, nor is it in a run whose config.yaml names one: give one by --tokenizer"
        )
    return TextDataModule(**data["init_args"]).tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """Write a tokenizer as `tokenizer.json`, and beside it what transformers wants to know of it."""
    tokenizer.save(folder / "tokenizer.json")
    write_tokenizer_files(folder, tokenizer.end_of_text, max_seq_len)
