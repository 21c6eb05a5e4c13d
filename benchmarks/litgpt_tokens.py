"""Our prepared tokens as a data module of litgpt, for `benchmarks/others.py`."""

from pathlib import Path

import numpy as np
import torch
from litgpt.data import DataModule  # type: ignore[import-not-found]
from torch.utils.data import DataLoader, Dataset


class Windows(Dataset[torch.Tensor]):
    """All windows of a file of 16-bit tokens, one after the other, `length` tokens and the next one each."""

    def __init__(self, path: Path, length: int) -> None:
        self.tokens, self.length = np.memmap(path, np.uint16, "r"), length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.length
        return torch.from_numpy(self.tokens[start : start + self.length + 1].astype(np.int64))


class Tokens(DataModule):  # type: ignore[misc]
    """`train.bin` and `val.bin` of a folder.

    Args:
        folder: of the two files.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def connect(self, tokenizer: object = None, batch_size: int = 1, max_seq_length: int = -1) -> None:
        """litgpt's, before the loaders."""
        self.batch_size, self.length = batch_size, max_seq_length

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        """In random order."""
        return DataLoader(Windows(self.folder / "train.bin", self.length), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        """In order."""
        return DataLoader(Windows(self.folder / "val.bin", self.length), self.batch_size)
