import numpy as np
import pytest

from datamodules.sampler import BLOCK, sample_at


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_every_epoch_is_a_permutation(size):
    order = sample_at(np.arange(3 * size), size, seed=7).reshape(3, size)
    for epoch in order:
        assert sorted(epoch) == list(range(size))


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    positions = np.arange(2000)
    order = sample_at(positions, 1000, seed=0)
    assert not np.array_equal(order[:1000], order[1000:])
    assert not np.array_equal(order, sample_at(positions, 1000, seed=1))
    assert np.array_equal(order[1500:1510], sample_at(np.arange(1500, 1510), 1000, seed=0))
    across = slice(BLOCK - 5, BLOCK + 5)
    assert np.array_equal(
        sample_at(np.arange(2 * BLOCK), 7000, 0)[across], sample_at(np.arange(BLOCK - 5, BLOCK + 5), 7000, 0)
    )
    assert order[:8].tolist() == [414, 540, 67, 159, 765, 99, 686, 267]  # on every machine: old runs must resume


def test_order_looks_random():
    """Neighbours are not correlated, and no part of the epoch is drawn early."""
    order = sample_at(np.arange(100_000), 100_000, seed=3).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02
    assert abs(order[:10_000].mean() / 50_000 - 1) < 0.03


def test_large_corpora_need_no_memory():
    order = sample_at(np.arange(5), 10**12, seed=0)
    assert len(set(order.tolist())) == 5
    assert (order < 10**12).all()
