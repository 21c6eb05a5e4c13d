"""Sharded checkpoints: folders to which each process has written its part."""

import pickle
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from tokenformer.files import SHARDED


def missing_part(path: Path) -> str | None:
    """What is wrong with a sharded checkpoint, by its index and the sizes of its files; None if nothing is."""
    if not zipfile.is_zipfile(path / SHARDED):  # is written last
        return f"its {SHARDED} is not there, or truncated"
    try:
        parts = ShardReader(path).read_metadata().storage_data.values()
    except Exception as error:  # a damaged pickle raises whatever it stumbles over
        return f"its index .metadata is not there, or damaged ({error})"
    ends: dict[str, int] = {}
    for part in parts:
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    sizes = {name: (path / name).stat().st_size if (path / name).is_file() else 0 for name in ends}
    return next((f"its part {name} is truncated" for name, end in ends.items() if sizes[name] < end), None)


class ShardReader(FileSystemReader):
    """FileSystemReader that reads its index, a pickle, without running code; the tensors' files it reads so anyway.

    Raises:
        ValueError: for an index that names what is no part of one.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: D102
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Knows the classes of such an index, and no others."""

    KNOWN: ClassVar = {
        "torch.distributed.checkpoint.metadata": (
            "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties "
            "TensorStorageMetadata _MEM_FORMAT_ENCODING"
        ),
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch.serialization": "_get_layout",
        "torch": "Size",
        "pathlib": "PosixPath WindowsPath",
        "pathlib._local": "PosixPath WindowsPath",
        "collections": "OrderedDict",
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in self.KNOWN.get(module, "").split():
            raise ValueError(f"the checkpoint's .metadata names {module}.{name}, which is not part of a checkpoint")
        return super().find_class(module, name)
