"""Sharded checkpoints: folders to which each process has written its part."""

import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

CURRENT = "current_model_state."  # begins the names of the weights in a sharded checkpoint that has their average


class ShardReader(FileSystemReader):
    """FileSystemReader that reads its index, a pickle, without running code; the tensors' files it reads so anyway.

    Raises:
        ValueError: for an index that names what is no part of one, or files elsewhere.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: D102
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        for part in (metadata.storage_data or {}).values():
            if Path(part.relative_path).name != part.relative_path:
                raise ValueError(f".metadata names the file {part.relative_path}, which is not in its folder")
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
