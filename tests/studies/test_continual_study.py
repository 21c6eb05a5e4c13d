"""The study of forgetting: its runs are what its text says, and its figures those of their matrix."""

import pytest
import yaml

from studies import continual
from studies.continual import TASKS, experiment, run
from studies.runner import Study
from studies.training import SOURCES
from tests.conftest import write_corpus

CASES = [(cell["task"], cell["method"]) for cell in Study("continual").cells]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Few steps on made-up texts."""
    for seed, name in enumerate(continual.TEXTS):
        path = tmp_path / f"{name}.jsonl"
        write_corpus(path, seed=seed)
        monkeypatch.setitem(SOURCES, name, (path, ""))
    monkeypatch.setattr(continual, "STEPS", 6)
    monkeypatch.setattr(continual, "TEXT_DATA", continual.TEXT_DATA | {"seq_len": 32, "batch_size": 4})


@pytest.mark.parametrize(("task", "method"), [("texts", "new tokens"), ("digits", "lora"), ("digits", "joint")])
def test_figures_are_those_of_the_matrix(small, task, method):
    row = run(task, method, 2e-3, 0)
    losses = [[float(loss) for loss in line.split()] for line in row["matrix"].split("; ")]
    names = TASKS[task].phases
    assert len(losses) == (2 if method == "joint" else 1 + len(names))
    assert row["loss"] == pytest.approx(sum(losses[-1]) / len(names), abs=1e-3)
    if method == "joint":
        assert "learned" not in row
    else:
        after = [losses[1 + i][i] for i in range(len(names))]
        assert row["learned"] == pytest.approx(sum(after) / len(names), abs=1e-3)
        rise = [last - loss for last, loss in zip(losses[-1], after, strict=True)][:-1]
        assert row["forgotten"] == pytest.approx(sum(rise) / len(rise), abs=1e-3)


def test_new_text_counts_the_new_one_alone(small):
    tokens, channels = (run("new text", method, 2e-3, 0) for method in ("zero keys", "net2net"))
    for row in (tokens, channels):
        assert row["loss"] == pytest.approx(float(row["matrix"].split()[-1]), abs=1e-3)
    assert tokens["params"] == pytest.approx(channels["params"], rel=0.05)


@pytest.mark.parametrize(("task", "method"), CASES)
def test_phases_and_growths_are_those_of_the_method(task, method):
    given, names = experiment(TASKS[task], method, seed=1), TASKS[task].phases
    assert yaml.safe_load(yaml.safe_dump(given)) == given
    phases = given["data"]["init_args"]["phases"]
    trained = [phase["name"] for phase in phases if phase["steps"]]
    assert trained == (["joint"] if method == "joint" else names)
    assert sum(phase["steps"] for phase in phases) == given["trainer"]["max_steps"]
    stages = [s for c in given["trainer"]["callbacks"] for s in c["init_args"]["stages"]]
    grows = method in ("new tokens", "all tokens", "zero keys", "net2net", "lora")
    assert [stage["at_phase"] for stage in stages] == (names[1:] if grows else [])
    if "qkv" in (stages or [{}])[-1]:
        assert tuple(stages[-1][kind] for kind in ("qkv", "proj", "ffn")) == TASKS[task].last
