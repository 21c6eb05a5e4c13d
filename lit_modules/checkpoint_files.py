"""Checkpoints that are whole or not there: how they are written, what is wrong with one, the newest whole one.

A checkpoint is a file, or a folder to which each process writes its part. It is written beside its place, under a name
that ends in `.partial`, brought to the disk, and renamed. A folder has a manifest of the sizes and checksums of its
files, which is written last; a file is a zip archive, which has its own.
"""

import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lit_modules.errors import chain
from tokenformer.files import SHARDED

PARTIAL = ".partial"
MANIFEST = "manifest.json"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves so that a kill or a full disk leaves the checkpoints that are there.

    None is removed before its successor is whole. A save that the disk refuses is left out with a warning, and the
    training goes on to the next one.

    Args:
        asynchronous: return when the contents are copied to the host's memory, and write them while the training goes
            on. The next save waits for it.

    Attributes:
        failure: of the last save; None if it was written.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        super().__init__()
        self.asynchronous = asynchronous
        self.failure: str | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[Path, Future[Exception | None]] | None = None
        self._superseded: list[Path] = []  # to be removed when the save that is under way is whole

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save, or begin to, when the save before has come to its end."""
        self.wait()
        path = Path(path)
        if self.asynchronous:
            self._writing = path, self._writer.submit(self._write, _on_host(checkpoint), path)
        else:
            self.settle(path, self._write(checkpoint, path))

    def _write(self, checkpoint: dict[str, Any], path: Path) -> Exception | None:
        try:
            write_checkpoint(checkpoint, path)
        except Exception as error:
            return error
        return None

    def settle(self, path: Path, error: Exception | None) -> None:
        """Take note of how a save went. Raises what went wrong, unless it is the disk that refused."""
        if error is None:
            self.failure = None
            self._superseded = [old for old in self._superseded if old != path]
            self._remove_superseded()
            return
        if (cause := disk_error(error)) is None:
            raise error
        self.failure = f"checkpoint {path} could not be written: {cause.strerror} (errno {cause.errno})"
        rank_zero_warn(f"{self.failure}. The training goes on to the next save: make room")

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file; FSDP2 loads folders itself."""
        if Path(path).is_dir():
            raise ValueError(f"{path} is a sharded checkpoint: go on with it by --trainer.strategy fsdp2")
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove one that a newer one replaces, when that is whole."""
        self._superseded.append(Path(path))
        if self._writing is None:
            self._remove_superseded()

    def _remove_superseded(self) -> None:
        if self.failure is None:
            for path in self._superseded:
                remove(path)
            self._superseded.clear()

    def wait(self) -> None:
        """Until what is being written is written; see :meth:`settle`."""
        if self._writing is not None:
            (path, writing), self._writing = self._writing, None
            self.settle(path, writing.result())

    def teardown(self) -> None:
        """End of the run."""
        self.wait()


def _on_host(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy in the host's memory; tensors that share theirs (tied weights) still do."""
    copies: dict[Any, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if place not in copies or not tensor.numel():
            copies[place] = tensor.detach().to("cpu", copy=True)
        return copies[place]

    return apply_to_collection(checkpoint, Tensor, copy)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial_of(path).open("wb") as file:
            torch.save(checkpoint, file)
        publish(path)
    except Exception:
        discard(partial_of(path))
        raise


def partial_of(path: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return path.with_name(path.name + PARTIAL)


def publish(path: Path) -> None:
    """Bring what was written beside a checkpoint's place to the disk, and give it its name."""
    partial = partial_of(path)
    for written in [*partial.iterdir(), partial] if partial.is_dir() else [partial]:
        _sync(written)
    if path.is_dir() or (partial.is_dir() and path.exists()):  # which can't be replaced in one go
        remove(path)
    partial.replace(path)
    _sync(path.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint so that a kill leaves no half of it under its name."""
    if path.exists():
        gone = path.with_name(path.name + ".old" + PARTIAL)
        path.replace(gone)
        discard(gone)


def discard(path: Path) -> None:
    """Remove a file or a folder, whole or not."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # several processes may
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves have left."""
    for path in folder.glob(f"*{PARTIAL}"):
        discard(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def disk_error(error: BaseException) -> OSError | None:
    """The error of the file system behind another one, if it is one."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else []
    causes = [cause for start in (error, *(failure for failure, _ in failures)) for cause in chain(start)]
    return next((cause for cause in causes if isinstance(cause, OSError) and cause.errno is not None), None)


def newest_whole(paths: Iterable[Path]) -> Path | None:
    """The newest checkpoint that is undamaged; damaged newer ones are passed over with a warning."""
    for path in sorted(paths, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        if problem := damage(path):
            warnings.warn(f"checkpoint {path} is passed over: {problem}", stacklevel=2)
        else:
            return path
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its checksums and by what it would load; None if nothing is."""
    if path.is_dir():
        return _damage_of_folder(path) or _code_in(path / SHARDED)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        return f"truncated or not a checkpoint ({error})"
    return f"its part {broken} is damaged" if broken else _code_in(path)


def _damage_of_folder(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"half-written or not a checkpoint (it has no readable {MANIFEST})"
    for name, (size, crc) in manifest.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return f"its part {name} is truncated or missing"
        if _crc(file) != crc:
            return f"its part {name} is damaged"
    return None


def _code_in(path: Path) -> str | None:
    """Whether more than tensors and plain values would be loaded. Nothing of it is run."""
    try:
        torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|[Uu]nsupported (?:class|operand|global).*?) ([\w.]+)", str(error))
        return f"it holds code ({found[1] if found else 'not named'}), which is never run"
    except RuntimeError:
        return "it is another kind of zip file"
    return None
