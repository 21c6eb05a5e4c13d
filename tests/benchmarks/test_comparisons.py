"""How benchmarks compare, record and check; each in its smallest form. Nothing here depends on how long it takes."""

import csv
import importlib
import inspect
import subprocess

import pytest
import torch

from benchmarks import harness
from benchmarks.__main__ import CHECKED, NAMES, check, main
from benchmarks.check import is_worse, pairs
from benchmarks.harness import Case, Unavailable, benchmark, figures, in_turn, reached, read_rows, round_ratios, store
from benchmarks.page import PAGE, all_rows, table, with_table
from tests.conftest import ROOT

PAIR = ("speed", "peer")


def row(ratio=1.0, lowest=None, highest=None, goal=">= 0.9", setting="small", device="cpu"):
    found = Case(setting, {PAIR: goal}, device=device).rows(({PAIR: [lowest or ratio, ratio, highest or ratio]}, {}))[0]
    return found | {"command": "python"}


def regressions(now, stored):
    return [pair for pair in pairs(now, stored) if is_worse(*pair)]


def not_measured(setting="small", device="cpu"):
    return Case(setting, {PAIR: ">= 0.9"}, device=device).rows(None)[0] | {"command": ""}


def test_contenders_take_turns_after_a_warm_up():
    order = []
    contenders = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    found = in_turn(contenders, rounds=2)
    assert order == list("ababab")
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert round_ratios(found, "b", "a") == [4 / 3, 6 / 5]


def test_a_ratio_is_the_median_of_rounds_with_its_range():
    shown = figures([1.3, 0.9, 0.98765, 0.99, 0.5], ">= 0.98")
    assert shown == {"ratio": "0.988", "lowest": "0.500", "highest": "1.300", "goal": ">= 0.98", "reached": "yes"}
    assert figures([2.0], "")["reached"] == ""
    assert figures([], "<= 1.1") == {
        "ratio": "not measured",
        "lowest": "",
        "highest": "",
        "goal": "<= 1.1",
        "reached": "",
    }


@pytest.mark.parametrize(
    ("goal", "good", "bad"),
    [
        (">= 0.9", (0.9, 0.8996, 2), (0.8994, 0)),
        ("<= 1.1", (1.1, 1.1004, 0), (1.1006, 3)),
        ("within 10 %", (0.9, 1.1, 1), (0.89, 1.11, 0, 3)),
    ],
)
def test_goals_hold_to_the_decimals_that_are_written(goal, good, bad):
    assert all(reached(ratio, goal) for ratio in good)
    assert not any(reached(ratio, goal) for ratio in bad)


@pytest.mark.parametrize(
    ("goal", "stored", "now", "worse"),
    [
        (">= 0.9", (1.0, 0.95, 1.05), 0.92, False),  # less than 10 %
        (">= 0.9", (1.0, 0.95, 1.05), 0.9, True),  # 1 / 0.9 is 11 %
        (">= 0.9", (1.0, 0.88, 1.05), 0.89, False),  # as a stored round was
        (">= 0.9", (1.0, 0.95, 1.05), 1.5, False),
        ("<= 1.1", (1.0, 0.95, 1.05), 1.09, False),
        ("<= 1.1", (1.0, 0.95, 1.05), 1.11, True),
        ("<= 1.1", (1.0, 0.95, 1.2), 1.15, False),
        ("<= 1.1", (1.0, 0.95, 1.05), 0.5, False),
        ("within 10 %", (0.8, 0.78, 0.82), 0.7, True),
        ("within 10 %", (0.8, 0.78, 0.82), 1.2, False),
        ("", (1.0, 0.95, 1.05), 9.0, False),
    ],
)
def test_what_counts_as_a_regression(goal, stored, now, worse):
    before = row(*stored, goal=goal)
    assert [pair[1] for pair in regressions([row(now, goal=goal)], [before])] == ([before] if worse else [])


def test_what_was_not_measured_or_is_not_stored_is_no_regression():
    assert regressions([row(0.1)], [not_measured()]) == []
    assert regressions([not_measured()], [row(1.0)]) == []
    assert regressions([row(0.1)], [row(1.0, setting="large"), row(1.0, device="cuda")]) == []


def test_a_run_keeps_the_figures_of_the_other_device_and_drops_rows_that_are_no_more(tmp_path):
    path = tmp_path / "speed.csv"
    cases = [Case("small", {PAIR: ">= 0.9"}, device=device) for device in ("cpu", "cuda")]
    harness.write_rows(path, [row(1.0), row(2.0, device="cuda"), row(3.0, setting="gone")])
    store(path, [*cases, Case("new", {PAIR: ">= 0.9"})], [row(1.5)])
    found = [(line["setting"], line["device"], line["ratio"]) for line in read_rows(path)]
    assert found == [("small", "cpu", "1.500"), ("small", "cuda", "2.000"), ("new", "cpu", harness.NOT_MEASURED)]
    assert not list(tmp_path.glob("*.part"))


def run_benchmark(monkeypatch, tmp_path, measure, *arguments):
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/speed.py", *arguments])
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    small = Case("small", {PAIR: ">= 0.9", ("memory", "peer"): ""}, {"size": 2}, quick=True)
    large = Case("large", {PAIR: ""}, {"size": 3})
    gpu = Case("large", {PAIR: ""}, {"size": 4}, device="cuda")
    benchmark("speed", [small, large, gpu], measure, rounds=5)


def measure_one(size, device, rounds):
    pairs = {PAIR: [float(rounds)]}
    return (pairs | {("memory", "peer"): [0.5]} if size == 2 else pairs), {"size": size}


def test_rows_as_they_are_written(monkeypatch, tmp_path):
    run_benchmark(monkeypatch, tmp_path, measure_one, "--results", str(tmp_path))
    with (tmp_path / "speed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:10] == [*harness.COLUMNS, "size"]
    assert [(r["what"], r["setting"], r["ratio"], r["reached"], r["size"]) for r in rows] == [
        ("speed", "small", "5.000", "yes", "2"),
        ("memory", "small", "0.500", "", "2"),
        ("speed", "large", "5.000", "", "3"),
        ("speed", "large", "not measured", "", ""),
    ]
    assert rows[0]["command"] == f"python -m benchmarks.speed --results {tmp_path}"
    assert rows[0]["torch"] == torch.__version__
    assert rows[0]["lightning"]
    assert rows[0]["cpu"]
    assert rows[3]["command"] == ""


def test_quick_measures_the_quick_cases_in_three_rounds(monkeypatch, tmp_path):
    run_benchmark(monkeypatch, tmp_path, measure_one, "--quick", "--results", str(tmp_path / "quick"))
    rows = read_rows(tmp_path / "quick" / "speed.csv")
    assert [(r["what"], r["setting"], r["ratio"]) for r in rows] == [
        ("speed", "small", "3.000"),
        ("memory", "small", "0.500"),
    ]


def test_quick_does_not_replace_what_is_stored(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_benchmark(monkeypatch, tmp_path, measure_one, "--quick")
    assert "give --results FOLDER" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_case_that_fails_loses_no_other(monkeypatch, tmp_path):
    def measure(size, **places):
        if size == 3:
            raise MemoryError
        return measure_one(size, **places)

    with pytest.raises(MemoryError):
        run_benchmark(monkeypatch, tmp_path, measure, "--results", str(tmp_path))
    ratios = [row["ratio"] for row in read_rows(tmp_path / "speed.csv")]
    assert ratios == ["5.000", "0.500", "not measured", "not measured"]


@pytest.mark.parametrize(
    ("measured", "complaint"),
    [
        ([[0.85], [0.85]], "1 of 1 ratios are more than 10 % worse"),
        ([[0.85], [0.95]], None),  # noise: not twice
        ([[0.95]], None),
        ([[]], "nothing to compare"),
    ],
)
def test_the_check_fails_for_what_is_worse_twice_or_when_it_compares_nothing(monkeypatch, measured, complaint):
    answers = iter([[(row(now), row(1.0)) for now in ratios] for ratios in measured])
    monkeypatch.setattr("benchmarks.__main__.quick", lambda name: next(answers))
    if complaint:
        with pytest.raises(SystemExit, match=complaint):
            check(["speed"])
    else:
        check(["speed"])
    assert not list(answers)


def test_a_benchmark_that_fails_does_not_stop_the_others(monkeypatch):
    done = []

    def run(name, *arguments):
        done.append(name)
        if name == "memory":
            raise subprocess.CalledProcessError(1, name)

    monkeypatch.setattr("benchmarks.__main__.run", run)
    monkeypatch.setattr("benchmarks.plots.main", lambda: done.append("plots"))
    monkeypatch.setattr("sys.argv", ["benchmarks", "memory", "vit"])
    with pytest.raises(SystemExit, match="failed: memory"):
        main()
    assert done == ["memory", "vit", "plots"]


def test_only_measures_what_is_named_and_keeps_the_rest(monkeypatch, tmp_path):
    run_benchmark(monkeypatch, tmp_path, measure_one, "--rounds", "4", "--results", str(tmp_path))
    run_benchmark(monkeypatch, tmp_path, measure_one, "--only", "memory", "--results", str(tmp_path))
    ratios = [row["ratio"] for row in read_rows(tmp_path / "speed.csv")]
    assert ratios == ["5.000", "0.500", "4.000", "not measured"]


def test_what_the_machine_lacks_is_not_measured(monkeypatch, tmp_path, capsys):
    def measure(**_):
        raise Unavailable("needs two cores")

    run_benchmark(monkeypatch, tmp_path, measure, "--results", str(tmp_path))
    assert {r["ratio"] for r in read_rows(tmp_path / "speed.csv")} == {"not measured"}
    assert "needs two cores" in capsys.readouterr().err


def test_studies_have_no_rows_in_the_table(tmp_path):
    (tmp_path / "study.csv").write_text("variant,lr\na,0.1\n")
    assert all_rows(tmp_path) == []


def test_the_table_has_a_line_a_row_and_what_was_not_measured_comes_last():
    lines = table([not_measured(device="cuda"), row(0.95, 0.9, 1.0)]).splitlines()
    assert lines[2:5] == [
        "| speed | peer | small | 0.950 (0.900-1.000) | >= 0.9 | yes | `python` |",
        "",
        "Not measured:",
    ]
    assert lines[-1] == "| speed | peer | small, GPU | >= 0.9 |"


def test_the_page_shows_what_the_files_hold():
    text = PAGE.read_text()
    assert text == with_table(text, all_rows()), "run `python -m benchmarks.plots`"


@pytest.mark.parametrize("name", NAMES)
def test_every_case_fits_its_benchmark(name):
    module = importlib.import_module(f"benchmarks.{name}")
    for case in module.CASES:
        inspect.signature(module.measure).bind(**case.arguments, device=case.device, rounds=1)
    rows = [harness.key(line) for case in module.CASES for line in case.rows(None)]
    assert len(set(rows)) == len(rows)
    assert any(case.quick and case.device == "cpu" for case in module.CASES) == (name in CHECKED)


def test_make_runs_them():
    makefile = (ROOT / "Makefile").read_text()
    assert "\nbench: setup\n\t$(BIN)/python -m benchmarks\n" in makefile
    assert "\nbench-check: setup\n\t$(BIN)/python -m benchmarks --check\n" in makefile


def test_plots_show_the_rows(tmp_path):
    from benchmarks import plots

    lengths = (256, 512)
    columns = ("T", "time_ratio", "flop_ratio", "causal_flop_ratio", "length", "batch_size")
    columns += ("cached_tokens_per_s", "baseline_tokens_per_s", "uncached_tokens_per_s")
    rows = [
        row(0.8, 0.7, 0.9, setting=f"model, {n}") | {name: str(i * n) for i, name in enumerate(columns, 1)}
        for n in lengths
    ]
    _, axes = plots.plt.subplots()
    plots.context(axes, rows)
    assert [list(line.get_ydata()) for line in axes.lines] == [[i * n for n in lengths] for i in (2, 3, 4)]
    _, axes = plots.plt.subplots()
    plots.generation(axes, [line | {"batch_size": "16"} for line in rows])
    assert [list(line.get_ydata()) for line in axes.lines] == [[i * n for n in lengths] for i in (7, 8, 9)]
    _, axes = plots.plt.subplots()
    plots.operator(axes, rows)
    assert list(axes.lines[0].get_xdata()) == [0.8, 0.8]
    plots.plt.close("all")
    harness.write_rows(tmp_path / "context.csv", rows)
    assert plots.draw("context", tmp_path, tmp_path).stat().st_size > 1000
    assert plots.draw("generation", tmp_path, tmp_path) is None
