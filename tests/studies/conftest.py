"""Shared by the tests of studies: small validations."""

import pytest


@pytest.fixture(autouse=True)
def two_batches(monkeypatch):
    """In place of forty, where a row is validated."""
    monkeypatch.setattr("studies.training.validation_loss.__defaults__", (2,))
