"""Time peers in turn in one process, so that a machine whose speed drifts treats them alike; write rows as CSV."""

import csv
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def time_in_turn(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` per contender after one warm-up, taken in turn: A B C A B C ..."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for measured in range(rounds + 1):
        for name, call in contenders.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if measured:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: dict[str, list[float]], name: str, peer: str) -> tuple[float, float, float]:
    """(median, lowest, highest) of the round-by-round time ratio name / peer."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[peer], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def machine() -> dict[str, str]:
    """What ran, and on what: the columns that every results file has."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "cpu": f"{cpu or platform.machine()}, {torch.get_num_threads()} threads",
        "accelerator": accelerator,
        "torch": torch.__version__,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write_csv(name: str, rows: list[dict[str, object]]) -> Path:
    """Write benchmarks/results/NAME.csv: the rows, each with the machine's columns."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    rows = [row | machine() for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
