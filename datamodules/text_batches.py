"""Batches of token sequences: a shuffled stream to train on, every token once to evaluate. B batch, T sequence."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.loader import IGNORE, Ordered, Stream, StreamLoader
from datamodules.mixtures import mixed_at
from datamodules.sampler import sample_at

Batch = tuple[Tensor, Tensor]  # input_ids (B, T), targets (B, T): the ids one place further on
Texts = list[NDArray[Any]]  # ids of each, (tokens,)


class TrainLoader(StreamLoader):
    """The shuffled stream of sequences. A sample is seq_len + 1 tokens, and the next begins at its last one.

    Of a mixture an epoch is as many samples as its sources have together.
    """

    def __init__(
        self,
        texts: Texts,
        *,
        seq_len: int,
        batch_size: int,
        shares: tuple[int, ...] | None = None,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        sequences = Sequences(texts, shares, seq_len, batch_size, rank, world_size, seed)
        super().__init__(sequences, accumulate, num_workers)


class Sequences(Stream):
    """See :class:`TrainLoader`; `shares` of :func:`datamodules.mixtures.shares_of`, None for one text."""

    def __init__(
        self,
        texts: Texts,
        shares: tuple[int, ...] | None,
        seq_len: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.texts, self.shares, self.seq_len, self.seed = texts, shares, seq_len, seed
        self.sizes = tuple((len(ids) - 1) // seq_len for ids in texts)  # in samples
        super().__init__(sum(self.sizes), batch_size, rank, world_size)

    def __getstate__(self) -> dict[str, Any]:
        """For workers: a memory-mapped file travels as its name, not as its contents."""
        texts = [(ids.filename, ids.dtype) if isinstance(ids, np.memmap) else ids for ids in self.texts]
        return self.__dict__ | {"texts": texts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        texts = [np.memmap(ids[0], ids[1], mode="r") if isinstance(ids, tuple) else ids for ids in state["texts"]]
        self.__dict__.update(state | {"texts": texts})

    def batch_at(self, positions: NDArray[np.int64]) -> Batch:
        """Inputs and targets."""
        if self.shares is None:
            sources, samples = np.zeros_like(positions), sample_at(positions, self.num_samples, self.seed)
        else:
            sources, samples = mixed_at(positions, self.shares, self.sizes, self.seed)
        places = samples[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        rows = np.empty_like(places)
        for source, ids in enumerate(self.texts):
            rows[sources == source] = ids[places[sources == source]]
        sequences = torch.from_numpy(rows)
        return sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()  # (B, T): pinning needs them whole


class OrderedBatches(Ordered):
    """All windows of texts in order, each token a target exactly once; what only fills up has the target IGNORE."""

    def __init__(self, texts: Texts, seq_len: int, batch_size: int, rank: int, world_size: int) -> None:
        self.texts, self.seq_len = texts, seq_len
        self.ends = np.cumsum([-(-(len(ids) - 1) // seq_len) for ids in texts])  # in windows
        super().__init__(int(self.ends[-1]), batch_size, rank, world_size)

    def batch_at(self, positions: NDArray[np.int64]) -> Batch:
        """Inputs and targets."""
        inputs = torch.zeros(len(positions), self.seq_len, dtype=torch.long)
        targets = torch.full_like(inputs, IGNORE)
        for row, position in enumerate(positions[positions < self.num_samples]):
            text = int(np.searchsorted(self.ends, position, side="right"))
            start = (position - (self.ends[text - 1] if text else 0)) * self.seq_len
            window = torch.from_numpy(self.texts[text][start : start + self.seq_len + 1].astype(np.int64))
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        return inputs, targets
