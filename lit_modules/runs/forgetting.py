"""What a model knows of each phase of its data after each: the matrix, what is forgotten, what is transferred.

L[k][j] is the loss on phase j when phases 0 .. k have been trained, L[start][j] that before any.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_modules.runs.tables import write_rows

START = "start"  # the phase of the row from before any training
METRICS = {"loss": 1, "top1": -1}  # and whether less of it is better
MEASURES = ("average", "forgetting", "backward_transfer", "forward_transfer")

Row = dict[str, Any]  # "phase", "step", and of each phase that is evaluated "NAME/loss", ...


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """Those of METRICS that rows have."""
    return [metric for metric in METRICS if any(name.endswith(f"/{metric}") for name in columns_of(rows))]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Those of all rows: a resumed run may have phases of which the rows from before know nothing."""
    return list(dict.fromkeys(name for row in rows for name in row))


def measures(rows: Sequence[Row], metric: str) -> dict[str, float]:
    """What the last of these rows means, after k phases; the rows are those of phases in order, maybe with a start.

    average: of the phases that were trained.
    forgetting: of each earlier phase, how much worse it is than it ever was after a phase (Chaudhry et al. 2018, F_k).
    backward_transfer: how much better each earlier one is than right after it (Lopez-Paz & Ranzato 2017, BWT).
    forward_transfer: how much better each phase but the first was, before it was trained, than at the start (FWT).

    Means over phases, in units of the metric. Of a loss, too, more forgetting is worse, and more transfer is better.
    Without forward transfer where a phase was not evaluated before it was trained.
    """
    sign = METRICS[metric]
    before = [row for row in rows if row["phase"] == START]
    trained = [row for row in rows if row["phase"] != START]
    names = [row["phase"] for row in trained]
    losses = [[sign * row.get(f"{name}/{metric}", math.nan) for name in names] for row in trained]
    if not trained:
        return {}
    last, earlier = losses[-1], range(len(losses) - 1)
    found = {"average": sign * _mean(last)}
    if earlier:
        found["forgetting"] = _mean([last[j] - min(x[j] for x in losses[:-1] if x[j] == x[j]) for j in earlier])
        found["backward_transfer"] = _mean([losses[j][j] - last[j] for j in earlier])
        if before:
            start = [sign * before[0].get(f"{name}/{metric}", math.nan) for name in names]
            forward = _mean([start[j + 1] - losses[j][j + 1] for j in earlier])
            found |= {"forward_transfer": forward} if math.isfinite(forward) else {}
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def with_measures(rows: Sequence[Row]) -> list[Row]:
    """The rows with what each of them means, `METRIC/forgetting` and so on."""
    return [
        row | {f"{m}/{name}": value for m in metrics_of(rows) for name, value in measures(rows[: i + 1], m).items()}
        for i, row in enumerate(rows)
    ]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """`continual.csv`: a row of each phase that was trained, first that from before any."""
    columns = [*columns_of(rows), *(f"{metric}/{name}" for metric in metrics_of(rows) for name in MEASURES)]
    write_rows(path, columns, [dict.fromkeys(columns, "") | row for row in with_measures(rows)])


def draw(rows: Sequence[Row]) -> Any:
    """The matrix of each metric, a figure of matplotlib: a row for each phase trained, a column for each evaluated."""
    from matplotlib.figure import Figure  # takes a second to import

    metrics = metrics_of(rows)
    names = [name.removesuffix(f"/{metrics[0]}") for name in columns_of(rows) if name.endswith(f"/{metrics[0]}")]
    width, height = 1.5 + 1.1 * len(names), 1.6 + 0.6 * len(rows)
    figure = Figure((width * len(metrics), height), layout="constrained")
    for metric, axes in zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0], strict=True):
        values = [[row.get(f"{name}/{metric}", math.nan) for name in names] for row in rows]
        axes.imshow(values, cmap="Greys" if METRICS[metric] > 0 else "Greys_r", aspect="auto", alpha=0.5)
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                axes.text(x, y, f"{value:.3f}", ha="center", va="center")
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(rows)), [row["phase"] for row in rows])
        axes.set(xlabel=f"{metric} on", ylabel="after")
        axes.set_title("\n".join(told(measures(rows, metric)) or [" "]), fontsize="small")
    return figure


def told(found: Mapping[str, float]) -> list[str]:
    """Measures for a reader."""
    return [f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items()]
