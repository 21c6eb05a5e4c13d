"""What lies at a path, told by names and neighbours, for whoever gave the wrong thing; what may be built of it."""

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from tokenformer.config import LMConfig, ViTConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # of an exported model's folder
INDEX = f"{WEIGHTS}.index.json"  # in place of the weights, where transformers has divided them into several files
PROCESSOR = "preprocessor_config.json"  # of an image model's, for transformers
RELEASED_WEIGHTS = ("pytorch_model.bin", "model.safetensors")  # of a released checkpoint's; or shards and their index
SHARDED = "meta.pt"  # what Lightning writes into the folder of a sharded checkpoint


def wrong_kind(path: str | Path, wanted: str) -> ValueError:
    """The error of a path that should have been something else; says what it is and which command reads it."""
    path = Path(path)
    return ValueError(f"{path}: no such file or folder" if not path.exists() else f"{path} is {kind(path)}; {wanted}")


def kind(path: Path) -> str:
    """What lies at a path, and what to do with it."""
    if is_exported(path):
        return "an exported model, for `tokenformer generate`, `evaluate`, `grow` and `fit --model.init_from`"
    if is_exported(path.parent):
        return f"a part of the exported model {path.parent}: give that folder"
    if path.suffix == ".ckpt" or is_sharded(path):
        return f"a checkpoint of a training: `tokenformer export {path} --out DIR` makes an exported model of it"
    if is_sharded(path.parent):
        return f"a part of the sharded checkpoint {path.parent}: give that folder"
    if inside := [found for start in ("", "checkpoints/", "*/checkpoints/") for found in path.glob(f"{start}*.ckpt")]:
        return f"a folder with checkpoints of a training: give one of them, the newest is {newest_first(inside)[0]}"
    if is_zero(path):
        return (
            "a DeepSpeed ZeRO checkpoint in parts: make them one file by the script that lies in it, "
            f"`cd {path} && python zero_to_fp32.py . pytorch_model.bin`, and `tokenformer import` that"
        )
    if path.suffix in (".yaml", ".yml"):
        return f"a config: `tokenformer fit --config {path}` trains by it"
    if path.suffix in (".bin", ".safetensors", ".pt", ".pth") or has_weights(path):
        return f"weights alone: `tokenformer import {path} --out DIR` reads those of a released checkpoint"
    return "neither a checkpoint nor an exported model nor a released checkpoint"


def step_in_name(path: Path) -> int:
    """The step that a checkpoint's name has; -1 for none."""
    named = re.search(r"step[-=](\d+)", path.name)
    return int(named[1]) if named else -1


def newest_first(checkpoints: Iterable[Path], step_of: Callable[[Path], int] = step_in_name) -> list[Path]:
    """Those of the run that was saved to last, the most steps first; then those of the run before it.

    Within a run, times say little: a folder that was copied or restored has others.
    """
    age = {path: path.stat().st_mtime_ns for path in checkpoints}
    last = {run: max(age[path] for path in age if path.parent == run) for run in {path.parent for path in age}}
    return sorted(age, key=lambda path: (last[path.parent], str(path.parent), step_of(path), age[path]), reverse=True)


def unpacks_to_more(path: Path) -> str | None:
    """Why an archive is not to be unpacked: it is larger inside than outside, unlike those of torch. None if it may be.

    Raises:
        OSError, BadZipFile: for what is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if packed := [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]:
        return f"its part {packed[0]} is compressed, which torch never does: it may be of any size"
    size, held = sum(part.file_size for part in parts), path.stat().st_size
    return f"its parts, {size:,} bytes, are larger than the file, {held:,} bytes" if size > held else None


def claims_more(content: Any, path: Path) -> str | None:
    """What is wrong with a file whose tensors, memory-mapped or on `meta`, are larger than their numbers in it."""
    tensors = [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    too_large = any(tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes() for tensor in tensors)
    if too_large or sum(storages.values()) > path.stat().st_size:
        return "its tensors are larger than what it holds of them"
    return None


def check_size(config: LMConfig | ViTConfig, tensors: Mapping[str, Tensor], source: object, width: int = 1) -> None:
    """Refuse a config whose model would be far larger than the weights beside it, before it is built.

    Args:
        config: of the model, `width` times as wide as it says.
        tensors: the weights, of the model as it is now or larger.
        source: where both come from, for the error.
        width: at least 1.

    Raises:
        ValueError: with both sizes.
    """
    held = sum(tensor.numel() for tensor in tensors.values())
    size = width * config.num_params()
    positions = config.num_tokens() * config.dim if isinstance(config, ViTConfig) else 0  # made, not read, if fixed
    if max(size, positions) > 2 * held + 2**20:  # what is near, loading names by its tensors
        raise ValueError(
            f"{source}: its config is of a model of {size:,} parameters, its weights have {held:,}: they do not belong "
            "together"
        )


def is_exported(path: Path) -> bool:
    """Whether it is a folder with a model's config and weights, ours or not."""
    return (path / CONFIG).is_file() and any((path / name).is_file() for name in (WEIGHTS, INDEX))


def is_sharded(path: Path) -> bool:
    """Whether it is a checkpoint to which each process has written its part."""
    return (path / SHARDED).is_file()


def is_zero(path: Path) -> bool:
    """Whether it is what DeepSpeed ZeRO has written, each process its part."""
    return (path / "zero_to_fp32.py").is_file() or any(path.glob("**/*zero_pp_rank_*"))


def has_weights(path: Path) -> bool:
    """Whether it is a folder with a file of weights, or the index of its shards."""
    return any((path / f"{name}{end}").is_file() for name in RELEASED_WEIGHTS for end in ("", ".index.json"))


def shards(index: Path) -> list[Path]:
    """The files of weights beside their index.

    Raises:
        ValueError: when it is corrupted, or some are not there.
    """
    try:
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if outside := [name for name in listed if not isinstance(name, str) or not name or Path(name).name != name]:
            raise ValueError(f"it names {outside[0]!r}, which is no file beside it")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: corrupted, it has no weight_map: {error}") from error
    files = [index.with_name(name) for name in sorted(listed)]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index} names files that are not there: {', '.join(absent)}")
    return files
