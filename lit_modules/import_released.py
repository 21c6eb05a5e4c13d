"""Make a folder of a released TokenFormer checkpoint, which grows, trains on and evaluates like any other model.

PATH is the file of the weights (pytorch_model.bin, or .safetensors) or the folder that holds it, in one file or in
shards with their index. It is read without running code, and every tensor's name and shape is checked. A DeepSpeed
ZeRO folder has to be made one file first, by the zero_to_fp32.py that lies in it.

  tokenformer import TokenFormer-150M --out models/150m --tokenizer hub:EleutherAI/gpt-neox-20b
  tokenformer fit --config FILE --model.init_from models/150m
  tokenformer grow models/150m --factor 2 --out models/grown
"""

import argparse
import json
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_modules.export import new_folder
from lit_modules.model_card import model_card
from lit_modules.saved import save_tokenizer, tokenizer_of
from tokenformer import load_official, save_pretrained
from tokenformer.interop import RELEASED, wanted_command

WHOLE = ("pytorch_model.bin", "model.safetensors")


def import_released(source: Path, out: Path, num_heads: int | None = None, tokenizer: str | None = None) -> str:
    """Write a released checkpoint as a folder of ours; say what was done.

    Args:
        source: the file, or the folder that holds it.
        out: the folder, which must not be there.
        num_heads: attention heads; known for the widths of the released models.
        tokenizer: a file or hub:NAME; default: the tokenizer.json beside the weights.

    Raises:
        ValueError: for what is no such checkpoint, with all tensors that are missing, unknown or of a wrong shape.
    """
    with new_folder(out) as folder:
        files = weight_files(source)
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= _read(file)
        model = load_official(tensors, num_heads)
        save_pretrained(model, folder)
        has_tokenizer = tokenizer is not None or (files[0].parent / "tokenizer.json").is_file()
        if has_tokenizer:
            found = tokenizer_of(files[0].parent, tokenizer)
            if found.vocab_size > model.config.vocab_size:
                raise ValueError(
                    f"--tokenizer {tokenizer}: makes ids up to {found.vocab_size - 1}, the model has "
                    f"{model.config.vocab_size}; the released models' is hub:EleutherAI/gpt-neox-20b"
                )
            save_tokenizer(found, folder, model.config.max_seq_len)
        origin = f"From `{source.name}`, in the layout of the released checkpoints: the same numbers under other names."
        card = model_card(model, out.name, origin, has_tokenizer=has_tokenizer)
        (folder / "README.md").write_text(card)
    notes = [] if has_tokenizer else ["no tokenizer was written, give one by --tokenizer"]
    if others := [name for name in tensors if not name.startswith(RELEASED)]:
        listed = ", ".join(sorted(others)[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        notes.append(f"passed over, since their names don't start with {RELEASED!r}: {listed}")
    return "\n".join([*notes, f"wrote {out}: {model.num_params():,} parameters"])


def weight_files(source: Path) -> list[Path]:
    """The files with the weights: the one given, or those in a folder.

    Raises:
        ValueError: when there are none; says which command reads what is there.
    """
    if source.is_file() and source.suffix != ".ckpt":
        return [source]
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.is_file() or (source / "meta.pt").exists():
        raise ValueError(f"{source} is a checkpoint of `tokenformer fit`; {wanted_command(source)}")
    for name in WHOLE:
        if (source / name).is_file():
            return [source / name]
        if (source / f"{name}.index.json").is_file():
            listed = json.loads((source / f"{name}.index.json").read_text())["weight_map"]
            shards = [source / Path(shard).name for shard in sorted(set(listed.values()))]
            if absent := [shard.name for shard in shards if not shard.is_file()]:
                raise ValueError(f"{source / name}.index.json names files that are not there: {', '.join(absent)}")
            return shards
    if (source / "zero_to_fp32.py").is_file() or any(source.glob("*/*zero_pp_rank_*")):
        raise ValueError(
            f"{source} holds the parts of a DeepSpeed ZeRO checkpoint: make them one file by the script that lies in "
            f"it, `cd {source} && python zero_to_fp32.py . pytorch_model.bin`, and import that"
        )
    raise ValueError(f"{source}: has none of {', '.join(WHOLE)} nor an index of their shards")


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, "cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"{file}: is no file of tensors alone, reading it might run code: {error}") from error
    except Exception as error:  # of damaged files torch.load raises whatever it stumbles over
        raise ValueError(f"{file}: damaged, or no file of tensors: {error}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file}: holds no dictionary of tensors")
    return tensors


def main(args: list[str]) -> None:
    """The command `tokenformer import`; its `--help` is this file's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tokenformer import", description=__doc__, formatter_class=layout)
    parser.add_argument(
        "source", type=Path, metavar="PATH", help="the file of the weights, or the folder that holds it"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write; must not be there")
    heads = "attention heads (default: those of the released model of that width)"
    parser.add_argument("--num_heads", type=int, metavar="H", help=heads)
    parser.add_argument("--tokenizer", help="a tokenizer.json or hub:NAME (default: the one beside the weights)")
    print(import_released(**vars(parser.parse_args(args))))
