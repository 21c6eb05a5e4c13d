"""What a run leaves behind, read without running code of it: any checkpoint, its model, its config, its tokenizer.

A checkpoint is one file, or a folder to which each process has written its part (FSDP2). Both come back as the
dictionary that the one file holds.
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded

from lit_modules.checkpoints.sharded import CURRENT, ShardReader
from lit_modules.checkpoints.validation import find_corruption
from tokenformer.files import SHARDED, is_sharded, wrong_kind


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of `tokenformer fit` in the form of a single file; of a sharded one without the optimizer's state.

    Raises:
        ValueError: for what is corrupted or no checkpoint of this project; says which command reads it.
    """
    head = read_header(path)
    hyper = head.get("hyper_parameters", {})
    if not {"config", "optim"} <= hyper.keys():
        raise ValueError(f"{path} is the checkpoint of another LightningModule: `tokenformer fit` has not written it")
    return head | _sharded_tensors(path) if is_sharded(path) else head


def read_header(path: Path) -> dict[str, Any]:
    """A checkpoint of Lightning; of a sharded one what it says beside its tensors.

    Raises:
        ValueError: as :func:`read_checkpoint`.
    """
    wanted = "wanted is a checkpoint of `tokenformer fit`"
    if not path.is_file() and not is_sharded(path):
        raise wrong_kind(path, wanted)
    if problem := find_corruption(path):
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
    _check_sizes(path, entries)
    state = {
        name.removeprefix(start): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(start) and isinstance(entry, TensorStorageMetadata)
    }
    load_sharded({"state_dict": state}, storage_reader=reader, no_dist=True)
    current = {name.removeprefix(CURRENT): t for name, t in state.items() if name.startswith(CURRENT)}
    weights = {name: t for name, t in state.items() if not name.startswith(CURRENT)}
    return {"state_dict": weights} | ({"current_model_state": current} if current else {})


def _check_sizes(folder: Path, entries: dict[str, Any]) -> None:
    tensors = [entry for entry in entries.values() if isinstance(entry, TensorStorageMetadata)]
    size = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors)
    held = sum(file.stat().st_size for file in folder.iterdir())
    if size > held:
        raise ValueError(f"{folder}: its index is of tensors of {size:,} bytes, its files have {held:,}: corrupted")


def run_dir_of(path: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint (RUN/checkpoints/NAME.ckpt); None where it is not there."""
    run = path.absolute().parent.parent
    return run if (run / "config.yaml").is_file() else None


def config_of(path: Path) -> dict[str, Any]:
    """The config of the run that wrote a checkpoint; empty where it is not beside it.

    Raises:
        ValueError: for one that is corrupted.
    """
    run = run_dir_of(path)
    if run is None:
        return {}
    try:
        return dict(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{run / 'config.yaml'}: corrupted, it is no YAML of a run: restore it") from error
