"""What all benchmarks share: contenders take turns, a row says what was compared, on what, and how it came out.

A row's ratio is the median over rounds, each round's figure divided by the peer's in the same round, so that a machine
whose speed drifts treats them alike. Results: benchmarks/results/NAME.csv.
"""

import argparse
import csv
import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

# The columns that every row has, before those of its own and those of `machine`.
COLUMNS = ("what", "against", "setting", "device", "ratio", "lowest", "highest", "goal", "reached")
NOT_MEASURED = "not measured"

Pair = tuple[str, str]  # what is measured, against what
Row = dict[str, object]
# Of a case: the ratio of each round for each of its pairs, and more columns for its rows.
Measured = tuple[dict[Pair, list[float]], Row]


class Unavailable(Exception):
    """What a case needs is not on this machine."""


@dataclass(frozen=True)
class Case:
    """Comparisons that are measured together, each of them a row.

    Attributes:
        setting: sizes, as the table shows them.
        goals: of each (what, against): ">= 0.9", "<= 1.1", "within 10 %" (of 1), or "" for what is only reported.
        arguments: of the function that measures the case.
        device: cpu or cuda.
        quick: whether `make bench-check` measures it again.
        seconds: what it may take on a GPU, compilation included: `benchmarks.gpu` starts nothing that would not end.
    """

    setting: str
    goals: dict[Pair, str]
    arguments: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    quick: bool = False
    seconds: float = 60.0

    def rows(self, measured: Measured | None) -> list[Row]:
        """One a comparison; None for what was not measured."""
        ratios, columns = measured or ({pair: [] for pair in self.goals}, {})
        assert ratios.keys() == self.goals.keys()
        places = {"setting": self.setting, "device": self.device}
        return [
            {"what": what, "against": against, **places, **figures(ratios[what, against], goal), **columns}
            for (what, against), goal in self.goals.items()
        ]


def figures(ratios: Sequence[float], goal: str) -> Row:
    """Median, lowest and highest of the rounds, and whether the median reaches the goal."""
    if not ratios:
        return {"ratio": NOT_MEASURED, "lowest": "", "highest": "", "goal": goal, "reached": ""}
    names = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    shown: Row = {name: f"{value:.3f}" if value >= 0.1 else f"{value:.3g}" for name, value in names.items()}
    return shown | {"goal": goal, "reached": "" if not goal else "yes" if reached(names["ratio"], goal) else "no"}


def reached(ratio: float, goal: str) -> bool:
    """Whether a ratio reaches a goal, to the three decimals that are written down."""
    kind, number = goal.split()[:2]
    ratio, limit = round(ratio, 3), float(number)
    if kind == ">=":
        return ratio >= limit
    if kind == "<=":
        return ratio <= limit
    assert kind == "within"
    return abs(round(ratio - 1, 3)) <= limit / 100


def time_in_turn(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` per contender after one warm-up, taken in turn: A B C A B C ..."""
    return in_turn({name: partial(seconds_of, call) for name, call in contenders.items()}, rounds)


def seconds_of(call: Callable[[], object]) -> float:
    """Time of a call, the accelerator's work included."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def in_turn(contenders: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """What each call says of itself, `rounds` per contender after the warm-up, taken in turn."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for measured in range(-warm_up, rounds):
        for name, call in contenders.items():
            value = call()
            if measured >= 0:
                found[name].append(value)
    return found


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def round_ratios(found: dict[str, list[float]], name: str, peer: str) -> list[float]:
    """The ratio name / peer of each round."""
    return [a / b for a, b in zip(found[name], found[peer], strict=True)]


def benchmark(name: str, cases: Sequence[Case], measure: Callable[..., Measured], rounds: int) -> None:
    """A benchmark's command line: measure the cases of a device, print the rows, write NAME.csv.

    Args:
        name: of the file.
        cases: what there is to measure, on any device.
        measure: called with a case's arguments, `device` and `rounds`.
        rounds: by default.
    """
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--quick", action="store_true", help="the cases of `make bench-check` alone, in three rounds")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases with this text in their rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args()
    if args.quick and args.results == RESULTS:
        parser.error("--quick: give --results FOLDER, since three rounds do not replace what is stored")
    cases = [case for case in cases if case.quick or not args.quick]
    path = args.results / f"{name}.csv"
    for case in cases:
        if case.device != args.device or args.only not in f"{case.goals} {case.setting}":
            continue
        measured = None
        if case.device == "cpu" or torch.cuda.is_available():
            try:
                measured = measure(
                    **case.arguments, device=args.device, rounds=min(3, args.rounds) if args.quick else args.rounds
                )
            except Unavailable as missing:
                print(f"{name}, {case.setting}: {missing}", file=sys.stderr)
        for row in case.rows(measured):
            print(*(f"{row[column]}" for column in COLUMNS), sep=" | ", flush=True)
        # Now and not in the end: a failure loses one case.
        store(path, cases, [row | machine() for row in case.rows(measured)] if measured else [])
    print(f"rows in {path}")


def store(path: Path, cases: Sequence[Case], found: Sequence[Row], stored: Sequence[Row] | None = None) -> None:
    """Write a file with a row for each comparison of these cases: as found, else as stored, else as not measured.

    Args:
        path: of the file.
        cases: all of the benchmark.
        found: rows that were measured now.
        stored: rows from before; by default those in the file.
    """
    known = {key(row): row for row in (read_rows(path) if stored is None else stored) if is_measured(row)}
    known |= {key(row): row for row in found}
    write_rows(path, [known.get(key(row), row) for case in cases for row in case.rows(None)])


def is_measured(row: Row) -> bool:
    """Whether it has a ratio."""
    return row.get("ratio") not in (None, "", NOT_MEASURED)


def key(row: Row) -> tuple[object, ...]:
    """What a row compares."""
    return tuple(row[name] for name in ("what", "against", "setting", "device"))


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file with the common columns; none of a file without them, or that is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return list(reader) if set(COLUMNS) <= set(reader.fieldnames or ()) else []  # type: ignore[arg-type]


def write_rows(path: Path, rows: list[Row]) -> Path:
    """Write a CSV file with the columns of all rows: the common first, the machine's last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    last = machine()
    own = list(dict.fromkeys(name for row in rows for name in row if name not in last))
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*own, *last], restval="")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)  # whole or not at all, whenever this process is killed
    return path


def write_csv(name: str, rows: list[Row]) -> Path:
    """Write benchmarks/results/NAME.csv: the rows, each with the machine's columns."""
    return write_rows(RESULTS / f"{name}.csv", [row | machine() for row in rows])


def machine() -> dict[str, str]:
    """What ran, and on what: the columns that every results file has."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {"torch": torch.__version__} | {name: _version(name) for name in ("lightning", "timm", "triton")}
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "cpu": f"{cpu or platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads",
        "accelerator": accelerator,
        **versions,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
