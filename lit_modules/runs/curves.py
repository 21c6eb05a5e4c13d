"""Curves of what runs have logged: read from their `metrics.csv` and `growth.csv`, and drawn.

Thick lines with markers are validation, thin ones training. A tick on the curve, with a line up to its label, is a
growth. Runs differ by dashes, markers and grey level, not only by colour. The fall from the initial loss, in a run's
first 20th, may leave the picture. A run may still be training.
"""

import math
import re
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_modules.runs.tables import number, read_rows

PANELS = {
    "step": "optimizer steps",
    "train/tokens": "training tokens",
    "train/flops": "training FLOPs",
    "train/seconds": "wall-clock training time",
}
PARTS = {"train": "training", "val": "validation"}
# Neighbours are far apart in grey; cycles of 6, 6 and 7 keep 42 runs apart.
COLOURS = ("#111111", "#e07b00", "#1f4e9e", "#5db5a4", "#7a1040", "#3c8d40")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (10, 3)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class Run:
    """What a run logged: `columns` are (steps done, values) of `metrics.csv`, `growths` the rows of `growth.csv`.

    Raises:
        ValueError: if the folder is not a run's, or a file of it has no header or something else than numbers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder = folder.parent if folder.name == "metrics.csv" else folder
        self.columns: dict[str, Any] = {}
        if not (folder / "metrics.csv").is_file():
            near = (parent for parent in folder.absolute().parents if (parent / "metrics.csv").is_file())
            run = next(near, "runs/NAME/STAMP")
            raise ValueError(f"{folder}/metrics.csv: no such file; give the folder of a run, such as {run}")
        columns, rows = read_rows(log := folder / "metrics.csv")
        for column in {*columns} - {"step"}:
            points = [(int(row["step"]) + 1, number(log, row, column)) for row in rows if row[column]]  # row 9: step 10
            if points:
                self.columns[column] = np.array(points, dtype=float).T
        growth = folder / "growth.csv"
        self.growths = read_rows(growth)[1] if growth.is_file() else []

    def over(self, axis: str, steps: Any) -> Any:
        """Steps on another axis, linear between the rows that log it: those of validation don't."""
        if axis == "step":
            return steps
        known = {0.0: 0.0} | dict(zip(*self.columns[axis], strict=True))
        if axis != "train/seconds":  # a growth's seconds are its own; its tokens and FLOPs are the run's until then
            table, column = self.folder / "growth.csv", axis.removeprefix("train/")
            known |= {float(row["step"]): number(table, row, column) for row in self.growths}
        x, y = np.array(sorted(known.items())).T
        beyond = y[-1] + (y[-1] - y[-2]) / (x[-1] - x[-2]) * (steps - x[-1])  # a validation after the last such row
        return np.where(steps > x[-1], beyond, np.interp(steps, x, y))


def draw(runs: list[Run], metric: str = "val/loss", panels: tuple[str, ...] = tuple(PANELS)) -> Figure:
    """A metric of runs, in training and validation, over each of `panels`.

    Raises:
        ValueError: for a run that logged the metric neither in training nor in validation.
    """
    both = dict.fromkeys((re.sub("^val/", "train/", metric), metric))
    found = [{column: run.columns[column] for column in both if column in run.columns} for run in runs]
    for run, curves in zip(runs, found, strict=True):
        if not curves:
            logged = ", ".join(sorted(run.columns)) or "nothing yet"
            raise ValueError(f"{run.folder}/metrics.csv: no {metric}; choose a --metric that is logged ({logged})")
    figure = Figure(figsize=(11, 8) if len(panels) > 1 else (7, 4.2), dpi=150, layout="constrained")
    grid = figure.subplots(math.ceil(len(panels) / 2), min(len(panels), 2), sharey=True, squeeze=False)
    # The fall from the initial loss would flatten all that follows: a run's first 20th may leave the picture.
    heights = np.concatenate([y[steps > steps[-1] / 20] for curves in found for steps, y in curves.values()])
    if (finite := heights[np.isfinite(heights)]).size:
        margin = 0.05 * np.ptp(finite) or 0.1
        grid[0, 0].set_ylim(finite.min() - margin, finite.max() + margin)
    for axes, axis in zip(grid.flat, panels, strict=True):
        _draw_panel(axes, runs, found, axis)
    name = metric.rpartition("/")[2]
    figure.supylabel("loss (nats)" if name == "loss" else name.replace("_", " "), fontsize="medium")
    title = "vertical line: growth, parameters before → after" if any(run.growths for run in runs) else None
    lines = [line for line in grid[0, 0].get_lines() if not line.get_label().startswith("_")]
    lines.sort(key=lambda line: not line.get_label().endswith("validation"))  # a column of the legend each
    small = {"fontsize": "small", "title_fontsize": "small"}
    figure.legend(handles=lines, title=title, ncols=2, loc="outside upper center", frameon=False, **small)
    return figure


def _draw_panel(axes: Axes, runs: list[Run], found: list[dict[str, Any]], axis: str) -> None:
    growths: list[tuple[float, float, str, dict[str, Any]]] = []
    lacking = []
    hours = any(run.columns[axis][1, -1] >= 3600 for run in runs if axis in run.columns)
    size, unit = ((3600, " (hours)") if hours else (60, " (minutes)")) if axis == "train/seconds" else (1, "")
    looks = zip(cycle(COLOURS), cycle(DASHES), cycle(MARKERS), strict=False)
    for run, curves, name, (colour, dashes, marker) in zip(runs, found, _names(runs), looks, strict=False):
        if axis != "step" and axis not in run.columns:
            lacking.append(f"{name} logged no {axis}")
            continue
        for column, (steps, values) in curves.items():
            x, part = run.over(axis, steps) / size, column.partition("/")[0]
            label = f"{name} {PARTS.get(part, part)}"
            look: dict[str, Any] = {"linewidth": 1.7, "marker": marker, "markevery": math.ceil(len(x) / 15)}
            if part == "train":
                look = {"linewidth": 0.8, "alpha": 0.7}
                window = np.ones(len(x) // 200 * 2 + 1)  # no denser than the picture can show
                values = np.convolve(values, window, "same") / np.convolve(np.ones(len(x)), window, "same")
                label += f", mean of {len(window)} rows" if len(window) > 1 else ""
            axes.plot(x, values, color=colour, linestyle=dashes, markersize=5, label=label, **look)
        for row in run.growths:
            at = float(run.over(axis, float(row["step"]))) / size
            before, after = (number(run.folder / "growth.csv", row, f"params_{when}") for when in ("before", "after"))
            text = f"{short(before)} → {short(after)}"
            growths.append((at, float(np.interp(at, x, values)), text, {"colors": colour, "linestyles": dashes}))
    _mark(axes, growths)
    axes.text(0.98, 0.65, "\n".join(lacking), transform=axes.transAxes, ha="right", va="top", fontsize="small")
    axes.set_xlabel(PANELS[axis] + unit)
    if axis == "train/tokens":
        axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _mark(axes: Axes, growths: list[tuple[float, float, str, dict[str, Any]]]) -> None:
    """A tick on the curve and a line up to a label; labels that would overlap stand below each other, up to three."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    placed: list[tuple[float, str]] = []
    for x, y, text, style in growths:
        axes.plot([x], [y], marker="|", markersize=13, markeredgewidth=1.6, color=style["colors"], zorder=4)
        axes.vlines(x, y, top, linewidth=0.8, **style)
        near = {label for at, label in placed if abs(at - x) < 0.04 * (right - left)}
        if text not in near and len(near) < 3:
            where = (x, top - (0.01 + 0.28 * len(near)) * (top - bottom))
            shift: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "rotation": 90, "va": "top"}
            behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
            axes.annotate(text, where, **shift, fontsize="small", color=style["colors"], bbox=behind)
            placed.append((x, text))


def _names(runs: list[Run]) -> list[str]:
    """The experiment's name, or that of a folder which the user named; longer where two are the same."""
    folders = [run.folder.resolve() for run in runs]
    names = [path.parent.name if re.match(r"\d{8}-\d{6}-", path.name) else path.name for path in folders]
    for longer in ("{0.parent.name}/{0.name}", "{0}"):
        names = [
            longer.format(path) if names.count(name) > 1 else name for path, name in zip(folders, names, strict=True)
        ]
    return names


def short(count: float) -> str:
    """Three digits: 1.1M for 1,100,000."""
    count = float(f"{count:.3g}")
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"
