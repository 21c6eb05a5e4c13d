"""`--segments`: which of a grown model's segments a command uses."""

import argparse
from typing import Any

from tokenformer.parts import keep_segments


def add_segments(parser: argparse.ArgumentParser) -> None:
    """Add the option to a command's parser."""
    parser.add_argument(
        "--segments",
        nargs="+",
        default=["all"],
        metavar="WHICH",
        help="which of a grown model: all (default), first K, or numbers; 0 is what it began with, 1 its first growth",
    )


def keep_asked(model: Any, words: list[str]) -> None:
    """Leave a model the segments that were asked for.

    Raises:
        ValueError: for other words, and for segments that can't be left out.
    """
    if words == ["all"]:
        return
    try:
        numbers = [int(word) for word in words[words[0] == "first" :]]
    except ValueError:
        numbers = []
    if not numbers or (words[0] == "first" and len(numbers) > 1):
        raise ValueError(f"--segments {' '.join(words)}: give all, first K, or numbers such as 0 2")
    keep_segments(model, range(numbers[0]) if words[0] == "first" else numbers)
