"""Adapters: what was trained on a frozen model, as a small file that goes on that model and off again.

An adapter holds the parameter tokens that a growth has added (GrowParameterTokens with `train: new` and `init:
anchored`, `segment_norm` or `pairs`), and the fingerprint of the model that they were trained on, its base. What it
adds to the outputs of a layer does not depend on others, so several can be on at once; FILE=0.5 adds half of it, in
every layer. CKPT is a checkpoint of a run, or the run's folder, of which the newest is taken. MODEL is the folder of an
exported model; it is left as it is.

  tokenformer adapter save runs/french/20260131-120000-ab12 --out french.safetensors
  tokenformer adapter save CKPT --out french.safetensors --base models/small --weights raw
  tokenformer adapter add models/small french.safetensors code.safetensors=0.5 --out models/both
  tokenformer adapter remove models/both code --out models/french
  tokenformer adapter merge models/both --out models/merged

`save` takes for the base what the run's record of its growths says was frozen, or compares with --base, to the bit; a
run that has trained more than the new tokens is refused. `remove` takes off the adapters named, by default all, which
leaves the base to the bit. `merge` makes what is on MODEL, and the files given, part of it: an ordinary model, a base
of its own. generate, evaluate and export put adapters on by --adapter FILE.
"""

import argparse
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

import torch

from lit_modules.checkpoints.reading import read_checkpoint
from lit_modules.checkpoints.validation import latest_valid
from lit_modules.commands.export import describe_copy, new_folder
from lit_modules.modules.loading import Weights, load_model, model_from_checkpoint
from tokenformer import TokenFormerLM, TokenFormerViT, from_pretrained, save_pretrained
from tokenformer.adapters import (
    Adapter,
    cut_off,
    fingerprint,
    put_on,
    read_adapters,
    take_off,
    write_adapter,
    write_record,
)
from tokenformer.growth import pattention_layers
from tokenformer.interop import consolidated_state
from tokenformer.pruning import By

ORDER = "freeze them (GrowParameterTokens with train: new), or export the whole model"


def save(source: Path, out: Path, base: Path | None = None, weights: Weights = "average") -> str:
    """Write the new tokens of a run as an adapter; say what was done.

    Args:
        source: the run's folder, or a checkpoint of it.
        out: the file, which must not be there.
        base: the model that was trained on; default: what the run's record says was frozen.
        weights: of a checkpoint with an average (EMA): that, or the weights themselves.

    Raises:
        ValueError: when more than new tokens was trained, or they can't be taken away exactly.
    """
    if out.suffix != ".safetensors" or out.exists():
        raise ValueError(f"--out {out}: must be a new file, and end in .safetensors")
    source = latest_valid(source.glob("checkpoints/*.ckpt")) or source
    checkpoint = read_checkpoint(source)
    model = model_from_checkpoint(checkpoint, weights)
    if base is None:
        segments = cut_off(model, _first_new(checkpoint, model, source, weights))
    else:
        trained_on = load_model(base)
        segments = cut_off(model, _beyond(trained_on, model, base))
        now, before = consolidated_state(model), consolidated_state(trained_on)
        shared = [name for name in before if name in now and torch.equal(before[name], now[name])]
        if differing := sorted((before.keys() | now.keys()) - set(shared)):
            raise ValueError(f"{source}: was trained outside of its new tokens: {_listed(differing)}; {ORDER}")
    if not segments:
        raise ValueError(f"{source}: has no tokens beyond those of its base")
    belongs_to = fingerprint(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(out, segments, belongs_to)
    size = sum(p.numel() for layer in segments.values() for segment in layer for p in segment.parameters())
    return (
        f"wrote {out}: {size:,} parameters in {len(segments)} layers, for the base {belongs_to[:16]} of "
        f"{model.num_params():,}"
    )


def _first_new(checkpoint: dict[str, Any], model: Any, source: Path, weights: Weights) -> dict[str, int]:
    """How many segments of each layer were frozen, by the record of the last growths, those of `train: new`."""
    alone = takewhile(
        lambda record: record.get("train") == "new" and "new" in record, checkpoint.get("growths", [])[::-1]
    )
    growths = list(alone)
    if not growths:
        raise ValueError(f"{source}: its last growth was not one of train: new, so more than new tokens was trained")
    if any(record["init"] in get_args(By) for record in growths):
        raise ValueError(f"{source}: `tokenformer shrink` took tokens away: export that model, and train from there")
    if moved := [record["scale"] for record in growths if record["scale"] in ("anneal", "current")]:
        raise ValueError(f"{source}: scale: {moved[0]} has moved the tau of old tokens: train with scale: fixed")
    new = {name for record in growths for name in record["new"]}
    if outside := [name for name in sorted(new) if ".segments." not in name]:
        raise ValueError(f"{source}: was trained outside of its new tokens: {_listed(outside)}; {ORDER}")
    average, current = (checkpoint.get(key, {}) for key in ("state_dict", "current_model_state"))
    frozen = [name for name in current if name.removeprefix("model.") not in new | _buffers(new)]
    moving = [name for name in frozen if not torch.equal(average[name], current[name])]
    if moving and weights == "average":
        raise ValueError(
            f"{source}: the average of what was trained before the growth is another than the frozen weights "
            f"({_listed(moving)}): take --weights raw, or train without EMA on a model that is exported"
        )
    return {
        name: next((i for i in range(len(layer.segments)) if f"{name}.segments.{i}.keys" in new), len(layer.segments))
        for name, layer in pattention_layers(model).items()
    }


def _buffers(new: set[str]) -> set[str]:
    return {
        name.removesuffix("keys") + kind for name in new if name.endswith("keys") for kind in ("tau", "norm_weight")
    }


def _beyond(base: Any, model: Any, path: Path) -> dict[str, int]:
    """How many segments of each layer are the base's, by their tokens."""
    found, counts = pattention_layers(base), {}
    for name, layer in pattention_layers(model).items():
        held = found[name].num_tokens if name in found else 0
        sizes: list[int] = [segment.num_tokens for segment in layer.segments]  # type: ignore[misc]
        count = next((i for i in range(1, len(sizes) + 1) if sum(sizes[:i]) == held), None)
        if count is None:
            raise ValueError(f"{path}: is not what was trained on: {name} has {held} tokens there, here {sizes}")
        counts[name] = count
    return counts


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def add(source: Path, given: list[str], out: Path) -> str:
    """Write a model with adapters on it, which can be taken off again; say what was done.

    Raises:
        ValueError: see :func:`tokenformer.adapters.read_adapters`.
    """
    model = from_pretrained(source)
    there = take_off(model, source)
    return _write(model, there + read_adapters(given, model, there), source, out)


def remove(source: Path, names: list[str], out: Path) -> str:
    """Write a model without some of its adapters, by default without all; say what was done.

    Raises:
        ValueError: for a name that is not among them.
    """
    model = from_pretrained(source)
    there = take_off(model, source)
    known = [adapter.name for adapter in there]
    if not known or (unknown := sorted(set(names) - set(known))):
        wrong = f"has no adapter {unknown[0]}" if known else "has no adapters on it"
        raise ValueError(f"{source}: {wrong}" + (f": choose of {', '.join(known)}" if known else ""))
    return _write(model, [adapter for adapter in there if names and adapter.name not in names], source, out)


def merge(source: Path, given: list[str], out: Path) -> str:
    """Write a model of which the adapters on it and those given are a part; say what was done.

    Raises:
        ValueError: see :func:`tokenformer.adapters.read_adapters`.
    """
    model = from_pretrained(source)
    there = take_off(model, source)
    return _write(model, there + read_adapters(given, model, there), source, out, for_good=True)


def _write(
    model: TokenFormerLM | TokenFormerViT, adapters: list[Adapter], source: Path, out: Path, for_good: bool = False
) -> str:
    """Write a base with adapters as a folder, with what lies beside it in the old one."""
    base = fingerprint(model)
    owners = put_on(model, adapters)
    on = ", ".join(f"{a.name} (times {a.weight:g})" if a.weight != 1 else a.name for a in adapters) or "no adapters"
    with new_folder(out) as folder:
        save_pretrained(model, folder, join=for_good or not adapters)
        if adapters and not for_good:
            write_record(folder, base, adapters, owners)
        origin = f"From `{source.name}`, whose card tells of its training, with {on}, by `tokenformer adapter`."
        describe_copy(model, source, folder, out.name, origin)
    return f"wrote {out}: {model.num_params():,} parameters, the base {base[:16]} with {on}"


def main(args: list[str]) -> None:
    """The command `tokenformer adapter`; its `--help` is this file's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tokenformer adapter", description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="save | add | remove | merge")
    new: dict[str, Any] = {
        "type": Path,
        "required": True,
        "help": "the folder to write; must not be there",
        "metavar": "DIR",
    }
    files: dict[str, Any] = {"metavar": "FILE[=WEIGHT]", "help": "of `adapter save`; what it adds times WEIGHT"}

    one = commands.add_parser("save", help="the new tokens of a run, as a file")
    one.add_argument("source", type=Path, metavar="CKPT", help="a run's folder, or a checkpoint of it")
    one.add_argument("--out", type=Path, required=True, metavar="FILE", help="NAME.safetensors; must not be there")
    one.add_argument("--base", type=Path, help="what was trained on, to compare with; a folder or a checkpoint")
    one.add_argument("--weights", choices=get_args(Weights), default="average", help="which, of a run with EMA")
    one.set_defaults(command=save)
    for command, argument, needed, what in (
        (add, "given", "+", "put adapters on a model"),
        (remove, "names", "*", "take adapters off"),
        (merge, "given", "*", "make them part of the model"),
    ):
        one = commands.add_parser(command.__name__, help=what)
        one.add_argument("source", type=Path, metavar="MODEL", help="the folder of an exported model")
        about = files if argument == "given" else {"metavar": "NAME", "help": "default: all of them"}
        one.add_argument(argument, nargs=needed, **about)
        one.add_argument("--out", **new)
        one.set_defaults(command=command)
    given = vars(parser.parse_args(args))
    print(given.pop("command")(**given))
