"""The page of `tokenformer inspect` and its pictures.

A text of strangers may hold anything: all that is shown goes through `escape`, and the page forbids the browser to run
or to fetch anything, whatever is in it.
"""

import re
from base64 import b64encode
from collections.abc import Callable
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
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
th:first-child, td:first-child {{ text-align: left; white-space: nowrap }}
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
        return _inlined(name, (folder / name).read_bytes())

    sections = [
        "<h2>How often parameter tokens fire</h2>",
        "<p>The tokens of each layer by how often they fire: the share of inputs with a score above 0. Dark curves are "
        "of the first blocks, bright ones of the last; dashed ones of what growths added.</p>",
        picture("firing.png", _panels(segments, _draw_firing)),
        "<h2>How keys lie</h2>",
        "<p>Angles between all pairs of keys of a segment; black: as many random vectors, which are almost at right "
        "angles: 90° ± 57°/√D. Effective rank: exp of the singular values' entropy (Roy and Vetterli, 2007).</p>",
        picture("angles.png", _panels(segments, _draw_angles)),
        "<details><summary>each segment of each layer: segments.csv</summary>",
        _table([seen.row | {"layer": _short(seen.row["layer"])} for seen in segments]),
        "</details>",
        "<h2>What fires a token</h2>",
        "<p>Of each feed-forward the tokens whose largest weight is the most times their mean one, and the inputs with "
        "their largest weights; those of all tokens are in contexts.csv.</p>",
    ]
    for seen, n in examples:
        places = [place for place in seen.places[n].tolist() if place >= 0]
        inputs = _patches(places, data) if isinstance(data, Images) else _contexts(places, data)
        sections += [f"<h4>{escape(_label(seen, n))}</h4>", inputs]
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


def _contexts(places: list[int], data: Texts) -> str:
    contexts = ([escape(data.context(place)[name]) for name in ("before", "at", "after")] for place in places)
    lines = (f"{before}<b>{at}</b>{after}".replace("\n", "↵") for before, at, after in contexts)
    return f"<pre>{chr(10).join(lines)}</pre>"


def _patches(places: list[int], data: Images) -> str:
    pictures = [data.picture(place) for place in places]
    side = pictures[0].width
    strip = Image.new("RGB", ((side + 4) * len(pictures), side), "white")
    for i, picture in enumerate(pictures):
        strip.paste(picture, ((side + 4) * i, 0))
    content = BytesIO()
    strip.save(content, "png")
    return _inlined("patches", content.getvalue())


def _inlined(name: str, png: bytes) -> str:
    return f'<img alt="{name}" src="data:image/png;base64,{b64encode(png).decode()}">'


def _marked(row: dict[str, Any]) -> str:
    numbers = f"loss {row['nats']:.3f}, entropy {row['entropy']:.3f} nats; predicted {row['predicted']!r}"
    shade = f"background: rgba(224, 123, 0, {min(1, row['nats'] / 8):.2f})"
    return f'<span title="{escape(numbers)}" style="{shade}">{escape(row["token"])}</span>'


def _panels(segments: list[SeenSegment], draw: Callable[[Axes, SeenSegment, dict[str, Any]], None]) -> Figure:
    """A panel of each kind of layer with a curve of each segment."""
    kinds = list(dict.fromkeys(seen.row["layer"].rpartition(".")[2] for seen in segments))
    figure = Figure(figsize=(2.6 * len(kinds), 2.8))
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
    figure.subplots_adjust(0.06, 0.17, 0.99, 0.9, 0.06)  # an automatic layout takes twice as long
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
    figure = Figure(figsize=(9, 3.6))
    named = {"confidence": "probability of the likeliest", "entropy": "entropy over that of a guess"}
    for axes, (by, name) in zip(figure.subplots(1, 2, sharey=True), named.items(), strict=True):
        bins = [row for row in rows if row["by"] == by]
        x, y, sizes = (np.array([row[column] for row in bins]) for column in ("mean", "accuracy", "predictions"))
        axes.plot(x, y, color="#1f4e9e")
        axes.scatter(x, y, 10 + 300 * sizes / sizes.sum(), color="#1f4e9e", alpha=0.6)
        if by == "confidence":
            axes.plot([0, 1], [0, 1], color="#777777", linewidth=0.8, linestyle="--")
        axes.set(xlabel=f"{name}; dots: how many", xlim=(0, 1), ylim=(-0.03, 1.03))
    figure.axes[0].set_ylabel("share of right predictions")
    figure.subplots_adjust(0.07, 0.15, 0.99, 0.98, 0.06)
    return figure
