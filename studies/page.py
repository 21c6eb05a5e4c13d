"""docs/study.md, from the results alone: what became of the paper's claims, then a table for each study."""

import importlib
import re
import statistics
from collections.abc import Callable, Sequence

from studies.fit import table
from studies.picture import draw
from studies.runner import FOLDER, ROOT, Row, Settings, Study

PAGE, PICTURES = ROOT / "docs/study.md", ROOT / "docs/study"
HEAD = """# Studies

What the paper claims (arXiv 2410.23168), and what small models show of it. Ours: mean of three seeds at the best \
rate, lowest to highest.

"""
ADVICE = """
**When to use a TokenFormer.** When there is a trained model, and more is wanted than it can hold: growth is exact in \
the middle of a run, and a grown model ends below one of its size that has the growth's steps alone ({grown} against \
{stage} nats a byte). When one kind of data comes after another and nothing may be lost: new tokens alone leave the \
old model in it to the bit, are a small file of their own, and end lower over all of the data than LoRA and Net2Net \
({new_tokens} against {lora} and {net2net}). And for language in small models from the start too: of as many \
parameters and steps it ended below its Transformer twin ({tokenformer} against {transformer} at 1 M parameters, \
{tokenformer_10m} against {transformer_10m} at 10 M); for images they ended level. **When not**: when the last size \
is known and nothing is trained yet, do not count on growth to save compute. For as many FLOPs as base and growth \
together, the last size from the start ended lower than what was grown from a base of few tokens ({scratch} against \
{grown}, and after two growths {scratch_twice} against {grown_twice}; with AdamW these are level, {scratch_adamw} and \
{grown_adamw}), and higher than what was grown from one of as many tokens as channels ({scratch_wide} against \
{grown_wide}). When speed decides, since two products, a norm and a GELU take the place of one product \
([performance](performance.md)). When one classifier must learn new classes without the old ones, where it forgets \
like all others.
"""
BELOW = """
Each line below is a cell of a study at its own best learning rate, but for the kind `base`, whose rate is given: the \
search began in the middle of a grid in steps of two and ended when a rate was better than its neighbours, with seed \
0; then the other seeds were run at it. Mean of the seeds, and each of them in their order. What follows from it is in \
[the log](log.md).

Made by `python -m studies page` from studies/results; `python -m studies NAME` measures, or goes on measuring.
"""
VERDICTS = ("held", "held in part", "not held", "can't be said here")


def page() -> str:
    """The whole page."""
    studies = [Study(path.stem) for path in sorted(FOLDER.glob("*.yaml"))]
    firsts: dict[str, str] = {}  # the first study of each module
    before = [firsts.setdefault(study.module, study.name) for study in studies]
    sections = (section(s, "" if s.name == first else first) for s, first in zip(studies, before, strict=True))
    return HEAD + claims(studies) + advice(studies) + BELOW + "".join(sections)


def advice(studies: Sequence[Study]) -> str:
    """ADVICE, with its numbers."""
    by_name = {study.name: study for study in studies}
    stage = {"size": "small", "optimizer": "muon", "factor": 4, "stage": 0.33}
    model = {"task": "bytes", "size": "1M", "optimizer": "muon"}
    twice = {"optimizer": "muon", "stage": 0.1}
    adamw = twice | {"optimizer": "adamw"}
    cells = {
        "grown_twice": ("progressive", twice | {"method": "anchored"}),
        "scratch_twice": ("progressive", twice | {"method": "scratch", "factor": 6, "budget": "flops"}),
        "grown_adamw": ("progressive", adamw | {"method": "anchored"}),
        "scratch_adamw": ("progressive", adamw | {"method": "scratch", "factor": 6, "budget": "flops"}),
        "grown": ("growth", stage | {"kind": "anchored", "keys": "matched"}),
        "stage": ("growth", stage | {"kind": "scratch", "as_long": "stage"}),
        "scratch": ("growth", stage | {"kind": "scratch", "as_long": "flops"}),
        "grown_wide": ("widening", {"model": "tokenformer", "method": "anchored"}),
        "scratch_wide": ("widening", {"model": "tokenformer", "method": "scratch", "budget": "flops"}),
        "new_tokens": ("continual", {"task": "texts", "method": "new tokens"}),
        "lora": ("continual", {"task": "texts", "method": "lora"}),
        "net2net": ("continual", {"task": "texts", "method": "net2net"}),
        "tokenformer": ("optimizers", model | {"model": "tokenformer"}),
        "transformer": ("optimizers", model | {"model": "transformer"}),
        "tokenformer_10m": ("optimizers", model | {"model": "tokenformer", "size": "10M"}),
        "transformer_10m": ("optimizers", model | {"model": "transformer", "size": "10M"}),
    }
    return ADVICE.format(**{name: short(by_name[study], cell).split()[0] for name, (study, cell) in cells.items()})


def claims(studies: Sequence[Study]) -> str:
    """A line for each claim of the paper: its number, ours, and the verdict."""
    lines = ["| paper | claim | its number | ours | verdict | command |", "|---|---|---|---|---|---|"]
    found = [(claim, study) for study in studies for claim in study.claims]
    for claim, study in sorted(found, key=lambda pair: in_order(pair[0]["where"])):
        ours = {name: short(study, cell) for name, cell in claim["ours"].items()}
        said = "; ".join(f"{name} {figure}" for name, figure in ours.items()) if all(ours.values()) else "not run yet"
        cells = (
            claim["where"],
            claim["claim"],
            claim["paper"],
            said,
            claim.get("verdict", ""),
            f"`python -m studies {study.name}`",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def in_order(place: str) -> list[tuple[bool, int, str]]:
    """Figure 3 before figure 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", place)]


def short(study: Study, some: Settings) -> str:
    """A figure of the cell with these settings and fewest others, its loss unless `figure` names one; "" if not run."""
    wanted = {name: value for name, value in some.items() if name != "figure"}
    cell, *others = sorted((cell for cell in study.cells if wanted.items() <= cell.items()), key=len)
    if others and len(others[0]) == len(cell):
        raise ValueError(f"{study.name}: {wanted} are settings of several cells")
    found = [float(row[some.get("figure", "loss")]) for row in study.best(cell)]
    if found and min(found) > 1e6:
        return f"{statistics.mean(found) / 1e12:.1f} T"
    return f"{statistics.mean(found):.3f} ({min(found):.3f}-{max(found):.3f})" if found else ""


def section(study: Study, words_of: str = "") -> str:
    """What a study asks, and its table; its words are said already where `words_of` names an earlier study."""
    shown = [name for name in study.settings if len({cell.get(name, "") for cell in study.cells}) > 1]
    others = [name for name, (column, _) in OTHERS.items() if any(row.get(column) for row in study.rows)]
    head = [*shown, "rate", "loss", *others]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [
        f"| {' | '.join([*(str(cell.get(name, '')) for name in shown), *figures(study, cell, others)])} |"
        for cell in study.cells
    ]
    about = (importlib.import_module(study.module).__doc__ or "").strip()
    text = f"```text\n{about}\n```\n\n" if about else ""
    if words_of:
        text = f"The words are those of `{words_of}`, above.\n\n"
    picture = f"![{study.name}](study/{study.name}.svg)\n\n" if study.picture and draw(study) else ""
    laws = table(study) if study.laws else ""
    return f"\n## {study.name}: {study.question}\n\n{text}{picture}" + "\n".join(lines) + f"\n{laws}"


def figures(study: Study, cell: Settings, others: Sequence[str]) -> list[str]:
    """Best rate; mean and seeds of the loss; some of OTHERS."""
    rows = study.best(cell)
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


def _speeds(rows: list[Row]) -> str:
    shares = zip(*(row["speed"].split() for row in rows), strict=True)
    return ", ".join(f"{statistics.median(map(float, share)):.1f}" for share in shares)


FIGURES = ("learned", "forgotten", "at x3", "norm", "of keys", "of values", "spread", "unused", "largest rate")
# What a line says beside the loss, where the rows have such a column: how far growth moved the loss, training FLOPs.
OTHERS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "jump": ("after", _jump),
    **{name: (name, _mean(name)) for name in FIGURES},
    **{f"at {share}": (f"at {share}", _mean(f"at {share}")) for share in ("1", "0.9", "0.7", "0.5", "0.25")},
    "times faster": ("speed", _speeds),
    "parameters": ("params", lambda rows: f"{int(rows[0]['params']):,}"),
    "CPU s": ("cpu_seconds", lambda rows: f"{statistics.median(float(row['cpu_seconds']) for row in rows):.0f}"),
    "MB": ("peak", lambda rows: f"{statistics.median(float(row['peak']) for row in rows) / 2**20:.0f}"),
    "TFLOP": ("flops", lambda rows: f"{float(rows[0]['flops']) / 1e12:.2f}"),
}


def write() -> None:
    """Make the page and its pictures."""
    PAGE.write_text(page())
    PICTURES.mkdir(exist_ok=True)
    for name, svg in pictures().items():
        (PICTURES / name).write_text(svg)


def pictures() -> dict[str, str]:
    """The SVG of each study that has a picture and rows for it, by the file's name."""
    studies = [Study(path.stem) for path in sorted(FOLDER.glob("*.yaml"))]
    return {f"{study.name}.svg": svg for study in studies if study.picture and (svg := draw(study))}
