"""Append parameter tokens to a model in a file: the growth that the callback does in a running training, offline.

CKPT is a checkpoint of a run, or an exported model (.safetensors). A checkpoint's optimizer state, position in the data
and costs are carried over, so that `tokenformer fit --ckpt_path FILE` goes on from there.

  tokenformer grow runs/small/20260131-120000-ab12/checkpoints/step-00002000.ckpt --factor 2 --out grown.ckpt
  tokenformer grow model.safetensors --qkv 2140 --proj 2140 --ffn 8560 --out grown.safetensors
"""

import argparse
import time
from pathlib import Path
from typing import Any, get_args

import torch

from lit_modules.callbacks.checkpoint import AtomicCheckpointIO, damage
from lit_modules.growth import Recipe, Stage, describe, grow_modules
from lit_modules.language import LanguageModule
from lit_modules.optim import OptimConfig
from lit_modules.vision import VisionModule
from tokenformer import TokenFormerViT
from tokenformer.growth import Init
from tokenformer.interop import load_model, save_model


def grow_file(source: Path, out: Path, stage: Stage, recipe: Recipe) -> str:
    """Grow the model in `source` and write it to `out`; say what was done.

    Raises:
        ValueError: for files that can't be read or written, and for growth that is impossible.
    """
    if not source.is_file():
        raise ValueError(f"{source}: no such file; a sharded checkpoint (a folder) has to be made one file first")
    if out.suffix != source.suffix:
        raise ValueError(f"--out {out}: must end in {source.suffix}, as {source.name} does")
    if out.exists():
        raise ValueError(f"--out {out} exists: choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if source.suffix == ".safetensors":
        model = load_model(source)
        kind: Any = VisionModule if isinstance(model, TokenFormerViT) else LanguageModule
        module = kind(model.config, OptimConfig())
        module.install(model)
        probe = _probe(model)
        record = grow_modules([module], stage, recipe)
        assert module.model is not None
        save_model(module.model, out)
        return _said(record, probe, _probe(module.model), out)
    if problem := damage(source):
        raise ValueError(f"{source}: {problem}")
    checkpoint = torch.load(source, "cpu", weights_only=True)
    keys = [key for key in ("state_dict", "current_model_state") if key in checkpoint]  # with EMA: average, weights
    modules = [_module(checkpoint, key) for key in keys]
    before = [_probe(module.model) for module in modules]
    record = grow_modules(modules, stage, recipe)
    after = [_probe(module.model) for module in modules]
    if "Throughput" not in checkpoint.get("callbacks", {}):
        raise ValueError(f"{source} does not say what its training has cost, so `tokenformer fit` has not written it")
    costs = checkpoint["callbacks"]["Throughput"]
    when = {"step": checkpoint["global_step"], "tokens": costs["tokens"], "flops": costs["flops"]}
    measured = {"anneal_until": 0, "loss_before": "", "loss_after": "", "seconds": time.perf_counter() - start}
    checkpoint["growths"] = [*checkpoint.get("growths", []), {"stage": None} | when | record | measured]
    for key, module in zip(keys, modules, strict=True):
        checkpoint[key] = module.state_dict()
    AtomicCheckpointIO().save_checkpoint(checkpoint, out)
    return _said(record, before[0], after[0], out)


def _module(checkpoint: dict[str, Any], key: str) -> LanguageModule | VisionModule:
    hyper = checkpoint["hyper_parameters"]
    if "patch_size" in hyper["config"]:
        if hyper["timm_model"] is not None:
            raise ValueError(f"{hyper['timm_model']} is a timm model, without parameter tokens: it does not grow")
        module: Any = VisionModule(hyper["config"], hyper["optim"])
    else:
        module = LanguageModule(hyper["config"], hyper["optim"])
    module.configure_model()
    module.restore_growth(checkpoint[key], checkpoint.get("growths", []))
    dtype = next(tensor.dtype for name, tensor in checkpoint[key].items() if name.startswith("model."))
    module.to(dtype).load_state_dict(checkpoint[key])
    module.eval()
    return module


@torch.no_grad()
def _probe(model: Any) -> torch.Tensor:
    """Logits of random tokens or pixels: what growth must not change."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, TokenFormerViT):
        side = model.config.image_size
        images = torch.randn(2, model.config.in_channels, side, side, generator=generator)
        return model(images.to(next(model.parameters()))).double()
    return model(torch.randint(model.config.vocab_size, (1, 64), generator=generator)).double()


def _said(record: dict[str, Any], before: torch.Tensor, after: torch.Tensor, out: Path) -> str:
    moved = float((after - before).norm() / before.norm())
    return f"{describe(record)}; the logits of random input moved by {moved:.1e} of their norm; wrote {out}"


def main(args: list[str]) -> None:
    """The command `tokenformer grow`; its `--help` is this file's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tokenformer grow", description=__doc__, formatter_class=layout)
    parser.add_argument("source", type=Path, metavar="CKPT", help="a checkpoint (.ckpt) or model (.safetensors)")
    parser.add_argument("--out", type=Path, required=True, help="the file to write; an existing one is left alone")
    for kind, what in (("qkv", "query, key and value"), ("proj", "output"), ("ffn", "feed-forward")):
        parser.add_argument(f"--{kind}", type=int, metavar="N", help=f"tokens of each {what} layer afterwards")
    parser.add_argument("--factor", type=float, help="in place of counts: tokens afterwards over tokens before")
    parser.add_argument("--width", type=int, help="in place of both, for a Transformer baseline: times the channels")
    parser.add_argument("--init", choices=get_args(Init), default=Recipe.init, help="how new tokens start")
    scales = ("fixed", "learned", "current")  # annealing takes steps
    parser.add_argument("--scale", choices=scales, default=Recipe.scale, help="what tau does from then on")
    parser.add_argument("--layers", nargs="+", default="all", help="some of query, key, value, out, ffn, or patterns")
    parser.add_argument("--seed", type=int, default=0, help="of the new tokens")
    given = vars(parser.parse_args(args))
    source, out = given.pop("source"), given.pop("out")
    recipe = Recipe(**{name: given.pop(name) for name in ("init", "scale", "layers", "seed")})
    print(grow_file(source, out, Stage(at_step=1, **given), recipe))
