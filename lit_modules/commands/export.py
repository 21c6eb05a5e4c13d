"""Make a folder of the model in a checkpoint, which is read without Lightning, and can be published.

CKPT is what `tokenformer fit` or `tokenformer grow` wrote: one file, or the folder of a sharded checkpoint (FSDP2). DIR
gets model.safetensors (parameter tokens that share a norm joined), config.json, a model card; for a language model its
tokenizer, which is found by the run's config.yaml; for an image model preprocessing and names of classes, for us, timm
and transformers, and class_map.txt, its classes in their order.

  tokenformer export runs/small/20260131-120000-ab12/checkpoints/step-00002000.ckpt --out models/small
  tokenformer export step-00002000.ckpt --out models/small --weights raw --dtype bfloat16 --tokenizer tokenizer.json
  tokenformer export step-00002000.ckpt --out models/small --format onnx

In Python: tokenformer.from_pretrained("models/small").
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch

from lit_modules.checkpoints.reading import config_of, read_checkpoint, run_dir_of
from lit_modules.commands.model_card import model_card
from lit_modules.commands.predict import described
from lit_modules.commands.tokenizers import TOKENIZER_FILES, save_tokenizer, tokenizer_of
from lit_modules.modules.classes import CLASS_MAP
from lit_modules.modules.loading import ADAPTER_OPTION, Weights, model_from_checkpoint
from tokenformer import TokenFormerLM, TokenFormerViT, save_pretrained
from tokenformer.adapters import add_adapters
from tokenformer.onnx import save_onnx

Format = Literal["safetensors", "onnx"]
DType = Literal["float32", "float16", "bfloat16"]


def export(
    source: Path,
    out: Path,
    weights: Weights = "average",
    dtype: DType | None = None,
    tokenizer: str | None = None,
    format: Format = "safetensors",
    adapter: Sequence[str] = (),
) -> str:
    """Write the model in a checkpoint as a folder; say what was done.

    Args:
        source: the checkpoint.
        out: the folder, which must not be there.
        weights: of a checkpoint with an average (EMA): that, or the weights themselves.
        dtype: precision of the file; default: the checkpoint's.
        tokenizer: bytes, a file or hub:NAME; default: the run's.
        format: onnx for a `model.onnx` beside `model.safetensors`.
        adapter: files of adapters, which become part of the model.

    Raises:
        ValueError: for a checkpoint that can't be read, a folder that exists, a tokenizer that is none or has no use.
    """
    with new_folder(out) as folder:
        checkpoint = read_checkpoint(source)
        model = model_from_checkpoint(checkpoint, weights)
        add_adapters(model, source, adapter)
        if dtype is not None:
            model.to(getattr(torch, dtype))
        if isinstance(model, TokenFormerViT):
            model.pretrained_cfg = described(checkpoint, config_of(source))
        save_pretrained(model, folder)
        if format == "onnx":
            save_onnx(model, folder / "model.onnx")
        notes: list[str] = []
        if isinstance(model, TokenFormerLM):
            try:
                save_tokenizer(tokenizer_of(source, tokenizer), folder, model.config.max_seq_len)
            except ValueError as error:
                if tokenizer is not None:
                    raise
                notes.append(f"no tokenizer was written; {error}")
        elif tokenizer is not None:
            raise ValueError(f"--tokenizer {tokenizer}: leave it out, {source} is an image model")
        elif "class_names" in checkpoint:
            text = "".join(f"{name}\n" for name in checkpoint["class_names"])
            (folder / CLASS_MAP).write_text(text, encoding="utf-8")
        both = "current_model_state" in checkpoint
        kind = {"average": "the moving average of the weights", "raw": "the weights, not their average"}[weights]
        origin = f"From `{source.name}`" + (f": {kind}" if both else "") + (f", as {dtype}" if dtype else "")
        origin += "".join(f", with the adapter `{Path(file).name}`" for file in adapter) + "."
        run = run_dir_of(source)
        card = model_card(
            model,
            out.name,
            origin,
            checkpoint=checkpoint,
            config=config_of(source),
            metrics=run / "metrics.csv" if run else None,
            raw=weights == "raw",
            has_tokenizer=(folder / "tokenizer.json").exists(),
        )
        (folder / "README.md").write_text(card)
    return "\n".join([*notes, f"wrote {out}: {model.num_params():,} parameters, {kind if both else 'the weights'}"])


def describe_copy(model: TokenFormerLM | TokenFormerViT, source: Path, folder: Path, name: str, origin: str) -> None:
    """Put beside a model in a folder what lies beside the one that it was made of, and a card of its own."""
    beside = [file for file in (*TOKENIZER_FILES, CLASS_MAP) if (source / file).is_file()]
    for file in beside:
        shutil.copy(source / file, folder)
    card = model_card(model, name, origin, has_tokenizer="tokenizer.json" in beside)
    (folder / "README.md").write_text(card)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `out` when that has succeeded.

    Raises:
        ValueError: when `out` is there.
    """
    if out.exists():
        raise ValueError(f"--out {out} exists: choose another name")
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(args: list[str]) -> None:
    """The command `tokenformer export`; its `--help` is this file's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tokenformer export", description=__doc__, formatter_class=layout)
    parser.add_argument(
        "source", type=Path, metavar="CKPT", help="a checkpoint: a file, or the folder of a sharded one"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write; must not be there")
    parser.add_argument("--weights", choices=get_args(Weights), default="average", help="which, of a run with EMA")
    parser.add_argument("--dtype", choices=get_args(DType), help="precision of the file (default: the checkpoint's)")
    onnx = "onnx: a model.onnx too, for any batch and length or image size (pip install 'tokenformer[onnx]')"
    parser.add_argument("--format", choices=get_args(Format), default="safetensors", help=onnx)
    parser.add_argument("--tokenizer", help="bytes, a tokenizer.json or hub:NAME (default: the run's)")
    parser.add_argument("--adapter", **ADAPTER_OPTION)
    print(export(**vars(parser.parse_args(args))))
