"""The study of forgetting: its runs are what its text says, and its figures those of their matrix."""

import pytest
import yaml

from studies import continual
from studies.continual import DIGITS, SOURCES, experiment, run
from studies.runner import Study

METHODS = sorted({cell["method"] for cell in Study("continual").cells})


@pytest.mark.parametrize(("task", "method"), [("texts", "new tokens"), ("digits", "lora"), ("digits", "joint")])
def test_figures_are_those_of_the_matrix(monkeypatch, task, method):
    monkeypatch.setattr(continual, "STEPS", 21)
    row = run(task, method, 2e-3, 0)
    losses = [[float(loss) for loss in line.split()] for line in row["matrix"].split("; ")]
    names = [*(SOURCES if task == "texts" else DIGITS)]
    assert len(losses) == (2 if method == "joint" else 1 + len(names))
    assert row["loss"] == pytest.approx(sum(losses[-1]) / len(names), abs=1e-3)
    if method == "joint":
        assert "learned" not in row
    else:
        after = [losses[1 + i][i] for i in range(len(names))]
        assert row["learned"] == pytest.approx(sum(after) / len(names), abs=1e-3)
        rise = [last - loss for last, loss in zip(losses[-1], after, strict=True)][:-1]
        assert row["forgotten"] == pytest.approx(sum(rise) / len(rise), abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_phases_and_growths_are_those_of_the_method(method):
    for task, names in (("texts", [*SOURCES]), ("digits", [*DIGITS])):
        given = experiment(task, method, seed=1)
        assert yaml.safe_load(yaml.safe_dump(given)) == given
        phases = given["data"]["init_args"]["phases"]
        trained = [phase["name"] for phase in phases if phase["steps"]]
        assert trained == (["joint"] if method == "joint" else names)
        assert sum(phase["steps"] for phase in phases) == given["trainer"]["max_steps"]
        stages = [s for c in given["trainer"]["callbacks"] for s in c["init_args"]["stages"]]
        grows = method in ("new tokens", "all tokens", "net2net", "lora")
        assert [stage["at_phase"] for stage in stages] == (names[1:] if grows else [])
        if method in ("new tokens", "all tokens"):
            assert (stages[-1]["qkv"], stages[-1]["ffn"]) == (128, 512)
