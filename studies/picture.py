"""The picture of a study: loss over what its cells cost or have, a line for each kind of model; SVG, the same bytes."""

import io
import statistics
from collections import defaultdict

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from studies.runner import Study

STYLE = {"svg.hashsalt": "studies", "svg.fonttype": "none", "font.size": 8, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}

LABELS = {"flops": "training FLOPs", "stage flops": "FLOPs of the last training", "params": "parameters"}
LABELS |= {"cpu_seconds": "processor seconds"}

Point = tuple[float, list[float]]  # x, the losses of the seeds


def draw(study: Study) -> str:
    """An SVG with a panel for each `x` of the study's `picture`, whose `lines` are the settings that tell lines apart.

    Points are means of the seeds, bars go from the lowest to the highest. Empty where no cell is measured.
    """
    x_columns, lines = study.picture["x"], study.picture["lines"]
    points = [points_of(study, x, lines) for x in x_columns]
    if not all(points):
        return ""
    with plt.rc_context(STYLE), io.StringIO() as file:
        size = (3.6 * len(points) + 1.6, 3.2)
        figure, ((*panels,),) = plt.subplots(1, len(points), figsize=size, squeeze=False, sharey=True, layout="tight")
        for panel, shown, x in zip(panels, points, x_columns, strict=True):
            draw_panel(panel, shown)
            panel.set_xlabel(LABELS[x])
        panels[0].set_ylabel("loss")
        panels[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
        return file.getvalue()


def draw_panel(panel: plt.Axes, lines: dict[str, list[Point]]) -> None:
    """A line for each label."""
    for label, points in lines.items():
        places, losses = zip(*sorted(points), strict=True)
        means = [statistics.mean(seeds) for seeds in losses]
        below = [mean - min(seeds) for mean, seeds in zip(means, losses, strict=True)]
        above = [max(seeds) - mean for mean, seeds in zip(means, losses, strict=True)]
        panel.errorbar(places, means, (below, above), marker="o", markersize=3, capsize=2, linewidth=1, label=label)
    panel.set_xscale("log")


def points_of(study: Study, x: str, lines: list[str]) -> dict[str, list[Point]]:
    """The points of each line that are measured."""
    found = defaultdict(list)
    for cell in study.cells:
        rows = study.best(cell)
        if rows:
            label = ", ".join(str(cell[name]) for name in lines if cell.get(name, "") != "")
            found[label].append((float(rows[0][x]), [float(row["loss"]) for row in rows]))
    return dict(found)
