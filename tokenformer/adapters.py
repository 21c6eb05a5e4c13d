"""Adapters: segments of parameter tokens that were trained on a frozen model, their base, as a file of their own.

What a segment that can be taken away gives is added to what the others give, whatever they are. So any number of
adapters can be put on a base, and taken off again, which leaves the base to the bit. A file holds the tensors of the
segments, those of a layer numbered from 0, and the fingerprint of the base. A folder whose model has adapters on it
says in `adapters.json` which segments are whose.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tokenformer.growth import pattention_layers
from tokenformer.interop import consolidated_state
from tokenformer.pattention import Pattention
from tokenformer.segment import TokenSegment

KIND = "tokenformer-adapter"  # the key of the file's metadata; its value is the base's fingerprint
ADAPTERS = "adapters.json"  # beside a model that has some on it
FINGERPRINT = re.compile("[0-9a-f]{64}")

Segments = dict[str, list[TokenSegment]]  # by the layer's name


@dataclass(frozen=True)
class Adapter:
    """New tokens for a base.

    Attributes:
        name: of its file, without the ending.
        segments: its segments.
        weight: what their values were multiplied by: a layer's output gets so much of what the adapter adds to it.
    """

    name: str
    segments: Segments
    weight: float = 1.0


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights, in hexadecimal; the same for a checkpoint and for the folder exported of it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(consolidated_state(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cut_off(model: nn.Module, keep: Mapping[str, int]) -> Segments:
    """Leave each layer its first segments, as many as `keep` says, and return the others.

    Raises:
        ValueError: when a segment would go in whose norm those before it take part. Nothing is changed then.
    """
    layers = pattention_layers(model)
    others: dict[str, Any] = {name: list(layers[name].segments)[count:] for name, count in keep.items()}
    for name, segments in others.items():
        if shared := [i for i, segment in enumerate(segments, keep[name]) if not segment.is_removable]:
            raise ValueError(
                f"segment {shared[0]} of {name} shares its norm with those before it, which would change without it: "
                "only tokens of init: anchored, segment_norm and pairs make an adapter"
            )
    for name, count in keep.items():
        del layers[name].segments[count:]
    return {name: segments for name, segments in others.items() if segments}


def put_on(model: nn.Module, adapters: Sequence[Adapter]) -> dict[str, list[str]]:
    """Give a base all of its adapters.

    Tokens that are anchored to the base follow on it, before any segment with a norm of its own, to which they would
    be anchored there.

    Returns:
        Whose the segments behind the base's are, by the layer's name.
    """
    owners: dict[str, list[str]] = {}
    for name, layer in pattention_layers(model).items():
        anchored: list[tuple[str, TokenSegment]] = []
        others: list[tuple[str, TokenSegment]] = []
        for adapter in adapters:
            segments = adapter.segments.get(name, [])
            lead = next((i for i, segment in enumerate(segments) if not segment.is_anchored), len(segments))
            anchored += [(adapter.name, segment) for segment in segments[:lead]]
            others += [(adapter.name, segment) for segment in segments[lead:]]
        layer.segments.extend(segment for _, segment in anchored + others)
        if anchored or others:
            owners[name] = [owner for owner, _ in anchored + others]
    return owners


def take_off(model: nn.Module, folder: Path) -> list[Adapter]:
    """Take off the adapters that the model in a folder has on it, and return them; none of another model.

    Raises:
        ValueError: for an `adapters.json` that is not of this model.
    """
    file = folder / ADAPTERS
    if not file.is_file():
        return []
    layers = pattention_layers(model)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        weights = {str(name): float(weight) for name, weight in record["weights"].items()}
        owners = {name: [str(owner) for owner in found] for name, found in record["segments"].items()}
        for name, found in owners.items():
            if len(found) >= len(layers[name].segments) or not set(found) <= weights.keys():
                raise ValueError(f"{name} has no such segments")
        cut = cut_off(model, {name: len(layers[name].segments) - len(found) for name, found in owners.items()})
        if (now := fingerprint(model)) != record["base"]:
            raise ValueError(f"without its adapters the model is {now[:16]}, not the base {str(record['base'])[:16]}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: corrupted, or of another model: {error}") from error
    adapters = [Adapter(name, {}, weight) for name, weight in weights.items()]
    for adapter in adapters:
        for name, segments in cut.items():
            mine = [s for owner, s in zip(owners[name], segments, strict=True) if owner == adapter.name]
            adapter.segments.update({name: mine} if mine else {})
    return adapters


def write_record(folder: Path, base: str, adapters: Sequence[Adapter], owners: Mapping[str, list[str]]) -> None:
    """Write `adapters.json`, which :func:`take_off` reads; `owners` are those of :func:`put_on`."""
    weights = {adapter.name: adapter.weight for adapter in adapters}
    (folder / ADAPTERS).write_text(json.dumps({"base": base, "weights": weights, "segments": owners}, indent=2) + "\n")


def add_adapters(model: nn.Module, folder: Path, given: Sequence[str]) -> None:
    """Put adapters from files on a model, beside those that the folder says it has.

    Args:
        model: the base, or what the folder holds.
        folder: where it was read from; may be a checkpoint.
        given: files, each with a weight behind it where that is not 1: `french.safetensors=0.5`.

    Raises:
        ValueError: see :func:`read_adapters`.
    """
    if given:
        there = take_off(model, folder)
        put_on(model, there + read_adapters(given, model, there))


def read_adapters(given: Sequence[str], base: nn.Module, there: Sequence[Adapter] = ()) -> list[Adapter]:
    """Read adapters of a base; see :func:`add_adapters`.

    Raises:
        ValueError: for what is no adapter, or corrupted; for one of another base; for two of a name.
    """
    found, present = list(there), fingerprint(base)
    for one in given:
        path, weight = _path_and_weight(one)
        if path.stem in [adapter.name for adapter in found]:
            raise ValueError(f"{path}: there is an adapter {path.stem} already: rename the file")
        tensors, trained_on = _read(path)
        if trained_on != present:
            raise ValueError(
                f"{path}: was trained on the model {trained_on[:16]}, this one is {present[:16]}: give its own base"
            )
        try:
            segments = _segments(tensors, pattention_layers(base))
        except ValueError as error:
            raise ValueError(f"{path}: corrupted: {error}") from error
        for segment in (segment for layer in segments.values() for segment in layer):
            segment.values.data.mul_(weight)
        found.append(Adapter(path.stem, segments, weight))
    return found[len(there) :]


def write_adapter(path: Path, segments: Segments, base: str) -> None:
    """Write the segments that :func:`cut_off` returned, and the base's fingerprint."""
    tensors = {
        f"{name}.segments.{i}.{kind}": tensor.detach().contiguous()
        for name, layer in segments.items()
        for i, segment in enumerate(layer)
        for kind, tensor in segment.state_dict().items()
    }
    path.write_bytes(save(tensors, {KIND: base}))


def _path_and_weight(given: str) -> tuple[Path, float]:
    path, _, number = given.rpartition("=")
    if not path or Path(given).exists():
        return Path(given), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"{given}: the weight {number!r} is no number: give FILE or FILE=0.5")
    return Path(path), weight


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if not FINGERPRINT.fullmatch(about.get(KIND, "")):
                raise ValueError(f"{path}: no adapter: `tokenformer adapter save` makes one")
            return {name: file.get_tensor(name) for name in file.keys()}, about[KIND]  # noqa: SIM118 - no dict
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no adapter, not there, or corrupted: {error}") from error


def _segments(tensors: Mapping[str, Tensor], layers: Mapping[str, Pattention]) -> Segments:
    """Segments of a file's tensors, whose shapes are checked against the layers before anything is built."""
    parts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        place = re.fullmatch(r"(.+)\.segments\.(\d{1,4})\.(keys|values|tau|tau_gain|norm_weight)", name)
        if place is None or place[1] not in layers:
            raise ValueError(f"{name} is no part of a segment of this model")
        parts.setdefault(place[1], {}).setdefault(int(place[2]), {})[place[3]] = tensor
    segments: Segments = {}
    for name, numbered in parts.items():
        layer = layers[name]
        like: Any = layer.segments[0].keys
        for i in range(len(numbered)):
            part = numbered.get(i, {})
            N = part["keys"].shape[0] if "keys" in part and part["keys"].ndim == 2 else 0
            shapes = {"keys": (N, layer.in_features), "values": (N, layer.out_features)}
            dtypes = {"tau": torch.float64, "norm_weight": torch.float32}
            own_norm, learned, anchored = (kind in part for kind in ("tau", "tau_gain", "norm_weight"))
            fits = N > 0 and "values" in part and own_norm != anchored and own_norm >= learned
            for kind, tensor in part.items():
                fits &= tensor.shape == shapes.get(kind, (1,)) and tensor.dtype == dtypes.get(kind, like.dtype)
            if not fits or (anchored and part["norm_weight"].item() != 0):
                raise ValueError(f"segment {i} of {name} does not fit the layer, or can't be taken away again")
            factory: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
            segment = TokenSegment(N, layer.in_features, layer.out_features, own_norm, learned, anchored, **factory)
            segment.load_state_dict(part)
            segments.setdefault(name, []).append(segment)
    return segments
