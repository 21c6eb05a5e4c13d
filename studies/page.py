"""docs/study.md, from the results alone: a table for each study, a line a cell."""

import importlib
import statistics
from pathlib import Path

from studies.runner import FOLDER, Settings, Study

PAGE = FOLDER.parent / "docs/study.md"
HEAD = """# Studies

Each line is a cell of a study at its own best learning rate, but for the kind `base`, whose rate is given: the search \
began in the middle of a grid in steps of two \
and ended when a rate was better than its neighbours, with seed 0; then the other seeds were run at it. Mean of the \
seeds, and each of them in their order. What follows from it is in [the log](log.md).

Made by `python -m studies page` from studies/results; `python -m studies NAME` measures, or goes on measuring.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(section(Study(path.stem)) for path in sorted(FOLDER.glob("*.yaml")))


def section(study: Study) -> str:
    """What a study asks, and its table."""
    asked = (importlib.import_module(study.module).__doc__ or "").split("\n\n", 1)
    names = [name for name in study.columns if name not in ("lr", "seed")]
    cells = [{name: cell.get(name, "") for name in names} for cell in study.cells]
    shown = [name for name in names if len({cell[name] for cell in cells}) > 1]
    lines = [
        f"| {' | '.join([*shown, 'rate', 'loss', 'jump', 'parameters', 'TFLOP'])} |",
        "|---" * (len(shown) + 5) + "|",
    ]
    lines += [f"| {' | '.join([*(str(cell[name]) for name in shown), *figures(study, cell)])} |" for cell in cells]
    return f"\n## {study.name}: {asked[0]}\n\n{described(asked)}" + "\n".join(lines) + "\n"


def described(asked: list[str]) -> str:
    """The module's text about itself, as it stands there."""
    return f"```text\n{asked[1].strip()}\n```\n\n" if len(asked) > 1 else ""


def figures(study: Study, cell: Settings) -> list[str]:
    """Best rate; mean and seeds of the loss; how far growth moved it; parameters; training FLOPs from the start."""
    rows = study.best(**cell)
    if not rows:
        return ["", "not run yet", "", "", ""]
    losses = [float(row["loss"]) for row in rows]
    each = ", ".join(f"{loss:.3f}" for loss in losses)
    jumps = [float(row["after"]) - float(row["before"]) for row in rows if row.get("after")]
    jump = f"{statistics.mean(jumps):+.3f}" if jumps and max(map(abs, jumps)) >= 5e-4 else "0" if jumps else ""
    flops = f"{float(rows[0]['flops']) / 1e12:.2f}" if rows[0].get("flops") else ""
    return [rows[0]["lr"], f"**{statistics.mean(losses):.3f}** ({each})", jump, f"{int(rows[0]['params']):,}", flops]


def write(path: Path = PAGE) -> None:
    """Make the page."""
    path.write_text(page())
