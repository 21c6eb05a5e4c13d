"""`--segments`: which of a grown model's segments a command uses."""

import argparse
from collections.abc import Sequence
from typing import Any

from tokenformer.parts import keep_segments


def add_segments(parser: argparse.ArgumentParser) -> None:
    """Add the option to a command's parser."""
    parser.add_argument(
        "--segments",
        nargs="+",
        default=["all"],
        metavar="WHICH",
        help="all (default), first K, or numbers: 0 is what a layer of a grown model began with, 1 its first growth",
    )


def keep_asked(model: Any, words: list[str], adapters: Sequence[str] | None = None) -> None:
    """Leave a model the segments that were asked for.

    Raises:
        ValueError: for other words, for segments that can't be left out, and beside adapters, which are segments too.
    """
    if words == ["all"]:
        return
    if adapters:
        raise ValueError("--segments and --adapter: an adapter belongs to the whole base: give one of the two")
    try:
        numbers = [int(word) for word in words[words[0] == "first" :]]
    except ValueError:
        numbers = []
    if not numbers or (words[0] == "first" and len(numbers) > 1):
        raise ValueError(f"--segments {' '.join(words)}: give all, first K, or numbers such as 0 2")
    keep_segments(model, range(numbers[0]) if words[0] == "first" else numbers)
