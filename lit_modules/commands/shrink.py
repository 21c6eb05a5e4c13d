"""Make a smaller model of one: the first tokens of every layer, with the tau of as many.

CKPT is a checkpoint of a run, or the folder of an exported model. What comes out is as good as a model of its size if
the training has used its first tokens alone, now more of them, now fewer, which the callback ElasticTokens does. Of a
Transformer baseline the first hidden units of every MLP are kept.

  tokenformer shrink runs/elastic/20260131-120000-ab12/checkpoints/step-00002000.ckpt --keep 0.5 --out models/half
  tokenformer shrink models/whole --keep 0.25 --out models/quarter
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from lit_modules.commands.export import describe_copy, export, new_folder
from lit_modules.modules.loading import Weights
from tokenformer import from_pretrained, save_pretrained
from tokenformer.elastic import shrunk
from tokenformer.files import is_exported


def shrink(source: Path, keep: float, out: Path, weights: Weights = "average") -> str:
    """Write a model with the first tokens of another as a folder; say what was done.

    Args:
        source: the other one, a checkpoint or an exported folder.
        keep: the share of the tokens.
        out: the folder, which must not be there.
        weights: of a checkpoint with an average (EMA): that, or the weights themselves.

    Raises:
        ValueError: see :func:`tokenformer.elastic.shrunk`; for what can't be read or written.
    """
    with new_folder(out) as folder, TemporaryDirectory() as exported:
        whole, notes = source, []
        if not is_exported(source):
            whole = Path(exported) / "whole"
            *notes, _ = export(source, whole, weights).splitlines()
        model = from_pretrained(whole)
        smaller = shrunk(model, keep)
        save_pretrained(smaller, folder)
        origin = f"The first {keep:g} of the tokens of `{source.name}`, by `tokenformer shrink`."
        describe_copy(smaller, whole, folder, out.name, origin)
    return "\n".join([*notes, f"wrote {out}: {model.num_params():,} -> {smaller.num_params():,} parameters"])


def main(args: list[str]) -> None:
    """The command `tokenformer shrink`; its `--help` is this file's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tokenformer shrink", description=__doc__, formatter_class=layout)
    parser.add_argument("source", type=Path, metavar="CKPT", help="a checkpoint, or the folder of an exported model")
    parser.add_argument("--keep", type=float, required=True, metavar="SHARE", help="of the tokens, such as 0.5")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write; must not be there")
    parser.add_argument("--weights", choices=get_args(Weights), default="average", help="which, of a run with EMA")
    print(shrink(**vars(parser.parse_args(args))))
