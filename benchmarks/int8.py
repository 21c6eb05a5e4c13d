"""A language model with its blocks' weights in int8: the loss of a text, memory, and the time of writing.

    python -m benchmarks.int8 MODEL... --text FILE

MODEL is a checkpoint or an exported folder. The table is printed, and written to benchmarks/results/int8.csv: `loss`
and `MB` of all weights, as the model is and in int8; `time`, that of `generate` in int8 over that of the model as it
is, median of rounds in turn.
"""

import argparse
import statistics
from copy import deepcopy
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from benchmarks.harness import Row, round_ratios, time_in_turn, write_csv
from benchmarks.sparse import mean_loss
from tokenformer import TokenFormerLM, generate
from tokenformer.int8 import quantize_blocks


@torch.no_grad()
def compare(model: TokenFormerLM, ids: torch.Tensor, length: int = 64, rounds: int = 5) -> Row:
    """A model, in eval mode, beside itself in int8.

    Args:
        model: stays as it is.
        ids: of a text whose loss is taken, (T,).
        length: of what is written.
        rounds: of writing.
    """
    int8 = deepcopy(model)
    quantize_blocks(int8)
    found: Row = {"params": model.num_params()}
    for name, of in (("", model), (" int8", int8)):
        found |= {f"loss{name}": f"{mean_loss(of, ids)[0]:.4f}", f"MB{name}": f"{stored_bytes(of) / 1e6:.2f}"}
    writing = {name: partial(generate, of, ids[None, :8], length) for name, of in (("model", model), ("int8", int8))}
    ratios = round_ratios(time_in_turn(writing, rounds), "int8", "model")
    return found | {
        "time": f"{statistics.median(ratios):.2f}",
        "lowest": f"{min(ratios):.2f}",
        "highest": f"{max(ratios):.2f}",
    }


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights; those in int8 with a scale and a zero point for each row."""
    parts = [
        [getattr(p, n) for n in p.__tensor_flatten__()[0]] if hasattr(p, "qdata") else [p] for p in model.parameters()
    ]
    return sum(part.numel() * part.element_size() for part in chain.from_iterable(parts))


def main() -> None:
    """Measure, print, write."""
    from lit_modules.commands.tokenizers import tokenizer_of
    from lit_modules.modules.loading import load_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="what the loss is of")
    given = parser.parse_args()
    rows = []
    for path in given.models:
        (ids,) = tokenizer_of(path).encode_batch([given.text.read_text(encoding="utf-8")])
        rows.append({"model": path.stem} | compare(load_model(path), torch.tensor(ids)))
    for line in (list(rows[0]), *(row.values() for row in rows)):
        print(*line, sep=" | ")
    print(f"rows in {write_csv('int8', rows)}")


if __name__ == "__main__":
    main()
