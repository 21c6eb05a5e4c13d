"""`--segments`: which of a grown model's segments a command uses."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from lit_modules.checkpoints.reading import read_header
from tokenformer.files import is_exported
from tokenformer.parts import keep_segments, pattention_layers
from tokenformer.pruning import By


def add_segments(parser: argparse.ArgumentParser) -> None:
    """Add the option to a command's parser."""
    parser.add_argument(
        "--segments",
        nargs="+",
        default=["all"],
        metavar="WHICH",
        help="all (default), first K, numbers (0 is what a layer of a grown model began with, 1 its first growth), or "
        "of PHASE: what a checkpoint's run began with, and what it has added in that phase or those",
    )


def keep_asked(model: Any, source: Path, words: list[str], adapters: Sequence[str] | None = None) -> None:
    """Leave a model the segments that were asked for; `source` is where it was read.

    Raises:
        ValueError: for other words, for phases in which nothing was added, for segments that can't be left out, and
            beside adapters, which are segments too.
    """
    if words == ["all"]:
        return
    if not pattention_layers(model):
        raise ValueError(f"--segments {' '.join(words)}: {source} is a baseline, which has no segments: give all")
    if adapters:
        raise ValueError("--segments and --adapter: an adapter belongs to the whole base: give one of the two")
    if words[0] == "of":
        keep_segments(model, _of_phases(model, source, words[1:]))
        return
    try:
        numbers = [int(word) for word in words[words[0] == "first" :]]
    except ValueError:
        numbers = []
    if not numbers or (words[0] == "first" and len(numbers) > 1):
        raise ValueError(f"--segments {' '.join(words)}: give all, first K, of PHASE, or numbers such as 0 2")
    keep_segments(model, range(numbers[0]) if words[0] == "first" else numbers)


def _of_phases(model: Any, source: Path, names: list[str]) -> list[int]:
    """What a run began with, and what its growths in these phases have added."""
    growths = [] if is_exported(source) else read_header(source).get("growths", [])
    growths = [growth for growth in growths if growth["init"] not in get_args(By)]  # `shrink` has added nothing
    phases = [growth.get("phase") for growth in growths]
    if not names or not set(names) <= set(phases):
        known = ", ".join(filter(None, dict.fromkeys(phases)))
        asked = f"--segments of {' '.join(names)}: give phases in which the checkpoint's run has grown"
        raise ValueError(f"{asked}: {known or 'none is on record'}")
    first = max(len(layer.segments) for layer in pattention_layers(model).values()) - len(growths)
    return [*range(first), *(first + i for i, phase in enumerate(phases) if phase in names)]
