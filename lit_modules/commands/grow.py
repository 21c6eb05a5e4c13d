"""Append parameter tokens to a model in a file: the growth that the callback does in a running training, offline.

CKPT is a checkpoint of a run (one file), or the folder of an exported model. A checkpoint's optimizer state, position
in the data and costs are carried over, so that `tokenformer fit --ckpt_path FILE` resumes from there.

  tokenformer grow runs/small/20260131-120000-ab12/checkpoints/step-00002000.ckpt --factor 2 --out grown.ckpt
  tokenformer grow models/small --qkv 2140 --proj 2140 --ffn 8560 --out models/grown
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any, get_args

import torch

from lit_modules.checkpoints.reading import read_checkpoint
from lit_modules.checkpoints.writing import write_checkpoint
from lit_modules.commands.export import new_folder
from lit_modules.commands.model_card import model_card
from lit_modules.commands.tokenizers import TOKENIZER_FILES
from lit_modules.growth.history import describe, measured_costs
from lit_modules.growth.recipe import Recipe, grow_modules
from lit_modules.growth.stages import Stage
from lit_modules.modules.language import LanguageModule
from lit_modules.modules.loading import module_from_checkpoint
from lit_modules.modules.vision import VisionModule
from lit_modules.optim.config import OptimConfig
from tokenformer import TokenFormerViT, from_pretrained, save_pretrained
from tokenformer.files import is_exported, wrong_kind
from tokenformer.growth import Init


def grow_file(source: Path, out: Path, stage: Stage, recipe: Recipe) -> str:
    """Grow the model in `source` and write it to `out`; say what was done.

    Raises:
        ValueError: for files that can't be read or written, and for growth that is impossible.
    """
    exported = is_exported(source)
    if not exported and (source.suffix != ".ckpt" or not source.is_file()):
        raise wrong_kind(source, "wanted is a checkpoint in one file (.ckpt) or the folder of an exported model")
    if not exported and out.suffix != source.suffix:
        raise ValueError(f"--out {out}: must end in {source.suffix}, as {source.name} does")
    if out.exists():
        raise ValueError(f"--out {out} exists: choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if exported:
        model = from_pretrained(source)
        kind: Any = VisionModule if isinstance(model, TokenFormerViT) else LanguageModule
        module = kind(model.config, OptimConfig())
        module.set_model(model)
        probe = _probe(model)
        record = grow_modules([module], stage, recipe)
        assert module.model is not None
        with new_folder(out) as folder:
            save_pretrained(module.model, folder)
            copied = [shutil.copy(source / name, folder) for name in TOKENIZER_FILES if (source / name).is_file()]
            origin = (
                f"From `{source.name}`, whose card tells of its training, by `tokenformer grow`: {describe(record)}."
            )
            (folder / "README.md").write_text(model_card(module.model, out.name, origin, has_tokenizer=bool(copied)))
        return _report(record, probe, _probe(module.model), out)
    checkpoint = read_checkpoint(source)
    keys = [key for key in ("state_dict", "current_model_state") if key in checkpoint]  # with EMA: average, weights
    modules = [module_from_checkpoint(checkpoint, key) for key in keys]
    before = [_probe(module.model) for module in modules]
    record = grow_modules(modules, stage, recipe)
    after = [_probe(module.model) for module in modules]
    when = measured_costs(checkpoint, source)
    measured = {"anneal_until": 0, "loss_before": "", "loss_after": "", "seconds": time.perf_counter() - start}
    checkpoint["growths"] = [*checkpoint.get("growths", []), {"stage": None} | when | record | measured]
    for key, module in zip(keys, modules, strict=True):
        checkpoint[key] = module.state_dict()
    for optimizer in checkpoint["optimizer_states"] if stage.width is not None else ():
        optimizer["state"] = {}  # all weights are new
    write_checkpoint(checkpoint, out)
    return _report(record, before[0], after[0], out)


@torch.no_grad()
def _probe(model: Any) -> torch.Tensor:
    """Logits of random tokens or pixels: what growth must not change."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, TokenFormerViT):
        side = model.config.image_size
        images = torch.randn(2, model.config.in_channels, side, side, generator=generator)
        return model(images.to(next(model.parameters()))).double()
    return model(torch.randint(model.config.vocab_size, (1, 64), generator=generator)).double()


def _report(record: dict[str, Any], before: torch.Tensor, after: torch.Tensor, out: Path) -> str:
    moved = float((after - before).norm() / before.norm())
    return f"{describe(record)}; the logits of random input moved by {moved:.1e} of their norm; wrote {out}"


def main(args: list[str]) -> None:
    """The command `tokenformer grow`; its `--help` is this file's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tokenformer grow", description=__doc__, formatter_class=layout)
    parser.add_argument(
        "source", type=Path, metavar="CKPT", help="a checkpoint (.ckpt), or the folder of an exported model"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the file or folder to write; an existing one is left alone"
    )
    for kind, what in (("qkv", "query, key and value"), ("proj", "output"), ("ffn", "feed-forward")):
        parser.add_argument(f"--{kind}", type=int, metavar="N", help=f"tokens of each {what} layer afterwards")
    parser.add_argument("--factor", type=float, help="in place of counts: tokens afterwards over tokens before")
    parser.add_argument("--width", type=int, help="in place of both, for a Transformer baseline: times the channels")
    starts = "how new tokens start (default: %(default)s)"
    parser.add_argument("--init", choices=get_args(Init), default=Recipe.init, help=starts)
    scales = ("fixed", "learned", "current")  # annealing takes steps
    parser.add_argument("--scale", choices=scales, default=Recipe.scale, help="what tau does from then on")
    parser.add_argument("--layers", nargs="+", default="all", help="some of query, key, value, out, ffn, or patterns")
    parser.add_argument("--seed", type=int, default=0, help="of the new tokens")
    given = vars(parser.parse_args(args))
    source, out = given.pop("source"), given.pop("out")
    recipe = Recipe(**{name: given.pop(name) for name in ("init", "scale", "layers", "seed")})
    print(grow_file(source, out, Stage(at_step=1, **given), recipe))
