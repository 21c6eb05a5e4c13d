"""Whether a ratio has become worse than the stored one, beyond noise."""

from benchmarks.harness import Row, is_measured, key

TOLERANCE = 1.1


def badness(ratio: float, goal: str) -> float:
    """The larger, the worse: the ratio where less is better, its inverse where more is, the larger where 1 is best."""
    if goal.startswith("<="):
        return ratio
    return 1 / ratio if goal.startswith(">=") else max(ratio, 1 / ratio)


def is_worse(now: Row, stored: Row) -> bool:
    """Whether the median is more than 10 % worse, and worse than every round of the stored measurement was."""
    goal = str(stored["goal"])
    here, before, *extremes = (
        badness(float(str(row[name])), goal)
        for row, name in ((now, "ratio"), (stored, "ratio"), (stored, "lowest"), (stored, "highest"))
    )
    return here > TOLERANCE * before and here > max(extremes)


def pairs(now: list[Row], stored: list[Row]) -> list[tuple[Row, Row]]:
    """What can be compared: each row with the stored one. Rows without a goal are only reported."""
    known = {key(row): row for row in stored if is_measured(row) and row["goal"]}
    return [(row, known[key(row)]) for row in now if is_measured(row) and key(row) in known]
