"""The study of optimizers: a row of each task, by both models and both optimizers."""

import pytest

from studies import optimizers
from studies.optimizers import CIFAR, run


@pytest.mark.parametrize("task", ["bytes", "digits", "cifar"])
def test_a_row_of_each_task(monkeypatch, task):
    if task == "cifar" and not CIFAR.exists():
        pytest.skip(f"needs {CIFAR.name}, images that lie beside the project")
    monkeypatch.setattr(optimizers, "SIZES", {"tiny": (1, 16, 2)})
    found = {
        (model, name): run(task, "tiny", model, name, steps=100 if task == "digits" else 30, lr=8e-3, seed=0)
        for model in ("tokenformer", "transformer")
        for name in ("adamw", "muon")
    }
    losses = {case: row["loss"] for case, row in found.items()}
    assert len(set(losses.values())) == 4 or task != "bytes"  # shares of a few images may be equal
    assert all(loss < {"bytes": 4.5, "digits": 88, "cifar": 88}[task] for loss in losses.values())
    params = {model: found[model, "muon"]["params"] for model in ("tokenformer", "transformer")}
    assert params["tokenformer"] == pytest.approx(params["transformer"], rel=0.01)
