"""A model without some of its segments, for a while or for good: what a growth has added can be left out.

Segment i of a layer came with its i-th growth, 0 is what it began with. A layer that has never grown has it alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from tokenformer.baseline import Linear
from tokenformer.pattention import Pattention


def pattention_layers(model: nn.Module) -> dict[str, Pattention]:
    """The Pattention layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Pattention)}


def match_shapes(model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Give the layers of a model the segments, of a baseline the low-rank updates, of a state dict with these shapes.

    Their contents are left undefined.
    """
    for name, module in model.named_modules():
        if isinstance(module, Pattention | Linear):
            module.match(shapes, f"{name}.")


@contextmanager
def using_segments(model: nn.Module, segments: Iterable[int]) -> Iterator[None]:
    """Within this context the model has these segments only; see :func:`keep_segments`."""
    before = {layer: layer.segments for layer in pattention_layers(model).values()}
    keep_segments(model, segments)
    try:
        yield
    finally:
        for layer, whole in before.items():
            layer.segments = whole


def keep_segments(model: nn.Module, segments: Iterable[int]) -> None:
    """Leave each Pattention layer these segments, such as `range(2)` (the first two) or `[0, 2]`.

    Without what a growth has added the model is that from before it, to the bit if older tokens were frozen
    (`train: new`) and taus left alone.

    Args:
        model: whose layers all have as many segments, but for those with one, which keep it.
        segments: their numbers, 0 among them.

    Raises:
        ValueError: when there are no such segments, or one would go in whose norm others take part. Nothing is changed
            then.
    """
    chosen, found = sorted(set(segments)), pattention_layers(model)
    counts = sorted({len(layer.segments) for layer in found.values()} - {1}) or [1]
    if len(counts) > 1:
        raise ValueError(
            f"segments={chosen}: layers have {' or '.join(map(str, counts))} segments, so one number means several "
            "growths: choose those of each layer by remove_segments, or grow the same layers each time"
        )
    if chosen[:1] != [0] or chosen[-1] >= counts[0]:
        raise ValueError(f"segments={chosen}: choose among 0 to {counts[0] - 1}, with 0, what the model began with")
    _keep(found, {name: chosen if len(layer.segments) > 1 else [0] for name, layer in found.items()})


def remove_segments(model: nn.Module, keep: int = 1) -> None:
    """Leave each Pattention layer its first `keep` segments, see :func:`keep_segments`; layers with fewer keep all.

    Raises:
        ValueError: when a segment would go in whose norm others take part, or `keep` is below 1. Nothing is changed
            then.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: a layer has at least one segment")
    found = pattention_layers(model)
    _keep(found, {name: list(range(min(keep, len(layer.segments)))) for name, layer in found.items()})


def _keep(layers: dict[str, Pattention], kept: dict[str, list[int]]) -> None:
    for name, layer in layers.items():
        _check(name, layer, set(kept[name]))
    for name, layer in layers.items():
        layer.segments = nn.ModuleList([layer.segments[i] for i in kept[name]])


def _check(name: str, layer: Pattention, kept: set[int]) -> None:
    """Whether what is kept has the norm that it had."""
    place = 0
    for group in layer.norm_groups():
        numbers = range(place, place + len(group))
        place += len(group)
        for i, segment in zip(numbers, group, strict=True):
            if i == numbers[0] or segment.is_anchored:
                continue
            if i not in kept and numbers[0] in kept:
                raise ValueError(
                    f"segment {i} of {name} shares its norm with those before it, which would change without it: only "
                    "tokens of init: anchored, segment_norm and pairs can be left out"
                )
        if numbers[0] not in kept and (others := kept & set(numbers)):
            raise ValueError(
                f"segment {min(others)} of {name} has its norm from segment {numbers[0]}: leave out both, or none"
            )
