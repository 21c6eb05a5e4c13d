"""Draws the pictures of the README and of docs/: Pattention, growths, and the quickstart's loss.

    python docs/draw.py

SVG, by hand: text stays text, the same bytes each time, and the colours follow the reader's light or dark mode. The
losses are those of docs/quickstart/*.csv, cut from the `metrics.csv` and `growth.csv` of two runs:

    tokenformer fit --config configs/language/quickstart.yaml
    tokenformer fit --config configs/language/quickstart.yaml --config configs/baseline/no-growth.yaml
"""

import csv
from pathlib import Path

DOCS = Path(__file__).parent

STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #24292f } .small { font-size: 11px } .math { font-style: italic }
.line { stroke: #57606a; fill: none } .old { fill: #6f8fbf } .new { fill: #e08a2e } .data { fill: #8aa88a }
.a { stroke: #1f6feb; fill: none; stroke-width: 2 } .b { stroke: #8c959f; fill: none; stroke-width: 2 }
.grid { stroke: #d0d7de; fill: none } .empty { stroke: #e08a2e; fill: none }
.mark { stroke: #e08a2e; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .line { stroke: #8b949e } .grid { stroke: #30363d }
.a { stroke: #58a6ff } .b { stroke: #6e7681 } }
</style>"""


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """A picture of these parts; the title is read to those who can't see it."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
    return "\n".join([head, STYLE, *parts, "</svg>", ""])


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "middle") -> str:
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{content}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" class="{kind}"/>'


def arrow(x: float, y: float, to: float) -> str:
    """To the right, with a head."""
    return f'<path class="line" d="M{x:g} {y:g}H{to:g}m-5 -4l5 4l-5 4"/>'


def rows(x: float, y: float, width: float, count: int, kind: str) -> list[str]:
    """A matrix, drawn as its rows."""
    return [box(x, y + 14 * i, width, 11, kind) for i in range(count)]


def matrix(x: float, y: float, width: float, old: int, new: int, label: str, sizes: str) -> list[str]:
    """Parameter tokens: old rows, new rows below them, what they are called."""
    bottom = y + 14 * (old + new) + 14
    tokens = rows(x, y, width, old, "old") + rows(x, y + 14 * old, width, new, "new")
    return [*tokens, text(x + width / 2, y - 10, label, "math"), text(x + width / 2, bottom, sizes, "small")]


def layer(x: float, y: float, old: int, new: int) -> list[str]:
    """A layer: x, keys, what is done with the scores, values, out."""
    middle = y + 7 * (old + new)
    total = "(N + M)" if new else "N"
    return [
        *rows(x, middle - 7, 60, 1, "data"),
        text(x + 30, middle - 17, "x", "math"),
        text(x + 30, middle + 20, "D", "small"),
        arrow(x + 66, middle, x + 92),
        *matrix(x + 98, y, 60, old, new, "keys", f"{total} x D"),
        arrow(x + 164, middle, x + 190),
        box(x + 194, middle - 26, 128, 52, "grid"),
        text(x + 258, middle - 6, "A = x keysᵀ", "math"),
        text(x + 258, middle + 14, "gelu( τ A / |A| )", "math"),
        arrow(x + 326, middle, x + 352),
        *matrix(x + 358, y, 60, old, new, "values", f"{total} x D"),
        arrow(x + 424, middle, x + 450),
        *rows(x + 456, middle - 7, 60, 1, "data"),
        text(x + 486, middle - 17, "out", "math"),
        text(x + 486, middle + 20, "D", "small"),
    ]


def pattention() -> str:
    """A projection as attention to parameter tokens, and the same after a growth."""
    parts = [text(20, 24, "Pattention: a projection is attention to N learned key/value rows", "", "start")]
    parts += layer(20, 62, 5, 0)
    parts += [text(20, 196, "Growth: M new rows. Their keys are zero, so the output stays as it was", "", "start")]
    parts += layer(20, 234, 5, 3)
    return svg(560, 380, "Pattention before and after a growth", parts)


def anchored() -> str:
    """Where the scores of anchored tokens go: under the old norm, of which they are no part."""
    old, new = 5, 3
    x, y = 20, 62
    upper, lower = y + 7 * old, y + 14 * old + 7 * new
    parts = [
        text(x, 24, "Anchored growth: new scores are divided by the norm of the old ones", "", "start"),
        *rows(x, (upper + lower) / 2 - 7, 60, 1, "data"),
        text(x + 30, (upper + lower) / 2 - 17, "x", "math"),
        arrow(x + 66, (upper + lower) / 2, x + 92),
        *matrix(x + 98, y, 60, old, new, "keys", "random, matched"),
        arrow(x + 164, upper, x + 190),
        arrow(x + 164, lower, x + 190),
        *(box(x + 194, middle - 15, 128, 30, "grid") for middle in (upper, lower)),
        text(x + 258, upper + 4, "gelu( τ A / |A| )", "math"),
        text(x + 258, lower + 4, "gelu( τ A' / |A| )", "math"),
        f'<path class="mark line" d="M{x + 258} {upper + 16}V{lower - 16}"/>',
        text(x + 266, (upper + lower) / 2 + 4, "|A|", "math small", "start"),
        arrow(x + 326, upper, x + 352),
        arrow(x + 326, lower, x + 352),
        *rows(x + 358, y, 60, old, "old"),
        *(box(x + 358.5, y + 14 * i + 0.5, 59, 10, "empty") for i in range(old, old + new)),
        text(x + 388, y - 10, "values", "math"),
        text(x + 388, y + 14 * (old + new) + 14, "zero at first", "small"),
        arrow(x + 424, (upper + lower) / 2, x + 450),
        *rows(x + 456, (upper + lower) / 2 - 7, 60, 1, "data"),
        text(x + 486, (upper + lower) / 2 - 17, "out", "math"),
    ]
    return svg(560, 208, "New tokens under the norm of the old ones", parts)


def read(name: str) -> list[tuple[float, float]]:
    """(step, loss) of a run."""
    with (DOCS / "quickstart" / name).open(newline="") as file:
        return [(float(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def quickstart() -> str:
    """Loss over steps of a run that grows and of the same model that does not."""
    grown, fixed = read("grown.csv"), read("not-grown.csv")
    with (DOCS / "quickstart/growth.csv").open(newline="") as file:
        growths = [(float(row["step"]), row["params_before"], row["params_after"]) for row in csv.DictReader(file)]
    left, right, top, bottom = 50, 620, 40, 260
    last, low, high = grown[-1][0], 1.0, 2.8

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + step / last * (right - left), bottom - (min(loss, high) - low) / (high - low) * (bottom - top)

    def curve(points: list[tuple[float, float]], kind: str) -> str:
        places = [place(*point) for point in points]
        return f'<path class="{kind}" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) + '"/>'

    parts = []
    for tenth in range(10, 29, 5):
        y = place(0, tenth / 10)[1]
        parts += [
            f'<path class="grid" d="M{left} {y:.1f}H{right}"/>',
            text(left - 8, y + 4, f"{tenth / 10:.1f}", "small", "end"),
        ]
    for step in range(0, int(last) + 1, 200):
        parts.append(text(place(step, low)[0], bottom + 18, str(step), "small"))
    for step, before, after in growths:
        x = place(step, low)[0]
        sizes = " → ".join(f"{int(count) / 1e6:.2f} M" for count in (before, after))
        parts += [f'<path class="mark" d="M{x:.1f} {top}V{bottom}"/>', text(x + 6, top + 12, sizes, "small", "start")]
    parts += [curve(fixed, "b"), curve(grown, "a")]
    names = (("a", f"grown twice, {grown[-1][1]:.2f} at the end"), ("b", f"not grown, {fixed[-1][1]:.2f}"))
    for i, (kind, name) in enumerate(names):
        parts += [f'<path class="{kind}" d="M400 {86 + 20 * i}H430"/>', text(438, 90 + 20 * i, name, "small", "start")]
    parts += [
        text(left, 22, "Quickstart: training loss, nats a byte", "", "start"),
        text(right, bottom + 36, "optimizer steps", "small", "end"),
    ]
    return svg(640, 300, "The quickstart's loss with two growths, beside the same model that does not grow", parts)


PICTURES = {"pattention.svg": pattention, "anchored.svg": anchored, "quickstart.svg": quickstart}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (DOCS / name).write_text(draw(), encoding="utf-8")
        print(DOCS / name)
