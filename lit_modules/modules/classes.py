"""The classes of an image model and those of the data are the same ones, in the model's order."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from tokenformer.interop import load_trained, read_json

CLASS_MAP = "class_map.txt"  # beside an exported model, as timm reads it: a line for each class, in the model's order


def take_order(saved: list[str], data: Any, model: str) -> bool:
    """Let data that have the model's classes number them as it does; whether they have them."""
    if saved == data.class_names:
        return True
    if sorted(saved) != sorted(data.class_names) or not hasattr(data, "set_class_order"):
        return False
    data.set_class_order(saved)
    rank_zero_info(f"the classes are in the order of {model}, not in that of new runs")
    return True


def match_checkpoint(saved: list[str], data: Any) -> None:
    """Take the order of a checkpoint's classes.

    Raises:
        ValueError: when the data has others.
    """
    if take_order(saved, data, "the checkpoint"):
        return
    pairs = zip_longest(saved, data.class_names)
    number, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise ValueError(
        f"the checkpoint knows {len(saved)} classes, data.source has {len(data.class_names)}; the first that differs "
        f"is number {number}: {theirs!r} in the checkpoint, {ours!r} in the data; to evaluate some of the classes, or "
        "classes under other names, give data.class_map"
    )


def match_initial(source: str, data: Any) -> bool:
    """Take the order of the classes of a model to start from, if it says them; whether they are those of the data.

    Args:
        source: `model.init_from`, an exported folder or a checkpoint.
        data: the datamodule.
    """
    path = Path(source)
    if path.is_file():
        saved = getattr(load_trained(path), "pretrained_cfg", {}).get("label_names")
    else:
        listed = path / CLASS_MAP
        in_config = read_json(path).get("pretrained_cfg", {}).get("label_names")
        saved = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else in_config
    if saved:
        return take_order(list(saved), data, source)
    if sorted(data.class_names) != data.class_names:
        rank_zero_warn(
            f"model.init_from={source!r}: has no {CLASS_MAP}, so its classes are taken to be in the order of the "
            f"data, {', '.join(data.class_names[:12])}, ...; older versions sorted the names of folders as strings: if "
            f"one wrote it, put a {CLASS_MAP} there, a line for each class in that order"
        )
    return True
