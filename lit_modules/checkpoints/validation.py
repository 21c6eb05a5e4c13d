"""What is wrong with a checkpoint, and the newest one with which nothing is.

A checkpoint is a file, a zip archive with checksums of its own; or a folder to which each process has written its
shard, with a manifest of the sizes and checksums of its files.
"""

import json
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tokenformer.files import SHARDED, claims_more, newest_first, step_in_name, unpacks_to_more

MANIFEST = "manifest.json"


def latest_valid(paths: Iterable[Path]) -> Path | None:
    """The newest checkpoint that is valid; corrupted newer ones are passed over with a warning."""
    for path in newest_first(paths, step_of):
        if problem := find_corruption(path):
            warnings.warn(f"checkpoint {path} is passed over: {problem}", stacklevel=2)
        else:
            return path
    return None


def step_of(path: Path) -> int:
    """Optimizer steps before a checkpoint: as its name says, or else what is in it; -1 where nothing can be read."""
    if (step := step_in_name(path)) >= 0 or find_corruption(path):
        return step
    head: Any = torch.load(path / SHARDED if path.is_dir() else path, "meta", weights_only=True, mmap=True)
    return int(head.get("global_step", -1)) if isinstance(head, dict) else -1


def find_corruption(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its checksums and by what it would load; None if nothing is."""
    if path.is_dir():
        return _corrupted_shard(path) or _unsafe_content(path / SHARDED)
    try:
        if problem := unpacks_to_more(path):
            return problem
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        return f"truncated or not a checkpoint ({error})"
    return f"its part {broken} is corrupted" if broken else _unsafe_content(path)


def _corrupted_shard(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"half-written or not a checkpoint (it has no readable {MANIFEST})"
    for name, (size, crc) in manifest.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return f"its part {name} is truncated or missing"
        if _crc(file) != crc:
            return f"its part {name} is corrupted"
    return None


def _unsafe_content(path: Path) -> str | None:
    """Whether more than tensors and plain values would be loaded. Nothing of it is run."""
    try:
        if problem := unpacks_to_more(path):
            return problem
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|[Uu]nsupported (?:class|operand|global).*?) ([\w.]+)", str(error))
        return f"it holds code ({found[1] if found else 'not named'}), which is never run"
    except (RuntimeError, zipfile.BadZipFile):
        return "it is another kind of zip file"
    return claims_more(content, path)


def checksums(folder: Path, rank: int) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of the files in a folder that this process has written, for its manifest."""
    patterns = [f"__{rank}_*", *([".metadata", SHARDED] if rank == 0 else [])]  # as torch and Lightning name them
    files = [file for pattern in patterns for file in folder.glob(pattern)]
    return {file.name: (file.stat().st_size, _crc(file)) for file in files}


def write_manifest(folder: Path, checksums: Iterable[dict[str, tuple[int, int]]]) -> None:
    """Write the manifest of a folder from what each process has found."""
    manifest = {name: entry for found in checksums for name, entry in found.items()}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=0) + "\n")


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as content:
        while block := content.read(2**22):
            crc = zlib.crc32(block, crc)
    return crc
