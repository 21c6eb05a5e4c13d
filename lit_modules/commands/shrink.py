"""Make a smaller model of one: some of the parameter tokens of every layer.

CKPT is a checkpoint of a run, or the folder of an exported model. Which tokens stay:

  --by order      the first ones, with the tau of as many. As good as a model of their number if the training has used
                  its first tokens alone, now more of them, now fewer, which the callback ElasticTokens does. Of a
                  Transformer baseline the first hidden units of every MLP.
  --by use        those with the largest mean |weight| times |value| on a text or on images
  --by gradient   those without which the loss goes up most there, to first order

By use or gradient, at least one token of each growth stays, and the loss before and after is told. Then --out may be a
checkpoint (.ckpt) too, with the optimizer's state of the tokens that stay: `tokenformer fit --ckpt_path FILE` trains it
on, and may grow it again.

  tokenformer shrink runs/elastic/20260131-120000-ab12/checkpoints/step-00002000.ckpt --keep 0.5 --out models/half
  tokenformer shrink models/whole --keep 0.7 --by use --text letters.txt --out models/pruned
  tokenformer shrink step-00002000.ckpt --keep 0.7 --by gradient --images photos/val --out pruned.ckpt
"""

import argparse
import math
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from tqdm import tqdm

from lit_modules.checkpoints.reading import read_checkpoint
from lit_modules.checkpoints.writing import write_checkpoint
from lit_modules.commands.export import describe_copy, export, new_folder
from lit_modules.commands.inspect_inputs import Batch, Images, Texts, shown
from lit_modules.growth.history import count_by_kind, measured_costs
from lit_modules.modules.loading import Weights, load_model, module_from_checkpoint
from tokenformer import TokenFormerLM, TokenFormerViT, from_pretrained, save_pretrained
from tokenformer.elastic import check_share, shrunk
from tokenformer.files import is_exported
from tokenformer.growth import pattention_layers
from tokenformer.inspection import LayerStatistics, watching
from tokenformer.pruning import By, Kept, gradient_use, keep_tokens, most_used, use

Model = TokenFormerLM | TokenFormerViT


def shrink(
    source: Path,
    keep: float,
    out: Path,
    by: Literal["order", By] = "order",
    text: Path | None = None,
    images: Path | None = None,
    weights: Weights = "average",
    tokenizer: str | None = None,
) -> str:
    """Write a model with some of the tokens of another; say what was done.

    Args:
        source: the other one, a checkpoint or an exported folder.
        keep: the share of the tokens.
        out: the folder or the checkpoint, which must not be there.
        by: which tokens stay.
        text: a file on which they are ranked, for a language model.
        images: a folder, for an image model.
        weights: of a checkpoint with an average (EMA): that, or the weights themselves.
        tokenizer: bytes, a file or hub:NAME; default: the model's.

    Raises:
        ValueError: see :func:`tokenformer.elastic.shrunk` and :func:`tokenformer.pruning.most_used`; for what can't be
            read or written; for data where none is used, and the other way round.
    """
    if (by == "order") != (text is None and images is None):
        raise ValueError(f"--by {by}: give --text FILE or --images FOLDER for use and gradient, and neither for order")
    if out.suffix == ".ckpt" and (by == "order" or source.suffix != ".ckpt" or not source.is_file()):
        raise ValueError(
            f"--out {out}: a checkpoint is made of a checkpoint in one file (.ckpt), by use or gradient: name a folder"
        )
    if out.exists():
        raise ValueError(f"--out {out} exists: choose another name")
    check_share(keep)
    start, notes = time.perf_counter(), []
    if by != "order":
        model = load_model(source, weights)
        if not pattention_layers(model):
            raise ValueError(f"{source}: is a baseline and has no parameter tokens: it is shrunk by order alone")
        data = shown(model, source, text, images, tokenizer)
        kept, before = rank(model, data, keep, by)
        keep_tokens(model, kept)
        measured: dict[str, Any] = {"loss_before": before, "loss_after": loss_on(model, data)}
        if math.isnan(before):  # no class is known
            measured = dict.fromkeys(measured, "")
        else:
            notes.append("loss {loss_before:.4f} -> {loss_after:.4f} nats".format_map(measured))
    if out.suffix == ".ckpt":
        checkpoint = read_checkpoint(source)
        params = shrink_checkpoint(checkpoint, source, kept, {"init": by, **measured}, start)
        write_checkpoint(checkpoint, out)
        return "\n".join([*notes, f"wrote {out}: {params['params_before']:,} -> {params['params_after']:,} parameters"])
    with new_folder(out) as folder, TemporaryDirectory() as exported:
        whole = source
        if not is_exported(source):
            whole = Path(exported) / "whole"
            *said, _ = export(source, whole, weights).splitlines()
            notes = [*said, *notes]
        large = from_pretrained(whole)
        smaller = shrunk(large, keep) if by == "order" else model.cpu()
        save_pretrained(smaller, folder)
        which = {"order": "first", "use": "most used", "gradient": "most important"}[by]
        origin = f"The {which} {keep:g} of the tokens of `{source.name}`, by `tokenformer shrink`."
        describe_copy(smaller, whole, folder, out.name, origin)
    return "\n".join([*notes, f"wrote {out}: {large.num_params():,} -> {smaller.num_params():,} parameters"])


def rank(model: Model, data: Texts | Images, keep: float, by: By) -> tuple[dict[str, Kept], float]:
    """What stays of each layer, and the loss with all of it, nan where no class is known."""
    device, layers = torch.device("cuda" if torch.cuda.is_available() else "cpu"), pattention_layers(model)
    model.to(device)
    statistics = {name: LayerStatistics(layer.num_tokens, 1, device) for name, layer in layers.items()}
    uses: dict[str, list[torch.Tensor]] = {}
    nats, count = 0.0, 0
    for given in tqdm(data.batches(), "rank", unit=" batches", disable=None):  # off where nobody looks
        batch = Batch(*(part.to(device) for part in given))
        with watching(model, statistics, batch.places), torch.set_grad_enabled(by == "gradient"):
            loss = data.loss(batch)
        known = int((batch.targets >= 0).sum())
        if known and by == "gradient":
            for name, parts in gradient_use(model, loss * known).items():
                sums = uses.setdefault(name, [torch.zeros_like(part) for part in parts])
                for total, part in zip(sums, parts, strict=True):
                    total += part
        nats, count = nats + known * float(loss.detach().nan_to_num()), count + known
    if not count and by == "gradient":
        raise ValueError("--by gradient: the class of none of the images is known: put them into folders with its name")
    if by == "use":
        uses = use(model, statistics)
    return most_used(model, uses, statistics, keep), nats / count if count else math.nan


@torch.no_grad()
def loss_on(model: Model, data: Texts | Images) -> float:
    """Mean cross-entropy, in nats; nan where no class is known."""
    nats, count, device = 0.0, 0, next(model.parameters()).device
    for given in data.batches():
        batch = Batch(*(part.to(device) for part in given))
        known = int((batch.targets >= 0).sum())
        nats, count = nats + known * float(data.loss(batch).nan_to_num()), count + known
    return nats / count if count else math.nan


def shrink_checkpoint(
    checkpoint: dict[str, Any], source: Path, kept: Mapping[str, Kept], measured: dict[str, Any], start: float
) -> dict[str, Any]:
    """Leave the weights in a checkpoint, their average and the optimizer's state some tokens; the record of that."""
    costs = measured_costs(checkpoint, source)
    rows_of = {
        f"model.{name}.segments.{i}.{kind}": rows
        for name, (parts, _) in kept.items()
        for i, rows in enumerate(parts)
        for kind in ("keys", "values")
    }
    for optimizer in checkpoint["optimizer_states"]:
        for group in optimizer["param_groups"]:
            if "param_names" not in group:
                raise ValueError(f"{source}: its optimizer does not say whose its state is: name a folder as --out")
            for number, name in zip(group["params"], group["param_names"], strict=True):
                state = optimizer["state"].get(number, {})
                for key, tensor in state.items():
                    if name in rows_of and tensor.ndim == 2:  # not the number of steps
                        state[key] = tensor[rows_of[name]]
    for key in ("state_dict", "current_model_state"):  # with EMA: average, weights
        if key in checkpoint:
            module: Any = module_from_checkpoint(checkpoint, key)
            params_before, layers = module.model.num_params(), pattention_layers(module.model)
            before = count_by_kind({name: layer.num_tokens for name, layer in layers.items()})
            keep_tokens(module.model, kept)
            after = count_by_kind({name: layer.num_tokens for name, layer in layers.items()})
            checkpoint[key] = module.state_dict()
    growths = checkpoint.get("growths", [])
    frozen: dict[str, Any] = growths[-1] if growths else {"train": "all", "new": [], "anneal_until": 0}
    record = {
        "stage": None,
        **costs,
        "init": measured["init"],
        "scale": "matched",
        "train": frozen["train"],
        "width": 1,
        **{f"{kind}_before": count for kind, count in before.items()},
        **{f"{kind}_after": count for kind, count in after.items()},
        "params_before": params_before,
        "params_after": module.model.num_params(),
        "key_stds": {},
        "asked": {},
        "new": frozen["new"],
        "anneal_until": frozen["anneal_until"],
        "loss_before": measured["loss_before"],
        "loss_after": measured["loss_after"],
        "seconds": time.perf_counter() - start,
    }
    checkpoint["growths"] = [*growths, record]
    return record


def main(args: list[str]) -> None:
    """The command `tokenformer shrink`; its `--help` is this file's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tokenformer shrink", description=__doc__, formatter_class=layout)
    parser.add_argument("source", type=Path, metavar="CKPT", help="a checkpoint, or the folder of an exported model")
    parser.add_argument("--keep", type=float, required=True, metavar="SHARE", help="of the tokens, such as 0.5")
    parser.add_argument("--by", choices=("order", *get_args(By)), default="order", help="which tokens stay")
    shown_to = parser.add_mutually_exclusive_group()
    shown_to.add_argument("--text", type=Path, metavar="FILE", help="where use and gradient are measured")
    shown_to.add_argument("--images", type=Path, metavar="FOLDER", help="the same for an image model")
    parser.add_argument("--out", type=Path, required=True, help="the folder or .ckpt to write; must not be there")
    parser.add_argument("--weights", choices=get_args(Weights), default="average", help="which, of a run with EMA")
    parser.add_argument("--tokenizer", help="bytes, a tokenizer.json or hub:NAME (default: the model's)")
    print(shrink(**vars(parser.parse_args(args))))
