"""The runner for a GPU on toy cases of the CPU: order, time limit, what fails, a kill in the middle, going on."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import gpu
from benchmarks.harness import is_measured, read_rows
from tests.conftest import ROOT

# Workers are forks of one process that has imported torch, which takes seconds.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["benchmarks.gpu"])

TOY = """
import os, time
from pathlib import Path
import torch
from benchmarks.harness import Case

GOALS = {("speed", "peer"): ">= 1"}
CASES = [Case(f"{what} of NAME", GOALS, {"what": what}, device="cpu", seconds=1) for what in WHATS]

def measure(what, device, rounds):
    with Path(__file__).with_name("order.txt").open("a") as file:
        file.write(f"{what} of NAME, {os.getpid()}\\n")
    if what == "error":
        raise ValueError("a reason\\nand more of it")
    if what == "memory":
        torch.empty(2**60)
    if what == "death":
        os.abort()
    if what == "sleep":
        time.sleep(60)
    return {("speed", "peer"): [float(rounds)]}, {}
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Benchmarks of a package of their own; returns a plan for some of their cases, and what has run so far."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "stored")
    monkeypatch.setattr(gpu, "START", 15.0)
    monkeypatch.setattr(gpu, "get_context", lambda _: FORKED)
    monkeypatch.syspath_prepend(tmp_path)
    package = f"toys{time.time_ns()}"  # a name that this process has not imported yet
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()

    def plan(order=(("one", ""), ("two", "")), **whats):
        for name, its in whats.items():
            source = TOY.replace("NAME", name).replace("WHATS", repr(its))
            (tmp_path / package / f"{name}.py").write_text(source)
        return gpu.Plan(package, gpu.in_order(order, package, "cpu"), "cpu", tmp_path / "out")

    def ran():
        lines = (tmp_path / package / "order.txt").read_text().splitlines()
        return [line.split(",")[0] for line in lines]

    return plan, ran


def in_a_minute():
    return time.monotonic() + 60


def test_cases_run_once_and_in_the_order_of_their_worth_and_are_not_measured_again(toys, monkeypatch, capsys):
    plan, ran = toys
    order = (("two", "b of"), ("one", ""), ("two", ""))
    planned = plan(order, one=["a"], two=["a", "b"])
    rows = gpu.measure_all(planned, in_a_minute())
    assert ran() == ["b of two", "a of one", "a of two"]
    stored = {name: list(read_rows(planned.out / f"{name}.csv")) for name in ("one", "two")}
    assert [row["setting"] for row in stored["two"]] == ["a of two", "b of two"]
    assert [row["ratio"] for row in rows] == ["3.000"] * 3
    assert stored["one"][0]["command"].endswith(" gpu")
    assert gpu.measure_all(planned, in_a_minute()) == [stored["two"][1], *stored["one"], stored["two"][0]]
    assert len(ran()) == 3
    assert "left: 0 cases" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "machine", lambda: {"accelerator": "another", "torch": "1.0"})
    assert not any(planned.known(place) for place in planned.places)


def test_what_is_stored_of_other_code_is_measured_again(toys, tmp_path):
    plan, _ = toys
    planned = plan((("one", ""),), one=["a"])
    before = gpu.code_of(f"{planned.package}.one")
    gpu.code_of.cache_clear()
    assert gpu.code_of(f"{planned.package}.one") == before
    (tmp_path / "tokenformer").mkdir()
    (tmp_path / "tokenformer/__init__.py").touch()
    (tmp_path / "tokenformer/later.py").write_text("a = 1")
    with (tmp_path / planned.package / "one.py").open("a") as file:
        file.write("\nimport tokenformer")
    gpu.code_of.cache_clear()
    imported = gpu.code_of(f"{planned.package}.one")
    (tmp_path / "tokenformer/later.py").write_text("a = 2")
    gpu.code_of.cache_clear()
    assert len({before, imported, gpu.code_of(f"{planned.package}.one")}) == 3


def test_a_case_that_fails_costs_no_other(toys, capsys):
    plan, ran = toys
    planned = plan((("one", ""),), one=["a", "error", "memory", "death", "b"])
    assert [row["setting"] for row in gpu.measure_all(planned, in_a_minute())] == ["a of one", "b of one"]
    stored = read_rows(planned.out / "one.csv")
    assert [row["setting"] for row in stored if is_measured(row)] == ["a of one", "b of one"]
    table = capsys.readouterr().out.split("\n\n")[-1]
    assert "failed: speed, error of one: ValueError: a reason\n" in table
    assert "memory of one: RuntimeError: " in table
    assert f"death of one: its process ended with code {-signal.SIGABRT}" in table
    gpu.measure_all(plan((("one", "error"), ("one", "b of"))), in_a_minute())
    assert ran()[5:] == ["error of one"]  # once more, since it is not stored


def test_nothing_starts_that_would_not_end(toys, monkeypatch, capsys):
    plan, _ = toys
    planned = plan((("one", ""), ("two", "")), one=["sleep", "a"], two=["b"])
    now = iter([0, 0, 81.5, 82])  # the first case: whether it fits, its start; what it took; whether the next fits
    monkeypatch.setattr(gpu.Worker, "measure", lambda worker, place, seconds: ({("speed", "peer"): [seconds]}, {}))
    rows = gpu.measure_all(plan((("two", ""), ("one", "a of"))), deadline=82.5, clock=lambda: next(now))
    assert [(row["setting"], row["ratio"]) for row in rows] == [("b of two", "17.000")]  # twice a second, and START
    monkeypatch.undo()
    out = capsys.readouterr().out
    assert "left: 1 cases" in out
    assert out.endswith(f"  speed, a of one\nrows in {planned.out}\n")


def test_what_hangs_is_ended_with_its_process(toys, monkeypatch, capsys):
    plan, ran = toys
    monkeypatch.setattr(gpu, "START", 4.0)
    gpu.measure_all(plan((("one", ""),), one=["sleep", "a"]), in_a_minute())
    assert ran() == ["sleep of one", "a of one"]
    assert "sleep of one: FAILED: not done after 6 s" in capsys.readouterr().out


def test_a_kill_in_the_middle_loses_the_case_that_runs(toys, tmp_path):
    plan, _ran = toys
    planned = plan((("one", ""),), one=["a", "sleep"])
    script = f"""
import sys, time
from pathlib import Path
from benchmarks import gpu
gpu.ROOT = Path({str(tmp_path)!r})
if __name__ == "__main__":
    plan = gpu.Plan({planned.package!r}, [("one", 0), ("one", 1)], "cpu", Path({str(planned.out)!r}))
    gpu.measure_all(plan, time.monotonic() + 60)
"""
    (tmp_path / "script.py").write_text(script)
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], env=os.environ | paths, cwd=tmp_path)
    order = tmp_path / planned.package / "order.txt"
    while not (order.exists() and len(order.read_text().splitlines()) == 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    os.kill(int(order.read_text().split()[-1]), signal.SIGKILL)  # a case ends before its process sees that it is alone
    (row,) = [row for row in read_rows(planned.out / "one.csv") if is_measured(row)]
    assert row["setting"] == "a of one"
    assert planned.known(("one", 0)) == [row]
    assert planned.known(("one", 1)) == []


def test_the_order_has_every_case_for_a_gpu():
    from benchmarks.__main__ import NAMES

    places = gpu.in_order(gpu.ORDER, "benchmarks", "cuda")
    everything = {
        (name, i)
        for name in NAMES
        for i, case in enumerate(gpu.cases_of(f"benchmarks.{name}"))
        if case.device == "cuda"
    }
    assert set(places) == everything
    assert len(places) == len(everything)
    first = [name for name, _ in places]
    assert list(dict.fromkeys(first))[:6] == [
        "correctness",
        "operator",
        "memory",
        "training",
        "vit",
        "generation",
    ]


def test_without_a_gpu_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmarks", "gpu", "--minutes", "1"])
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit, match="needs a GPU"):
        main()
