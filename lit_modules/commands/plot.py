"""Draw the loss of runs over optimizer steps, training tokens, cumulative training FLOPs and wall-clock training time.

Thick lines with markers are validation, thin ones training. A tick on the curve, with a line up to its label, is a
growth. Runs differ by dashes, markers and grey level, not only by colour. The fall from the initial loss, in a run's
first 20th, may leave the picture. A run may still be training.

  tokenformer plot runs/quickstart/20260131-120000-ab12
      writes curves.png and curves.svg into that folder
  tokenformer plot runs/grown/2026* runs/scratch/2026* --out pictures/grown-or-scratch
      several runs in one picture, pictures/grown-or-scratch.png and .svg
"""

import argparse
import re
from pathlib import Path

import matplotlib

from lit_modules.runs.curves import Run, draw


def plot(folders: list[Path], out: Path | None = None, metric: str = "val/loss") -> list[Path]:
    """Draw runs into `out`.png and `out`.svg (default: `curves`, in the one run's folder or here), and return these.

    Raises:
        ValueError: see `Run` and `draw`.
    """
    runs = [Run(folder) for folder in folders]
    figure = draw(runs, metric)
    out = out or (runs[0].folder if len(runs) == 1 else Path()) / "curves"
    out.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (out.with_name(re.sub(r"\.(png|svg)$", "", out.name) + ending) for ending in (".png", ".svg"))
    figure.savefig(png)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tokenformer"}):  # text as text, same bytes
        figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


def main(args: list[str]) -> None:
    """The command `tokenformer plot`; its `--help` is this file's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tokenformer plot", description=__doc__, formatter_class=layout)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, runs/NAME/DATE-TIME-RANDOM")
    parser.add_argument("--out", type=Path, help="path of the pictures, with .png, .svg or neither")
    parser.add_argument("--metric", default="val/loss", help="a column of metrics.csv; for val/... its train/... too")
    given = parser.parse_args(args)
    print("wrote", *plot(given.runs, given.out, given.metric))
