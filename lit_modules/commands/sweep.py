"""Train a config with each of several values, one run after the other, and compare.

A key with more than one value is varied; of several such keys all combinations are trained. All other options are those
of fit. Every combination is checked before the first one is trained.

  tokenformer sweep --config configs/language/quickstart.yaml --model.optim.lr 8e-3 1.6e-2 3.2e-2
  tokenformer sweep --config FILE --model.optim.lr 1e-3 2e-3 --model.optim.weight_decay 0 0.1 --trainer.max_steps 500
  tokenformer sweep --config FILE --model.optim.betas '[0.9,0.95]' '[0.9,0.99]' --run_dir runs/betas

Each run is a `tokenformer fit` with a folder of its own, in runs/NAME/sweep-KEYS or --run_dir. There, sweep.csv has a
row for each: its status, the best and the last value of best.monitor (val/loss), seconds of training; curves.png and
curves.svg have all of them. The best one at the edge of the values is pointed out.

The same command goes on with a sweep that was stopped: it leaves what has finished or diverged, resumes what was cut,
and tries again what failed. Values that are new join the table.
"""

import csv
import json
import math
import re
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from lit_modules.commands.experiment import run
from lit_modules.commands.plot import plot
from lit_modules.commands.run_folder import config_name, experiment_folder
from lit_modules.commands.submit import ParsedCLI
from lit_modules.runs.curves import Run
from lit_modules.runs.lock import RunLock
from lit_modules.runs.signals import EXIT_CODES
from lit_modules.runs.tables import write_rows

Options = list[tuple[str, list[str]]]  # of a command line: keys with their values
DONE = ("finished", "diverged")


def main(args: list[str]) -> None:
    """The command `tokenformer sweep`; its `--help` is this file's docstring.

    Raises:
        ValueError: for values that can't work, a folder with another sweep, and when no run has finished.
    """
    if not args or {"-h", "--help"} & set(args):
        print("usage: tokenformer sweep --config FILE --KEY VALUE VALUE ... [--KEY VALUE ...]\n")
        print(__doc__, end="")
        return
    options = parse(args)
    own = dict(option for option in options if option[0] in ("--run_dir", "--ckpt_path"))
    if "--ckpt_path" in own:
        raise ValueError("--ckpt_path: the runs of a sweep begin anew; to begin with weights, give --model.init_from")
    options = [option for option in options if option[0] not in own]
    varied = {key: values for key, values in options if len(values) > 1}
    if not varied:
        raise ValueError("no key has several values: give such as --model.optim.lr 1e-3 2e-3 4e-3")
    runs = [dict(zip(varied, values, strict=True)) for values in product(*varied.values())]
    configs = [run(["fit", *words(options, chosen)], ParsedCLI).config.fit for chosen in runs]
    config = configs[0]

    keys = [key.removeprefix("--") for key in varied]
    short = [key.rpartition(".")[2] for key in keys]
    labels = dict(zip(varied, short if len(set(short)) == len(short) else keys, strict=True))
    default = experiment_folder(config, config.name or config_name(args, config.model))
    folder = Path(*own["--run_dir"]) if "--run_dir" in own else default / f"sweep-{'-'.join(labels.values())}"
    names = ["-".join(f"{labels[key]}={_in_a_path(value)}" for key, value in chosen.items()) for chosen in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is given twice: give each value once")

    folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    try:
        _check_same(folder, options)
        table = Table(folder, list(labels.values()), config.best.monitor, config.best.mode)
        for number, (name, chosen) in enumerate(zip(names, runs, strict=True), 1):
            if table.status(name) in DONE:
                continue
            print(f"\n--- {number} of {len(runs)}: {name} ---", flush=True)
            code = _fit([*words(options, chosen), "--run_dir", str(folder / name), "--ckpt_path", "auto"])
            if code in EXIT_CODES.values():
                print(f"stopped in {name}: the same command goes on with it", file=sys.stderr)
                raise SystemExit(code)
            table.add(name, {labels[key]: value for key, value in chosen.items()}, code)
        print(f"\n{table.text()}")
    finally:
        lock.release()


def parse(args: list[str]) -> Options:
    """The keys of a command line, each with the values that follow it.

    Raises:
        ValueError: for a value without a key.
    """
    options: Options = []
    for arg in args:
        key, equals, value = arg.partition("=")
        if not re.match("--?[a-zA-Z]", arg):  # not a negative number
            if not options:
                raise ValueError(f"unknown argument {arg!r}: give --KEY VALUE")
            options[-1][1].append(arg)
        elif equals and not key.endswith("+"):
            options.append((key, [value]))
        else:  # `--trainer.callbacks+=EMA` is left as it is
            options.append((arg, []))
    return options


def words(options: Options, chosen: dict[str, str]) -> list[str]:
    """The command line of one run."""
    found = []
    for key, values in options:
        for value in [chosen[key]] if key in chosen else values:
            found += [f"{key}={value}"] if key.startswith("--") else [key, value]
        found += [key] if not values else []
    return found


def _in_a_path(value: str) -> str:
    return re.sub(r"[^\w.+]+", "-", value).strip("-") if not re.match(r"-[\d.]", value) else value


def _check_same(folder: Path, options: Options) -> None:
    """A sweep goes on with the same settings, else its runs could not be compared; the values may be others."""
    fixed = [(key, values) if len(values) < 2 else (key, ["..."]) for key, values in options]
    files = {
        values[0]: Path(values[0]).read_text()
        for key, values in options
        if key in ("-c", "--config") and len(values) == 1
    }
    settings = {"options": [" ".join((key, *values)) for key, values in fixed], "configs": files}
    path = folder / "sweep.json"
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n")
        return
    saved = json.loads(path.read_text())
    if saved != settings:
        then, now = (" ".join(of["options"]) for of in (saved, settings))
        what = f"{then}, now {now}" if then != now else f"another content of {', '.join(files)}"
        raise ValueError(f"{folder} holds a sweep with other settings ({what}): give another --run_dir")


def _fit(args: list[str]) -> int:
    """Train in a process of its own, whose memory and devices are free again afterwards; returns its exit code."""
    return _wait([sys.executable, "-m", "lit_modules.cli", "fit", *args])


def _wait(command: list[str]) -> int:
    """Run a command that hears of what this process is asked to do; Ctrl-C on a terminal reaches it by itself.

    Its exit code; that of the first signal if one came, for the command may have been at its end.
    """
    child = subprocess.Popen(command)
    heard: list[int] = []

    def forward(number: int, frame: Any) -> None:
        heard.append(number)
        if number != signal.SIGINT:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in EXIT_CODES}
    try:
        code = child.wait()
        return EXIT_CODES[signal.Signals(heard[0])] if heard else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Table:
    """`sweep.csv`: the runs of a sweep, those of earlier calls too.

    Args:
        folder: of the sweep.
        labels: columns of the values.
        monitor: the metric.
        mode: of it, min or max.
    """

    def __init__(self, folder: Path, labels: list[str], monitor: str, mode: str) -> None:
        self.folder, self.labels, self.monitor, self.mode = folder, labels, monitor, mode
        self.columns = ["run", *labels, "status", f"best {monitor}", "at step", f"last {monitor}", "seconds"]
        self._path = folder / "sweep.csv"
        self._rows: dict[str, dict[str, str]] = {}
        if self._path.exists():
            with self._path.open(newline="") as file:
                self._rows = {row["run"]: row for row in csv.DictReader(file)}

    def status(self, name: str) -> str | None:
        """Of a run: finished, diverged or failed; None of one that has not ended."""
        return self._rows.get(name, {}).get("status")

    def add(self, name: str, values: dict[str, str], code: int) -> None:
        """Write down how a run has ended.

        Args:
            name: of its folder.
            values: by label.
            code: its process's.
        """
        folder = self.folder / name
        row = {"run": name, **values}
        columns = Run(folder).columns if (folder / "metrics.csv").is_file() else {}
        points = list(zip(*columns.get(self.monitor, ((), ())), strict=True))  # (step, value)
        finite = [point for point in points if math.isfinite(point[1])]
        if finite:
            step, value = (min if self.mode == "min" else max)(finite, key=lambda point: point[1])
            row |= {self.columns[-4]: f"{value:.6g}", "at step": f"{step:g}"}
        if points:
            row[self.columns[-2]] = f"{points[-1][1]:.6g}"
        if "train/seconds" in columns:
            row["seconds"] = f"{columns['train/seconds'][1, -1]:.1f}"
        diverged = len(finite) < len(points) or any(folder.glob("nonfinite-step-*.pt"))
        row["status"] = "diverged" if diverged else "failed" if code else "finished"
        self._rows[name] = row
        write_rows(self._path, self.columns, self._sorted())

    def _sorted(self) -> list[dict[str, str]]:
        def place(row: dict[str, str]) -> list[tuple[float, str]]:
            return [(_number(row[label]), row[label]) for label in self.labels]

        return sorted(self._rows.values(), key=place)

    def text(self) -> str:
        """The table, the best run, and what to try next; draws the curves.

        Raises:
            ValueError: when no run has finished.
        """
        rows = self._sorted()
        cells = [self.columns, *([row.get(column) or "" for column in self.columns] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        if not any(row["status"] == "finished" for row in rows):
            raise ValueError("no run has finished; what each says is above\n" + "\n".join(lines))
        best_of = self.columns[-4]
        drawn = [row for row in rows if row.get(best_of)]
        finished = [row for row in drawn if row["status"] == "finished"]
        if not finished:
            return "\n".join([*lines, f"best.monitor={self.monitor} is not logged: there is no best one"])
        best = (min if self.mode == "min" else max)(finished, key=lambda row: float(row[best_of]))
        lines += ["", f"best: {best['run']}, {self.monitor} {best[best_of]} at step {best['at step']}"]
        for label in self.labels:
            values = sorted({_number(row[label]) for row in rows})
            for end, direction in ((0, "lower"), (-1, "higher")):
                if len(values) > 1 and "seed" not in label and values[end] == _number(best[label]) < math.inf:
                    lines.append(f"{label}={best[label]} is the edge of its values: try {direction} ones too")
        pictures = plot([self.folder / row["run"] for row in drawn], self.folder / "curves", self.monitor)
        return "\n".join([*lines, f"wrote {self._path} {' '.join(map(str, pictures))}"])


def _number(value: str) -> float:
    """Of what is none: infinity."""
    try:
        return float(value)
    except ValueError:
        return math.inf
