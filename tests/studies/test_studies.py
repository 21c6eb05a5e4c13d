"""The runner of studies, by a study of a function that is known, and the kinds of growth that only a study has."""

import csv
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from studies.__main__ import main, smoke
from studies.growth import SIZES, add_tokens, build
from studies.page import PAGE, PICTURES, VERDICTS, claims, page, pictures, section, short
from studies.picture import draw, points_of
from studies.runner import FOLDER, Study, expand, search
from studies.training import SOURCES, train
from tokenformer.growth import pattention_layers
from tokenformer.pattention import Pattention

CELLS = [{"kind": ["a", "b"], "lr_near": 1.0}, {"kind": "c", "lr": 0.5}]


class InThisProcess:
    """In place of the pool of processes."""

    def submit(self, function, *arguments):
        return SimpleNamespace(result=lambda: function(*arguments))


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Loss over rate is a parabola whose least is at 4 for a and at 1/2 for b; c never ends well."""
    least = {"a": 2.0, "b": -1.0}
    trained = []

    def run(kind, lr, seed):
        trained.append((kind, lr, seed))
        return {"loss": math.nan if kind == "c" else (math.log2(lr) - least[kind]) ** 2 + seed, "params": 10}

    monkeypatch.setitem(sys.modules, "studies.parabola", SimpleNamespace(run=run))
    spec = {"question": "?", "run": "parabola", "seeds": 3, "cells": CELLS}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(spec))

    def go():
        trained.clear()
        study = Study("toy", tmp_path)
        for cell in study.cells:
            study._measure_cell(cell, InThisProcess())
        return study, trained

    return go


def test_each_cell_is_run_at_its_best_rate_with_all_seeds(study):
    made, trained = study()
    assert [row["lr"] for row in made.best({"kind": "a"})] == ["4", "4", "4"]
    assert [float(row["loss"]) for row in made.best({"kind": "a"})] == [0, 1, 2]
    assert {row["lr"] for row in made.best({"kind": "b"})} == {"0.5"}
    assert {lr for kind, lr, seed in trained if kind == "a" and seed == 0} == {0.5, 1, 2, 4, 8}
    assert [(lr, seed) for kind, lr, seed in trained if kind == "c"] == [(0.5, 0), (0.5, 1), (0.5, 2)]
    assert made.best({"kind": "d"}) == made.best({}) == []


def test_rows_that_are_there_are_not_measured_again(study, tmp_path):
    study()
    path = tmp_path / "results" / "toy.csv"
    whole = path.read_text()
    rows = list(csv.DictReader(path.open()))
    assert study()[1] == []
    assert path.read_text() == whole
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))  # stopped before the last one
    _, trained = study()
    assert [(kind, f"{lr:g}", str(seed)) for kind, lr, seed in trained] == [
        tuple(rows[-1][n] for n in ("kind", "lr", "seed"))
    ]
    assert Study("toy", tmp_path).best({"kind": "a"})


def test_a_killed_study_takes_its_trainings_along():
    study = """if True:
        import os, time
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        from studies.runner import prepare
        processes = ProcessPoolExecutor(1, get_context("fork"), prepare, (1, 1.0))
        print(processes.submit(os.getpid).result(), flush=True)
        processes.submit(time.sleep, 200).result()
    """
    command = [sys.executable, "-c", study]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=FOLDER.parent) as process:
        trains = Path(f"/proc/{process.stdout.readline().strip()}")
        assert (trains / "stat").exists()
        process.kill()
    until = time.monotonic() + 20
    while trains.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not trains.exists()


def test_an_error_ends_the_study_at_once(study, monkeypatch, tmp_path):
    made, trained = study()
    made.path.unlink()
    trained.clear()
    monkeypatch.setattr("studies.runner.ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    monkeypatch.setattr("studies.runner._timed", lambda *_: trained.append("x") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Study("toy", tmp_path).measure()
    assert len(trained) == 1  # of three cells


def test_a_smoke_leaves_out_what_would_be_downloaded(monkeypatch, capsys):
    measured = []
    beside = {"cifar": Path("/nowhere/images"), "wiki": Path("/nowhere/text")}
    monkeypatch.setattr("studies.training.SOURCES", {name: (beside.get(name), "") for name in SOURCES})
    monkeypatch.setattr(Study, "measure_in", lambda self, *_, **__: measured.extend(self.cells))
    smoke(["continual", "optimizers"])
    assert {cell["task"] for cell in measured} == {"digits", "bytes"}
    said = capsys.readouterr().out
    assert said.count("needs /nowhere/images") == 4
    assert said.count("needs /nowhere/text") == 10


def test_a_rate_is_found_where_the_first_ones_diverge():
    assert search(lambda lr: math.inf if lr > 0.1 else abs(math.log2(lr / 0.0625)), 1.0) == 0.0625


def test_a_training_leaves_the_state_that_it_begins_with():
    """Other rows begin with it too."""
    batches = [(torch.randint(0, 257, (2, 16)), torch.randint(0, 257, (2, 16))) for _ in range(2)]
    data = SimpleNamespace(train_dataloader=lambda: batches)
    for optimizer in ("adamw", "muon"):
        model = build("small", 0)
        state = train(model, data, model.loss, optimizer, 1e-2, 2)
        before = deepcopy(state)
        train(model, data, model.loss, optimizer, 1e-2, 2, state=state)
        for one, two in zip(before["state"].values(), state["state"].values(), strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_page_is_made_of_the_results():
    assert PAGE.read_text() == page(), "run: python -m studies page"
    assert {path.name: path.read_text() for path in PICTURES.glob("*")} == pictures(), "run: python -m studies page"


def test_a_picture_shows_the_cells_that_are_measured(study):
    made, _ = study()
    made.picture = {"x": ["params"], "lines": ["kind"]}
    assert points_of(made, "params", ["kind"])["a"] == [(10.0, [0.0, 1.0, 2.0])]
    svg = draw(made)
    assert svg == draw(made)
    assert all(f">{label}</text>" in svg for label in ("a", "b", "loss", "parameters"))
    made.rows = []
    assert draw(made) == ""


def test_a_study_is_sent_to_slurm(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["studies", "norms", "--jobs", "3", "--scale", "8", "--submit", "--time=60", "-q", "long"]
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="no sbatch here"):
        main()
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho $@ > asked\n/bin/cat > script\necho 42\n")
    sbatch.chmod(0o755)
    main()
    assert capsys.readouterr().out == "job 42, log runs/studies/norms.log\n"
    assert (tmp_path / "runs/studies").is_dir()
    asked = (tmp_path / "asked").read_text().split()
    assert asked[-3:] == ["--time=60", "-q", "long"]
    assert {
        "--parsable",
        "--cpus-per-task=3",
        "--requeue",
        "--dependency=singleton",
        "--output=runs/studies/norms.log",
    } <= set(asked)
    script = f"#!/bin/bash\nexec {sys.executable} -m studies norms --jobs=3 --scale=8\n"
    assert (tmp_path / "script").read_text() == script
    sbatch.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(SystemExit, match="3"):
        main()
    monkeypatch.setattr(sys, "argv", ["studies", "page", "--submit"])
    with pytest.raises(SystemExit):
        main()


def test_claims_have_a_verdict_once_their_cells_are_measured():
    for path in FOLDER.glob("*.yaml"):
        study = Study(path.stem)
        for claim in study.claims:
            figures = [short(study, cell) for cell in claim["ours"].values()]
            assert claim.get("verdict") in (VERDICTS if all(figures) else [None]), claim


def test_a_claim_shows_the_cells_that_it_names(study, tmp_path):
    made, _ = study()
    made.claims = [
        {"where": "table 10", "claim": "a < b", "paper": "2", "ours": {"A": {"kind": "a"}}, "verdict": "held"},
        {"where": "table 9", "claim": "c", "paper": "3", "ours": {"A": {"kind": "a", "figure": "params"}}},
    ]
    assert claims([made]).splitlines()[2:] == [
        "| table 9 | c | 3 | A 10.000 (10.000-10.000) |  | `python -m studies toy` |",
        "| table 10 | a < b | 2 | A 1.000 (0.000-2.000) | held | `python -m studies toy` |",
    ]
    made.rows = []
    assert "| not run yet | held |" in claims([made])
    with pytest.raises(ValueError, match="toy: {} are settings of several cells"):
        short(made, {})


def test_the_page_has_a_line_for_each_cell(study):
    made, _ = study()
    lines = section(made).splitlines()
    assert "| a | 4 | **1.000** (0.000, 1.000, 2.000) | 10 |" in lines
    assert "| b | 0.5 | **1.000** (0.000, 1.000, 2.000) | 10 |" in lines
    made.rows = made.rows[:1]
    assert "| b |  | not run yet |  |" in section(made).splitlines()


def test_a_cell_is_a_choice_of_each_list():
    assert list(expand({"a": [1, 2], "b": 3, "c": [4, 5]})) == [
        {"a": a, "b": 3, "c": c} for a in (1, 2) for c in (4, 5)
    ]
    assert search(lambda lr: abs(math.log2(lr / 1e-3)), 1.6e-2) == 1e-3
    with pytest.raises(ValueError, match="there is no study 'nothing': choose one of .*growth"):
        Study("nothing")


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_rows_are_those_of_the_cells(name):
    """Each row that is stored is one of a cell, once, and each cell has either a rate or a place to begin at."""
    study = Study(name)
    assert all(("lr" in cell) != ("lr_near" in cell) for cell in study.cells)
    settings = [{name: str(cell.get(name, "")) for name in study.settings} for cell in study.cells]
    for row in study.rows:
        assert {column: row.get(column, "") for column in settings[0]} in settings
    keys = [tuple(row.get(column, "") for column in study.columns) for row in study.rows]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("kind", ["gate", "gram", "anchored", "raised"])
def test_what_a_kind_of_growth_does(kind):
    """All but `raised` change nothing; a gate that is open is a layer with one norm and a larger tau."""
    model = build("small", 0).double()
    for layer in pattention_layers(model).values():  # trained ones are not alike
        layer.segments[0].keys.data *= torch.linspace(0.5, 2, layer.in_features)
    x = torch.randint(0, 257, (2, 96))
    before = model(x)
    gates = add_tokens(model, kind, "matched", 4, seed=0)
    after = model(x)
    assert torch.allclose(after, before, atol=1e-9) == (kind != "raised")
    layer = next(iter(pattention_layers(model).values()))
    old, new = layer.segments
    assert len(new.keys) == 3 * SIZES["small"]["qkv_tokens"]
    x = torch.randn(5, layer.in_features, dtype=torch.double)
    if kind == "gram":
        assert torch.allclose((x @ new.keys.T).norm(dim=1), math.sqrt(3) * (x @ old.keys.T).norm(dim=1))
    if kind == "gate":
        torch.nn.init.normal_(new.values)
        gates[0].weight = 1.0
        opened = layer(x)
        new.norm_weight = None
        layer.tau *= 2
        assert torch.allclose(opened, Pattention.forward(layer, x))
    if kind == "raised":
        assert layer.tau.item() == pytest.approx(2 * math.sqrt(old.num_tokens))


def test_keys_of_each_kind_have_their_size():
    def new_keys(keys):
        model = build("small", 0)
        add_tokens(model, "anchored", keys, 8, seed=0)
        layer = model.backbone.blocks[0].attention.query
        return layer, layer.segments[0].keys, layer.segments[1].keys

    layer, old, new = new_keys("key_std")
    assert new.std().item() == pytest.approx(layer.key_std, rel=0.05)
    _, old, new = new_keys("2 rms")
    assert new.std().item() == pytest.approx(2 * old.square().mean().sqrt().item(), rel=0.05)
    _, old, new = new_keys("channels")
    assert torch.corrcoef(torch.stack((new.std(0), old.std(0))))[0, 1] > 0.8
