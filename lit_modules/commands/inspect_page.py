"""The page of `tokenformer inspect` and its pictures.

A text of strangers may hold anything: all that is shown goes through `escape`, and the page forbids the browser to run
or to fetch anything, whatever is in it.
"""

import re
from base64 import b64encode
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lit_modules.commands.inspect_inputs import Images, Texts

Rows = list[dict[str, Any]]
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))  # of segments 0, 1, ...

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>
body {{ font: 15px/1.45 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #111 }}
table {{ border-collapse: collapse; font-size: 13px; margin: 1em 0 }}
th, td {{ padding: 2px 8px; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px }}
b {{ background: #ffd76e }}
.wide {{ overflow-x: auto }}
</style></head><body>
<h1>{title}</h1>
<pre>{summary}</pre>
{sections}
</body></html>
"""


class SeenSegment(NamedTuple):
    """What was seen of a segment of N tokens.

    Attributes:
        row: of segments.csv.
        tokens: its rows of tokens.csv.
        top: the largest weights of each token, (N, k).
        places: where these were, (N, k); -1 for none.
        angles: pairs of its keys by their angle, (180).
        random_angles: the same of as many random vectors.
    """

    row: dict[str, Any]
    tokens: Rows
    top: Tensor
    places: Tensor
    angles: Tensor
    random_angles: Tensor


def write_page(
    folder: Path,
    title: str,
    summary: str,
    segments: list[SeenSegment],
    losses: Rows,
    calibration: Rows,
    examples: list[tuple[SeenSegment, int]],
    beginning: Rows,
    data: Texts | Images,
) -> None:
    """Write index.html and the pictures that are in it.

    Args:
        folder: for both.
        title: of the page.
        summary: a few lines.
        segments: in the order of the layers.
        losses: rows of losses.csv.
        calibration: of calibration.csv.
        examples: segments, each with the number of a token of it, whose inputs are shown.
        beginning: the first rows of predictions.csv.
        data: what the model was shown.
    """

    def picture(name: str, figure: Figure) -> str:
        figure.savefig(folder / name, dpi=110)
        return f'<img alt="{name}" src="data:image/png;base64,{b64encode((folder / name).read_bytes()).decode()}">'

    sections = [
        "<h2>How often parameter tokens fire</h2>",
        "<p>The tokens of each layer in the order of how often they fire: the share of inputs with a score above 0. "
        "Dark curves are of the first blocks, bright ones of the last; dashed ones of what growths added.</p>",
        picture("firing.png", _panels(segments, _draw_firing)),
        "<h2>How keys lie</h2>",
        "<p>Angles between all pairs of keys of a segment; black: as many random vectors, which are almost at right "
        "angles: 90° ± 57°/√D. Effective rank: exp of the singular values' entropy (Roy and Vetterli, 2007).</p>",
        picture("angles.png", _panels(segments, _draw_angles)),
        _table([seen.row | {"layer": _short(seen.row["layer"])} for seen in segments]),
        "<h2>What fires a token</h2>",
        "<p>Of each feed-forward the tokens whose largest weight is the most times their mean one, and the inputs with "
        "their largest weights; those of all tokens are in contexts.csv.</p>",
    ]
    if isinstance(data, Images):
        sections.append(picture("patches.png", _draw_patches(examples, data)))
    else:
        sections += [_contexts(seen, n, data) for seen, n in examples]
    if losses:
        sections += [
            "<h2>Does it know that it guesses?</h2>",
            picture("calibration.png", _draw_calibration(calibration)),
            "<h2>Loss by kind, and where knowledge sits</h2>",
            "<p>Mean loss in nats and share of right predictions; rows: what is silent.</p>",
            _losses(losses),
        ]
    if isinstance(data, Texts):
        sections += [
            "<h2>How it begins</h2>",
            "<p>The darker a token, the larger its loss; point at one for the numbers.</p>",
            f"<pre>{''.join(_marked(row) for row in beginning)}</pre>",
        ]
    page = PAGE.format(title=escape(title), summary=escape(summary), sections="\n".join(sections))
    (folder / "index.html").write_text(page, encoding="utf-8", errors="replace")


def _shown(value: Any) -> str:
    return escape(f"{value:.3g}" if isinstance(value, float) else str(value))


def _table(rows: Rows) -> str:
    lines = [[f"<th>{escape(name.replace('_', ' '))}</th>" for name in rows[0]]]
    lines += [[f"<td>{_shown(value)}</td>" for value in row.values()] for row in rows]
    return f'<div class="wide"><table>{"".join(f"<tr>{chr(10).join(line)}</tr>" for line in lines)}</table></div>'


def _losses(losses: Rows) -> str:
    """A row of each silent part, a column of each kind."""
    table: dict[str, dict[str, Any]] = {}
    for row in losses:
        cell = f"{row['loss']:.3f} ({row['accuracy']:.0%})"
        table.setdefault(row["silent"], {"silent": row["silent"]})[row["kind"]] = cell
    return _table(list(table.values()))


def _label(seen: SeenSegment, n: int) -> str:
    token = seen.tokens[n]
    grown = f", segment {token['segment']}" if token["segment"] else ""
    return f"{_short(token['layer'])}{grown}, token {n}: fires at {token['fires']:.1%}"


def _short(layer: str) -> str:
    return re.sub(r".*blocks\.", "block ", layer).replace(".attention.", " ").replace(".", " ")


def _contexts(seen: SeenSegment, n: int, data: Texts) -> str:
    contexts = [data.context(place) for place in seen.places[n].tolist() if place >= 0]
    lines = (
        f"{escape(c['before'])}<b>{escape(c['token'])}</b>{escape(c['after'])}".replace("\n", "↵") for c in contexts
    )
    return f"<h4>{escape(_label(seen, n))}</h4><pre>{chr(10).join(lines)}</pre>"


def _marked(row: dict[str, Any]) -> str:
    numbers = f"loss {row['nats']:.3f}, entropy {row['entropy']:.3f} nats; predicted {row['predicted']!r}"
    shade = f"background: rgba(224, 123, 0, {min(1, row['nats'] / 8):.2f})"
    return f'<span title="{escape(numbers)}" style="{shade}">{escape(row["token"])}</span>'


def _panels(segments: list[SeenSegment], draw: Callable[[Axes, SeenSegment, dict[str, Any]], None]) -> Figure:
    """A panel of each kind of layer with a curve of each segment."""
    kinds = list(dict.fromkeys(seen.row["layer"].rpartition(".")[2] for seen in segments))
    figure = Figure(figsize=(2.6 * len(kinds), 2.8), layout="constrained")
    panels = dict(zip(kinds, figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], strict=True))
    depth, colours = len({seen.row["layer"] for seen in segments}) / len(kinds), matplotlib.colormaps["viridis"]
    blocks = dict.fromkeys(kinds, -1)
    for seen in segments:
        kind, number = seen.row["layer"].rpartition(".")[2], seen.row["segment"]
        blocks[kind] += number == 0  # a layer's first
        look = {"color": colours(0.9 * blocks[kind] / depth), "linestyle": DASHES[number % len(DASHES)], "linewidth": 1}
        draw(panels[kind], seen, look)
    for kind, axes in panels.items():
        axes.set_title(kind, fontsize="medium")
        axes.label_outer()
    return figure


def _draw_firing(axes: Axes, seen: SeenSegment, look: dict[str, Any]) -> None:
    shares = np.sort([token["fires"] for token in seen.tokens])[::-1]
    axes.plot(np.linspace(0, 1, len(shares)), shares, **look)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("tokens, sorted")
    axes.set_ylabel("share of inputs")


def _draw_angles(axes: Axes, seen: SeenSegment, look: dict[str, Any]) -> None:
    degrees = np.arange(len(seen.angles)) + 0.5
    for angles, how in ((seen.random_angles, {"color": "black", "linewidth": 0.6}), (seen.angles, look)):
        if total := float(angles.sum()):
            axes.plot(degrees, angles.numpy() / total, **how)
    axes.set_xlabel("degrees")
    axes.set_ylabel("share of pairs")


def _draw_calibration(rows: Rows) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    named = ("confidence", "probability of the likeliest"), ("entropy", "entropy over that of a guess")
    for axes, (by, name) in zip(figure.subplots(1, 2, sharey=True), named, strict=True):
        x, y, sizes = np.array(
            [(row["mean"], row["accuracy"], row["predictions"]) for row in rows if row["by"] == by]
        ).T
        axes.scatter(x, y, 10 + 300 * sizes / sizes.sum(), color="#1f4e9e", alpha=0.6)
        axes.plot(x, y, color="#1f4e9e")
        if by == "confidence":
            axes.plot([0, 1], [0, 1], color="#777", linewidth=0.8, linestyle="--")
        axes.set(
            xlabel=f"{name}; dots: bins by size", ylabel="share of right predictions", xlim=(0, 1), ylim=(-0.03, 1.03)
        )
    return figure


def _draw_patches(examples: list[tuple[SeenSegment, int]], data: Images) -> Figure:
    """A row of each token: images, with a frame around the patch; around all of it for the class token."""
    columns = examples[0][0].top.shape[1]
    height = 1.55 * len(examples) + 0.3
    figure = Figure(figsize=(1.3 * columns, height))
    grid = figure.subplots(len(examples), columns, squeeze=False)
    for line, (seen, n) in zip(grid, examples, strict=True):
        line[0].set_title(_label(seen, n), fontsize=7, loc="left")
        for axes, place in zip(line, seen.places[n].tolist(), strict=True):
            axes.axis("off")
            if place >= 0:
                pixels, box = data.picture(place)
                axes.imshow(pixels, cmap="gray")
                left, top, width, height = box
                axes.add_patch(
                    Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color="#e07b00", linewidth=2)
                )
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.3 / height, 0.05, 0.25)
    return figure
