"""Power laws through the cells of a study, and what they predict where nothing was trained."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import linregress, t

from studies.runner import Study

PREDICTED = {"124M": 124e6, "354M": 354e6, "757M": 757e6, "1.4B": 1.4e9}  # parameters of the paper's grown models

BENEATH = """loss = c x^-exponent through the means of the seeds, with 95 % intervals. **The predictions go one and a \
half to nearly three orders of magnitude beyond the models, at these steps and batches, with a law that has no floor; \
no such model was trained.**"""


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
    """A law of loss over parameters and one over FLOPs for each model of a study, and predictions of the former.

    Through the means of the seeds: what a size departs from the law by, its seeds have in common.
    """
    models = list(dict.fromkeys(str(cell["model"]) for cell in study.cells))
    head = ["model", "exponent over parameters", "over FLOPs", *(f"predicted at {name}" for name in PREDICTED)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for model in models:
        sizes = [study.best(cell) for cell in study.cells if cell["model"] == model]
        if not all(sizes):
            lines.append(f"| {model} | not run yet |" + " |" * (len(head) - 2))
            continue
        losses = [statistics.mean(float(row["loss"]) for row in rows) for rows in sizes]
        laws = [PowerLaw.through([float(rows[0][x]) for rows in sizes], losses) for x in ("params", "flops")]
        figures = [f"{law.exponent:.3f} ± {law.error:.3f}" for law in laws]
        lines.append(f"| {' | '.join([model, *figures, *(f'{laws[0](n):.3f}' for n in PREDICTED.values())])} |")
    return f"\n{BENEATH}\n\n" + "\n".join(lines) + "\n"
