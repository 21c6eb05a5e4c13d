"""Checkpoints that are complete or not there: how they are written and removed.

A checkpoint is a file, or a folder to which each process writes its part. It is written beside its place, under a name
that ends in `.partial`, brought to the disk, and renamed. A folder has a manifest of the sizes and checksums of its
files, which is written last; a file is a zip archive, which has its own.
"""

import errno
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lit_modules.checkpoints.validation import MANIFEST, checksums, write_manifest
from lit_modules.runs.errors import causes
from tokenformer.files import SHARDED

PARTIAL = ".partial"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves so that a kill or a full disk leaves the checkpoints that are there.

    None is removed before its successor is complete. A save that the disk refuses is skipped with a warning, and the
    training continues to the next one.

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
        self._superseded: list[Path] = []  # to be removed when the save that is under way is complete

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save, or begin to, when the save before has come to its end."""
        self.wait()
        path = Path(path)
        if self.asynchronous:
            self._writing = path, self._writer.submit(self._write, _on_host(checkpoint), path)
        else:
            self.finish_save(path, self._write(checkpoint, path))

    def copy_checkpoint(self, source: Path, path: Path, states: dict[str, Any]) -> None:
        """Save once more what is in a checkpoint, with other states of some callbacks."""
        self.wait()
        try:
            copy_checkpoint(source, path, states)
        except Exception as error:
            self.finish_save(path, error)
        else:
            self.finish_save(path, None)

    def _write(self, checkpoint: dict[str, Any], path: Path) -> Exception | None:
        try:
            write_checkpoint(checkpoint, path)
        except Exception as error:
            return error
        return None

    def finish_save(self, path: Path, error: Exception | None) -> None:
        """Take note of how a save went. Raises what went wrong, unless it is the disk that refused."""
        if error is None:
            self.failure = None
            self._superseded = [old for old in self._superseded if old != path]
            self._remove_superseded()
            return
        if (cause := disk_error(error)) is None:
            raise error
        self.failure = f"checkpoint {path} could not be written: {cause.strerror} (errno {cause.errno})"
        rank_zero_warn(f"{self.failure}. The training continues to the next save: make room")

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file; FSDP2 loads folders itself."""
        if Path(path).is_dir():
            raise ValueError(f"{path} is a sharded checkpoint: resume it by --trainer.strategy fsdp2")
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove one that a newer one replaces, when that is complete."""
        self._superseded.append(Path(path))
        if self._writing is None:
            self._remove_superseded()

    def _remove_superseded(self) -> None:
        if self.failure is None:
            for path in self._superseded:
                remove(path)
            self._superseded.clear()

    def wait(self) -> None:
        """Until what is being written is written; see :meth:`finish_save`."""
        if self._writing is not None:
            (path, writing), self._writing = self._writing, None
            self.finish_save(path, writing.result())

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
    """Write a file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial_of(path).open("wb") as file:
            torch.save(checkpoint, file)
        publish(path)
    except Exception:
        discard(partial_of(path))
        raise


def copy_checkpoint(source: Path, path: Path, states: dict[str, Any]) -> None:
    """Write a checkpoint once more under another name, complete or not at all; `states` replace those of callbacks."""
    head = torch.load(source / SHARDED if source.is_dir() else source, "cpu", weights_only=True, mmap=True)
    head["callbacks"] |= states
    if not source.is_dir():
        write_checkpoint(head, path)
        return
    partial = partial_of(path)
    try:
        shutil.copytree(source, partial)
        (partial / SHARDED).unlink()  # what is mapped is not written over
        torch.save(head, partial / SHARDED)
        files = json.loads((source / MANIFEST).read_text())
        write_manifest(partial, [files, {SHARDED: checksums(partial, 0)[SHARDED]}])
        publish(path)
    except shutil.Error as error:  # of several files; it hides the system's own
        discard(partial)
        raise OSError(errno.EIO, str(error)) from error
    except Exception:
        discard(partial)
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
    """Remove a file or a folder, complete or not; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # several processes may
    else:
        path.unlink(missing_ok=True)


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove what interrupted saves have left."""
    for path in folder.glob(f"*{PARTIAL}"):
        discard(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_error(error: BaseException) -> OSError | None:
    """The error of the file system behind another one, if it is one."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else []
    everything = [cause for start in (error, *(failure for failure, _ in failures)) for cause in causes(start)]
    return next((cause for cause in everything if isinstance(cause, OSError) and cause.errno is not None), None)
