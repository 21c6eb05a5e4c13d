"""Power laws through points whose law is known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from studies.fit import PowerLaw, table

SIZES = [1e5, 3e5, 1e6, 3e6]


def test_a_law_is_found_with_its_interval():
    exact = PowerLaw.through(SIZES, [5 * n**-0.08 for n in SIZES])
    assert (exact.factor, exact.exponent) == pytest.approx((5, 0.08))
    assert exact.error < 1e-6
    assert exact(1e9) == pytest.approx(5 * 1e9**-0.08)


def test_the_interval_has_the_exponent_as_often_as_it_says():
    generator, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        losses = [5 * n**-0.08 * math.exp(0.02 * generator.standard_normal()) for n in SIZES]
        law = PowerLaw.through(SIZES, losses)
        hits += abs(law.exponent - 0.08) < law.error
    assert 930 < hits < 970


def test_seeds_of_a_size_are_one_point():
    """What a size departs from the law by, its seeds share: more seeds don't narrow the interval."""
    shift = dict(zip(SIZES, (1.03, 0.97, 1.02, 0.99), strict=True))

    def exponent(seeds):
        rows = {n: [{"params": n, "flops": n, "loss": 5 * n**-0.08 * shift[n]}] * seeds for n in SIZES}
        cells = [{"model": "a", "size": n} for n in SIZES]
        study = SimpleNamespace(cells=cells, best=lambda cell: rows[cell["size"]])
        return table(study).splitlines()[-1]

    assert exponent(1) == exponent(3)


def test_the_table_has_a_law_of_each_model_and_says_what_is_missing():
    cells = [{"model": model, "size": size} for model in ("a", "b") for size in SIZES]
    measured = {size: [{"params": size, "flops": 10 * size, "loss": 5 * size**-0.1}] for size in SIZES}
    study = SimpleNamespace(
        cells=cells,
        best=lambda cell: measured[cell["size"]] if cell["model"] == "a" else [],
    )
    text = table(study)
    a = f"| a | 0.100 \u00b1 0.000 | 0.100 \u00b1 0.000 | {5 * 124e6**-0.1:.3f} |"
    assert a in text
    assert "| b | not run yet |" in text
    assert "no such model was trained" in text
