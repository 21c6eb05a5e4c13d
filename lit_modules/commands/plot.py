"""Draw the loss of runs over optimizer steps, training tokens, cumulative training FLOPs and wall-clock training time.

Thick lines with markers are validation, thin ones training. A tick on the curve, with a line up to its label, is a
growth. Runs differ by dashes, markers and grey level, not only by colour. The fall from the initial loss, in a run's
first 20th, may leave the picture. A run may still be training.

  tokenformer plot runs/quickstart/20260131-120000-ab12
      writes curves.png and curves.svg into that folder
  tokenformer plot runs/grown/2026* runs/scratch/2026* --out pictures/grown-or-scratch
      several runs in one picture, pictures/grown-or-scratch.png and .svg
  tokenformer plot runs/sweep
      all runs in a folder and below it, in one picture
"""

import argparse
import re
from pathlib import Path

import matplotlib

from lit_modules.runs.curves import Run, draw


def plot(folders: list[Path], out: Path | None = None, metric: str = "val/loss") -> list[Path]:
    """Draw runs into `out`.png and `out`.svg (default: `curves`, in the one folder or here), and return these.

    A folder that is not a run's stands for all trainings below it.

    Raises:
        ValueError: see `Run` and `draw`.
    """
    runs = [Run(run) for folder in folders for run in _runs_in(folder)]
    figure = draw(runs, metric)
    folder = runs[0].folder if len(runs) == 1 else folders[0] if len(folders) == 1 else Path()
    out = out or folder / "curves"
    out.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (out.with_name(re.sub(r"\.(png|svg)$", "", out.name) + ending) for ending in (".png", ".svg"))
    figure.savefig(png)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tokenformer"}):  # text as text, same bytes
        figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


def _runs_in(folder: Path) -> list[Path]:
    """The folder, if it is a run's or has none; those of `validate`, `test` and `predict` are none."""
    if folder.name == "metrics.csv" or (folder / "metrics.csv").is_file():
        return [folder]
    below = sorted(folder.glob("**/metrics.csv"))
    return [path.parent for path in below if "train/" in path.read_text(errors="replace").partition("\n")[0]] or [
        folder
    ]


def main(args: list[str]) -> None:
    """The command `tokenformer plot`; its `--help` is this file's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tokenformer plot", description=__doc__, formatter_class=layout)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one of runs")
    parser.add_argument("--out", type=Path, help="path of the pictures, with .png, .svg or neither")
    parser.add_argument("--metric", default="val/loss", help="a column of metrics.csv; for val/... its train/... too")
    given = parser.parse_args(args)
    print("wrote", *plot(given.runs, given.out, given.metric))
