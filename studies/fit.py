"""Power laws through the cells of a study, and what they predict where nothing was trained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import linregress, t

from studies.runner import Study

PREDICTED = {"124M": 124e6, "354M": 354e6, "757M": 757e6, "1.4B": 1.4e9}  # parameters of the paper's grown models


@dataclass(frozen=True)
class PowerLaw:
    """loss = factor x^-exponent, by least squares between logarithms.

    Attributes:
        factor: the loss at x = 1.
        exponent: how fast it falls.
        error: half of the exponent's 95 % interval (Student's t, two parameters fitted).
    """

    factor: float
    exponent: float
    error: float

    @classmethod
    def through(cls, x: Sequence[float], loss: Sequence[float]) -> "PowerLaw":
        """The law of these points, at least three."""
        fitted = linregress([math.log(v) for v in x], [math.log(v) for v in loss])
        error = float(t.ppf(0.975, len(x) - 2) * fitted.stderr)
        return cls(math.exp(fitted.intercept), -float(fitted.slope), error)

    def __call__(self, x: float) -> float:
        """The loss at x."""
        return float(self.factor * x**-self.exponent)


def table(study: Study) -> str:
    """A law of loss over parameters and one over FLOPs for each model of a study, and predictions of the former."""
    models = list(dict.fromkeys(str(cell["model"]) for cell in study.cells))
    head = ["model", "exponent over parameters", "over FLOPs", *(f"predicted at {name}" for name in PREDICTED)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for model in models:
        cells = [
            {name: cell.get(name, "") for name in study.columns if name not in ("lr", "seed")} for cell in study.cells
        ]
        rows = [row for cell in cells if cell["model"] == model for row in study.best(**cell)]
        if len({row["params"] for row in rows}) < 3:
            lines.append(f"| {model} | not run yet |" + " |" * (len(head) - 2))
            continue
        laws = [
            PowerLaw.through([float(row[x]) for row in rows], [float(row["loss"]) for row in rows])
            for x in ("params", "flops")
        ]
        figures = [f"{law.exponent:.3f} ± {law.error:.3f}" for law in laws]
        lines.append(f"| {' | '.join([model, *figures, *(f'{laws[0](n):.3f}' for n in PREDICTED.values())])} |")
    return (
        "\nloss = c x^-exponent through all seeds, with 95 % intervals. **The predictions are extrapolations over two "
        "to three orders of magnitude, at these steps and batches; no such model was trained.**\n\n"
        + "\n".join(lines)
        + "\n"
    )
