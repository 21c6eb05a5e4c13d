"""Make a folder of a released TokenFormer checkpoint, which grows, trains on and evaluates like any other model.

PATH is the file of the weights (pytorch_model.bin, or .safetensors) or the folder that holds it, in one file or in
shards with their index. It is read without running code, and every tensor's name and shape is checked. A DeepSpeed
ZeRO folder has to be made one file first, by the zero_to_fp32.py that lies in it. Of a checkpoint of `tokenformer fit`
(.ckpt) it makes what `tokenformer export` makes; of one of timm's train.py (.pth.tar) an image model's folder.

  tokenformer import TokenFormer-150M --out models/150m --tokenizer hub:EleutherAI/gpt-neox-20b
  tokenformer fit --config FILE --model.init_from models/150m
  tokenformer grow models/150m --factor 2 --out models/grown
"""

import argparse
from pathlib import Path
from typing import Any

from lit_modules.commands.export import export, new_folder
from lit_modules.commands.model_card import model_card
from lit_modules.commands.tokenizers import save_tokenizer, tokenizer_of
from tokenformer import load_official, save_pretrained
from tokenformer.interop import load_trained
from tokenformer.released import RELEASED, read_released


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
    if source.suffix == ".ckpt":
        return export(source, out, tokenizer=tokenizer)
    if source.suffix == ".tar":
        with new_folder(out) as folder:
            model: Any = load_trained(source)
            save_pretrained(model, folder)
            card = model_card(model, out.name, f"From `{source.name}`, a checkpoint of timm's train.py.")
            (folder / "README.md").write_text(card)
        return f"wrote {out}: {model.num_params():,} parameters"
    with new_folder(out) as folder:
        tensors = read_released(source)
        model = load_official(tensors, num_heads)
        save_pretrained(model, folder)
        beside = source if source.is_dir() else source.parent
        has_tokenizer = tokenizer is not None or (beside / "tokenizer.json").is_file()
        if has_tokenizer:
            found = tokenizer_of(beside, tokenizer)
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
