"""A mixture of sources: which sample of which source is at each position of the training stream.

Each BLOCK positions in a row hold every source's share exactly, in random order. A source goes through its own samples
in its own order, all of them before one comes again, so one that is small for its share is repeated more often. Like
the order of a single source this is a pure function of (seed, position): any number of processes gets the same stream,
and a run is resumed in it by one integer.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from datamodules.sampler import permute, sample_at
from datamodules.tokens import Split, TokenFile

BLOCK = 10_000  # weights count to four digits


def shares_of(weights: dict[str, float]) -> tuple[int, ...]:
    """How many of BLOCK samples come from each source.

    Raises:
        ValueError: for a weight that is not positive, or too small to give a source a sample.
    """
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight <= 0:
            raise ValueError(
                f"data.source: {name!r} has weight {weight}: give a positive number, its share of training"
            )
    total = sum(weights.values())
    bounds = np.rint(np.cumsum([0.0, *weights.values()]) / total * BLOCK).astype(int)
    shares = tuple(np.diff(bounds).tolist())
    for (name, weight), share in zip(weights.items(), shares, strict=True):
        if share == 0:
            raise ValueError(
                f"data.source: {name!r} has weight {weight} of {total:g} together, less than one sample in {BLOCK}: "
                "give it more, or leave it out"
            )
    return shares


def mixed_at(
    positions: NDArray[np.int64], shares: tuple[int, ...], sizes: tuple[int, ...], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which sample of which source is at each position of the stream.

    Args:
        positions: places in the stream, (B), 0 or more; near each other, as those of a batch are.
        shares: of :func:`shares_of`.
        sizes: samples of each source.
        seed: of the run.

    Returns:
        Indices of sources, (B), and indices of samples in them, (B).
    """
    first, last = int(positions.min()) // BLOCK, int(positions.max()) // BLOCK
    blocks = np.concatenate([_block(index, shares, sizes, seed) for index in range(first, last + 1)], axis=1)
    sources, samples = blocks[:, positions - first * BLOCK]
    return sources, samples


@lru_cache(maxsize=4)
def _block(index: int, shares: tuple[int, ...], sizes: tuple[int, ...], seed: int) -> NDArray[np.int64]:
    """Sources and samples, (2, BLOCK), at positions from index * BLOCK on."""
    sources = np.repeat(np.arange(len(shares)), shares)[permute(np.arange(BLOCK, dtype=np.uint64), BLOCK, seed, index)]
    samples = np.empty_like(sources)
    for source, (share, size) in enumerate(zip(shares, sizes, strict=True)):
        samples[sources == source] = sample_at(np.arange(index * share, (index + 1) * share), size, seed)
    return np.stack([sources, samples])


def repeated(shares: tuple[int, ...], sizes: tuple[int, ...], num_samples: int) -> dict[int, float]:
    """How often a run of so many samples goes through each source that it goes through more than once, by index."""
    times = {i: share / BLOCK * num_samples / size for i, (share, size) in enumerate(zip(shares, sizes, strict=True))}
    return {i: often for i, often in times.items() if often > 1}


class Joined:
    """Token files of several sources; of most data there is one.

    Attributes:
        files: of each source.
        split: counts of all of them together.
    """

    def __init__(self, files: list[TokenFile]) -> None:
        self.files = files
        counts = [(file.split.tokens, file.split.documents, file.split.bytes) for file in files]
        self.split = Split(*map(sum, zip(*counts, strict=True)))

    @property
    def texts(self) -> list[NDArray[np.generic]]:
        """The ids of each."""
        return [file.ids for file in self.files]

    @property
    def ids(self) -> NDArray[np.generic]:
        """All ids, one source after the other, read into memory if there are several."""
        return self.files[0].ids if len(self.files) == 1 else np.concatenate(self.texts)

    def fingerprint(self) -> str:
        """Changes when one of the files does."""
        return ", ".join(file.fingerprint() for file in self.files)
