"""Plots and table of docs/performance.md, from benchmarks/results.

python -m benchmarks.plots
"""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.harness import RESULTS, Row, is_measured, read_rows
from benchmarks.page import PAGE, all_rows, with_table

FOLDER = PAGE.parent / "performance"


def number(row: Row, name: str) -> float:
    """A cell."""
    return float(str(row[name]))


def operator(axes: Axes, rows: list[Row]) -> None:
    """Ratio per shape, a mark for each thing that it is compared with."""
    settings = list(dict.fromkeys(f"{row['what']}, {row['setting']}" for row in rows))
    for against in dict.fromkeys(str(row["against"]) for row in rows):
        mine = [row for row in rows if row["against"] == against]
        ratios = [number(row, "ratio") for row in mine]
        spread = [
            [ratio - number(row, "lowest") for ratio, row in zip(ratios, mine, strict=True)],
            [number(row, "highest") - ratio for ratio, row in zip(ratios, mine, strict=True)],
        ]
        places = [settings.index(f"{row['what']}, {row['setting']}") for row in mine]
        axes.errorbar(ratios, places, xerr=spread, fmt="o", capsize=2, label=f"against {against}")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(settings)), settings, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ratio of time")


def context(axes: Axes, rows: list[Row]) -> None:
    """Measured time ratio over T, beside the FLOP ratio."""
    for name, mine in groupby(rows, lambda row: f"{str(row['setting']).split(',')[0]}, {row['device']}"):
        points = list(mine)
        lengths = [number(row, "T") for row in points]
        (line,) = axes.plot(lengths, [number(row, "time_ratio") for row in points], "o-", label=f"{name}: time")
        for column, style in (("flop_ratio", "--"), ("causal_flop_ratio", ":")):
            label = f"{name}: {column.replace('_', ' ').replace('flop', 'FLOP')}"
            axes.plot(lengths, [number(row, column) for row in points], style, color=line.get_color(), label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("T, tokens of a sequence")
    axes.set_ylabel("TokenFormer / wider Transformer")


def generation(axes: Axes, rows: list[Row]) -> None:
    """Tokens a second over length."""
    for name, mine in groupby(
        rows, lambda row: f"{str(row['setting']).split(',')[0]}, batch {row['batch_size']}, {row['device']}"
    ):
        points = list(mine)
        lengths = [number(row, "length") for row in points]
        for who, style in (("cached", "o-"), ("baseline", "x--"), ("uncached", "s:")):
            axes.plot(lengths, [number(row, f"{who}_tokens_per_s") for row in points], style, label=f"{name}: {who}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens written")
    axes.set_ylabel("tokens/s")


DRAWN: dict[str, tuple[Callable[[Axes, list[Row]], None], str]] = {
    "operator": (operator, ""),
    "context": (context, ""),
    "generation": (generation, "without the cache"),  # one row of each case is enough
}


def draw(name: str, results: Path = RESULTS, folder: Path = FOLDER) -> Path | None:
    """One plot; None where nothing was measured."""
    function, against = DRAWN[name]
    rows = [row for row in read_rows(results / f"{name}.csv") if is_measured(row)]
    rows = [row for row in rows if not against or row["against"] == against]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    function(axes, rows)
    axes.legend(fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return path


def main() -> None:
    """Make the plots and the table anew."""
    for name in DRAWN:
        print(draw(name) or f"{name}: nothing was measured")
    PAGE.write_text(with_table(PAGE.read_text(), all_rows()))
    print(PAGE)


if __name__ == "__main__":
    main()
