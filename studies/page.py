"""docs/study.md, from the results alone: a table for each study, a line a cell."""

import importlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from studies.runner import FOLDER, ROOT, Row, Settings, Study

PAGE = ROOT / "docs/study.md"
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
    names = [name for name in study.columns if name not in ("lr", "seed")]
    cells = [{name: cell.get(name, "") for name in names} for cell in study.cells]
    shown = [name for name in names if len({cell[name] for cell in cells}) > 1]
    others = [name for name, (column, _) in OTHERS.items() if any(row.get(column) for row in study.rows)]
    head = [*shown, "rate", "loss", *others]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [
        f"| {' | '.join([*(str(cell[name]) for name in shown), *figures(study, cell, others)])} |" for cell in cells
    ]
    about = (importlib.import_module(study.module).__doc__ or "").strip()
    text = f"```text\n{about}\n```\n\n" if about else ""
    return f"\n## {study.name}: {study.question}\n\n{text}" + "\n".join(lines) + "\n"


def figures(study: Study, cell: Settings, others: Sequence[str]) -> list[str]:
    """Best rate; mean and seeds of the loss; some of OTHERS."""
    rows = study.best(**cell)
    if not rows:
        return ["", "not run yet", *("" for _ in others)]
    losses = [float(row["loss"]) for row in rows]
    each = ", ".join(f"{loss:.3f}" for loss in losses)
    more = [figure(rows) if rows[0].get(column) else "" for column, figure in (OTHERS[name] for name in others)]
    return [rows[0]["lr"], f"**{statistics.mean(losses):.3f}** ({each})", *more]


def _jump(rows: list[Row]) -> str:
    jumps = [float(row["after"]) - float(row["before"]) for row in rows]
    return f"{statistics.mean(jumps):+.3f}" if max(map(abs, jumps)) >= 5e-4 else "0"


def _mean(column: str) -> Callable[[list[Row]], str]:
    return lambda rows: f"{statistics.mean(float(row[column]) for row in rows):.3f}"


# What a line says beside the loss, where the rows have such a column: how far growth moved the loss, training FLOPs.
OTHERS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "jump": ("after", _jump),
    **{name: (name, _mean(name)) for name in ("learned", "forgotten")},
    **{f"at {share}": (f"at {share}", _mean(f"at {share}")) for share in ("1", "0.9", "0.7", "0.5", "0.25")},
    "parameters": ("params", lambda rows: f"{int(rows[0]['params']):,}"),
    "TFLOP": ("flops", lambda rows: f"{float(rows[0]['flops']) / 1e12:.2f}"),
}


def write(path: Path = PAGE) -> None:
    """Make the page."""
    path.write_text(page())
