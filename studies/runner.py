"""The cells of a study, each at its own best learning rate and with several seeds: a row each, several at a time."""

import csv
import importlib
import itertools
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import machine, write_rows

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent

Settings = dict[str, Any]
Row = dict[str, Any]


class Study:
    """The rows of `results/NAME.csv`, and how those are measured that it lacks.

    The YAML file has the `question`; for the page the `claims` of the paper that it checks, what its `picture` shows,
    and whether power `laws` are fitted to it; `run`, a module of this package whose function `run` takes a cell's
    settings, `lr` and `seed` and returns a row's figures, `loss` among them; `seeds`, their number; and `cells`, each a
    product of its lists. A cell has either an `lr`, or an `lr_near`: there the search for the best rate begins, with
    seed 0 and in steps of two, until one is better than both of its neighbours. The other seeds are run at that one.

    Args:
        name: of the study.
        folder: where its YAML and its results are.
        scale: of the steps of all trainings, its whole root that of widths; rows of another scale are in a file beside.
    """

    def __init__(self, name: str, folder: Path = FOLDER, scale: float = 1.0) -> None:
        path = folder / f"{name}.yaml"
        if not path.exists():
            known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
            raise ValueError(f"there is no study {name!r}: choose one of {known}")
        spec = yaml.safe_load(path.read_text())
        self.name, self.question, self.claims = name, spec["question"], spec.get("claims", [])
        self.laws: bool = spec.get("laws", False)
        self.picture: Settings = spec.get("picture", {})
        self.module, self.seeds = f"studies.{spec['run']}", spec["seeds"]
        self.cells = [cell for product in spec["cells"] for cell in expand(product)]
        names = dict.fromkeys(name for cell in self.cells for name in cell)
        self.settings = [name for name in names if name not in ("lr", "lr_near")]  # that tell cells apart
        self.columns = [*self.settings, "lr", "seed"]
        self.scale = scale
        self.path = folder / "results" / (f"{name}.csv" if scale == 1 else f"{name}-x{scale:g}.csv")
        self.rows: list[Row] = list(csv.DictReader(self.path.open(newline=""))) if self.path.exists() else []
        self._writing = threading.Lock()

    def measure(self, jobs: int = 1) -> None:
        """Measure what is missing, `jobs` trainings at a time."""
        with trainers(jobs, self.scale) as processes:
            self.measure_in(processes, jobs)

    def measure_in(self, processes: ProcessPoolExecutor, jobs: int, search_rates: bool = True) -> None:
        """Measure what is missing, each at its best rate; else at the one where a search would begin."""
        failed = threading.Event()

        def measure_cell(cell: Settings) -> None:
            if not failed.is_set():
                try:
                    self._measure_cell(cell, processes, search_rates)
                except BaseException:
                    failed.set()  # before this thread takes the next cell
                    raise

        with ThreadPoolExecutor(jobs) as searches:
            try:
                for done in [searches.submit(measure_cell, cell) for cell in self.cells]:
                    done.result()
            except BaseException:  # an error or Ctrl-C: begin nothing more
                searches.shutdown(wait=False, cancel_futures=True)
                processes.shutdown(wait=False, cancel_futures=True)
                raise

    def _measure_cell(self, cell: Settings, processes: ProcessPoolExecutor, search_rates: bool = True) -> None:
        settings = {name: value for name, value in cell.items() if name not in ("lr", "lr_near")}

        def loss(lr: float, seed: int) -> float:
            wanted = {**settings, "lr": f"{lr:g}", "seed": seed}
            row = self.find(wanted)
            if row is None:
                found = processes.submit(_timed, self.module, {**settings, "lr": lr, "seed": seed}).result()
                row = wanted | found
                self._add(row)
            return float(row["loss"]) if math.isfinite(float(row["loss"])) else math.inf

        best = cell["lr"] if "lr" in cell else cell["lr_near"]
        if "lr" not in cell and search_rates:
            best = search(lambda lr: loss(lr, 0), cell["lr_near"])
        for seed in range(self.seeds):
            loss(best, seed)

    def _add(self, row: Row) -> None:
        with self._writing:
            self.rows.append({name: str(value) for name, value in row.items()})
            write_rows(self.path, self.rows)
            shown = ", ".join(f"{name} {row[name]}" for name in self.columns if row.get(name, "") != "")
            print(f"{shown}: {row['loss']} in {row['seconds']} s", flush=True)

    def find(self, wanted: Mapping[str, Any]) -> Row | None:
        """The row with these settings."""
        for row in self.rows:
            if all(row.get(name, "") == str(wanted.get(name, "")) for name in self.columns):
                return row
        return None

    def best(self, cell: Settings) -> list[Row]:
        """The rows of a cell at its best rate, one a seed; none unless all seeds are there."""
        wanted = {name: str(cell.get(name, "")) for name in self.settings}
        rows = [row for row in self.rows if all(row.get(name, "") == value for name, value in wanted.items())]
        by_rate = {row["lr"]: [r for r in rows if r["lr"] == row["lr"]] for row in rows}
        complete = [found for found in by_rate.values() if len(found) == self.seeds]
        return min(complete, key=lambda found: float(found[0]["loss"]), default=[])


def expand(product: Settings) -> Iterator[Settings]:
    """Each choice of one from every list: {a: [1, 2], b: 3} -> {a: 1, b: 3}, {a: 2, b: 3}."""
    lists = [value if isinstance(value, list) else [value] for value in product.values()]
    for chosen in itertools.product(*lists):
        yield dict(zip(product, chosen, strict=True))


def search(loss: Any, near: float) -> float:
    """The rate that is better than half of it and twice it, from `near` on in steps of two."""
    tried: dict[float, float] = {}
    best = near
    while True:
        for lr in (best, best / 2, best * 2):
            if lr not in tried:
                tried[lr] = loss(lr)
        lowest = min(tried, key=lambda lr: tried[lr])
        if math.isinf(tried[lowest]):  # all diverge
            lowest = best / 2
        if lowest == best or len(tried) > 30:
            return best
        best = lowest


def trainers(jobs: int, scale: float) -> ProcessPoolExecutor:
    """Processes for so many trainings at a time, which share the cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)  # what Slurm has given, not what is there
    return ProcessPoolExecutor(jobs, get_context("spawn"), prepare, (threads, scale))


def prepare(threads: int, scale: float) -> None:
    """Set up a process that trains: with so many threads, and it ends if the study's does, even by a kill."""
    torch.set_num_threads(threads)
    os.environ["STUDY_SCALE"] = str(scale)  # for studies.training, which it has not imported yet
    study = parent_process()
    assert study is not None
    threading.Thread(target=lambda: (study.join(), os._exit(1)), daemon=True).start()


def _timed(module: str, settings: Settings) -> Row:
    start = time.perf_counter()
    row: Row = importlib.import_module(module).run(**settings)
    figures = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()}
    where = {name: value for name, value in machine().items() if name in ("cpu", "accelerator", "torch")}
    return figures | {"seconds": round(time.perf_counter() - start)} | where
