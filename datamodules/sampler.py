"""The order of training samples: a pure function of (seed, epoch, position), with nothing to store.

An epoch is a permutation of the samples; the stream of positions 0, 1, 2, ... runs through epoch after epoch.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
BLOCK = 4096  # positions that are looked up at once: numpy takes as long for a few


def sample_at(positions: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.int64]:
    """Which sample is at each position of the stream.

    Each `num_samples` positions in a row, from a multiple of it on, hold every sample exactly once.

    Args:
        positions: places in the stream, (B), 0 or more; near each other, as those of a batch are.
        num_samples: samples of an epoch.
        seed: of the run.

    Returns:
        Indices of samples, (B).
    """
    first, last = int(positions.min()) // BLOCK, int(positions.max()) // BLOCK
    blocks = [_block(index, num_samples, seed) for index in range(first, last + 1)]
    return np.concatenate(blocks)[positions - first * BLOCK]


@lru_cache(maxsize=8)
def _block(index: int, num_samples: int, seed: int) -> NDArray[np.int64]:
    """The samples at positions from index * BLOCK on."""
    positions = np.arange(index * BLOCK, (index + 1) * BLOCK)
    epochs, places = np.divmod(positions, num_samples)
    samples = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        samples[chosen] = permute(places[chosen].astype(np.uint64), num_samples, seed, int(epoch))
    return samples


def permute(indices: NDArray[np.uint64], size: int, seed: int, epoch: int) -> NDArray[np.uint64]:
    """A Feistel network on the next power of four; what falls outside `size` is sent through again."""
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64)
    indices = indices.copy()
    outside = np.ones(len(indices), dtype=bool)
    while outside.any():
        left, right = indices[outside] >> half, indices[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        indices[outside] = (left << half) | right
        outside[outside] = indices[outside] >= size
    return indices


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer: every input bit changes every output bit with even odds."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
