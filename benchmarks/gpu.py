"""What a GPU shows in a few minutes, the most valuable first. Each row is stored the moment it is measured.

    python -m benchmarks gpu [--minutes 8] [--out FOLDER]

No case starts that would not end in time. Called again it goes on: what is stored for this card, this torch and this
code is not measured again. Cases run in a process of their own, which is replaced when one fails, so that a case that
crashes, hangs or is out of memory costs no other. The last lines are a table, and what is left.
"""

import argparse
import hashlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from modulefinder import ModuleFinder
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.harness import (
    COLUMNS,
    RESULTS,
    ROOT,
    Case,
    Measured,
    Row,
    Unavailable,
    is_measured,
    key,
    machine,
    read_rows,
    store,
)

# Benchmarks in the order of their worth, each with a text that its cases have in their rows; then all the rest.
ORDER = (
    ("correctness", ""),
    ("operator", "N 3072, bfloat16"),
    ("operator", "N 576, bfloat16"),
    ("operator", "N 2140, bfloat16"),
    ("operator", "N 34480, bfloat16"),
    ("memory", "bfloat16"),
    ("training", "124M"),
    ("vit", ""),
    ("generation", ", 128 tokens"),
    ("training", "354M"),
    ("training", "757M"),
    ("context", "757M"),
    ("memory", ""),
    ("operator", "bfloat16"),
    ("context", ""),
    ("generation", ""),
    ("operator", ""),
    ("optimizer", ""),
)
ROUNDS = 3
START = 20.0  # seconds until a fresh process has imported everything
END = 5.0  # seconds kept for the table

Place = tuple[str, int]  # a benchmark, and which of its cases


@dataclass(frozen=True)
class Plan:
    """Cases in the order of their worth.

    Attributes:
        package: of the benchmarks.
        places: the cases.
        device: that they are for.
        out: folder of the results.
    """

    package: str
    places: Sequence[Place]
    device: str
    out: Path

    def case(self, place: Place) -> Case:
        """The case at a place."""
        return cases_of(f"{self.package}.{place[0]}")[place[1]]

    def stored(self, name: str) -> list[Row]:
        """The rows of a benchmark: those of `out`, or before there are any, those of the project."""
        path = self.out / f"{name}.csv"
        return read_rows(path if path.exists() else RESULTS / path.name)

    def origin(self, name: str) -> Row:
        """What a stored row must have come from to be as good as a new one."""
        made_by = machine() | {"code": code_of(f"{self.package}.{name}")}
        return {column: made_by[column] for column in ("accelerator", "torch", "code")}

    def known(self, place: Place) -> list[Row]:
        """The rows of a case as they are stored, from this card and code; empty unless all are there."""
        origin, wanted = self.origin(place[0]), [key(row) for row in self.case(place).rows(None)]
        rows = {key(row): row for row in self.stored(place[0]) if is_measured(row) and origin.items() <= row.items()}
        return [rows[name] for name in wanted] if rows.keys() >= set(wanted) else []

    def keep(self, place: Place, measured: Measured, seconds: float) -> list[Row]:
        """Store what was measured; its rows."""
        made_by = machine() | self.origin(place[0]) | {"seconds": f"{seconds:.0f}"}
        made_by["command"] = f"python -m {self.package} gpu"
        rows = [row | made_by for row in self.case(place).rows(measured)]
        name = place[0]
        store(self.out / f"{name}.csv", cases_of(f"{self.package}.{name}"), rows, self.stored(name))
        return rows


def cases_of(module: str) -> list[Case]:
    """All cases of a benchmark."""
    return importlib.import_module(module).CASES


def in_order(order: Sequence[tuple[str, str]], package: str, device: str) -> list[Place]:
    """Each case of a device once, where it is first named."""
    found = {
        (name, i): None
        for name, text in order
        for i, case in enumerate(cases_of(f"{package}.{name}"))
        if case.device == device and text in f"{case.goals} {case.setting}"
    }
    return list(found)


@cache
def code_of(module: str) -> str:
    """Fingerprint of this project's code that a benchmark runs: what it imports here, and all of those packages."""
    finder = ModuleFinder([str(ROOT)])
    finder.import_hook(module)
    files = {Path(found.__file__) for found in finder.modules.values() if found.__file__}
    packages = {name.split(".")[0] for name in finder.modules} & {"tokenformer", "lit_modules", "datamodules"}
    files |= {file for package in packages for file in (ROOT / package).rglob("*.py")}
    digest = hashlib.sha256()
    for file in sorted(file.resolve() for file in files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class Failed(Exception):
    """A case that gave no figures, and why."""


class Worker:
    """A process that measures cases, one after the other."""

    def __init__(self, package: str) -> None:
        context = get_context("spawn")  # a fork would share this process's accelerator
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, package))
        self.process.start()
        theirs.close()

    def measure(self, place: Place, seconds: float) -> Measured:
        """What a case's function returns.

        Raises:
            Failed: with the reason; also when it takes longer than so many seconds, or its process dies.
        """
        self.pipe.send(place)
        if not self.pipe.poll(seconds):
            raise Failed(f"not done after {seconds:.0f} s")
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise Failed(f"its process ended with code {self.process.exitcode}") from None
        if isinstance(answer, str):
            raise Failed(answer)
        return answer

    def stop(self) -> None:
        """End the process and those that it has started."""
        if self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has no group of its own yet
                self.process.kill()
        self.process.join()
        self.pipe.close()


def serve(pipe: Connection, package: str) -> None:
    """The worker's loop: takes places, answers with what was measured or with why it was not."""
    os.setsid()
    while True:
        try:
            name, i = pipe.recv()
        except EOFError:  # the one who asks is gone
            return
        try:
            module = importlib.import_module(f"{package}.{name}")
            case = module.CASES[i]
            answer = module.measure(**case.arguments, device=case.device, rounds=ROUNDS)
        except Unavailable as missing:
            answer = str(missing)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            answer = f"{type(error).__name__}: {error}".split("\n")[0]
        pipe.send(answer)


def measure_all(plan: Plan, deadline: float, clock: Callable[[], float] = time.monotonic) -> list[Row]:
    """Measure what is not stored and ends before the deadline; print the table and what is left; all rows."""
    rows, failed, left = list[Row](), dict[str, str](), list[Case]()
    worker: Worker | None = None
    try:
        for place in plan.places:
            case = plan.case(place)
            if known := plan.known(place):
                rows += known
                continue
            if clock() + case.seconds + (0 if worker else START) > deadline:
                left.append(case)
                continue
            worker = worker or Worker(plan.package)
            start = clock()
            try:
                # Twice as long as it should take, for it may be an estimate that is wrong and not the case.
                measured = worker.measure(place, min(deadline - start, 2 * case.seconds + START))
                rows += (found := plan.keep(place, measured, clock() - start))
                print(*map(line, found), sep="\n", flush=True)
            except Failed as reason:
                failed[title(case)] = str(reason)
                print(f"{title(case)}: FAILED: {reason}", flush=True)
                worker.stop()
                worker = None
    finally:
        if worker:
            worker.stop()
    print("", *map(line, rows), sep="\n")
    for name, why in failed.items():
        print(f"failed: {name}: {why}")
    print(f"left: {len(left)} cases, about {sum(case.seconds for case in left) / 60:.0f} minutes")
    for case in left:
        print(f"  {title(case)}")
    print(f"rows in {plan.out}", flush=True)
    return rows


def title(case: Case) -> str:
    """What a case measures, for a reader."""
    return f"{next(iter(case.goals))[0]}, {case.setting}"


def line(row: Row) -> str:
    """A row of the short table."""
    return " | ".join(str(row[column]) for column in COLUMNS if column != "device")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="until it ends, by default 8")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * args.minutes - END
    if not torch.cuda.is_available():
        sys.exit("benchmarks gpu: torch.cuda.is_available() is False here: it needs a GPU and torch built for CUDA")
    places = in_order(ORDER, "benchmarks", "cuda")
    print(f"{len(places)} cases, {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    measure_all(Plan("benchmarks", places, "cuda", args.out), deadline)


if __name__ == "__main__":
    main()
