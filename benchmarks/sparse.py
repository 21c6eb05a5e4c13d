"""Sparse use of parameter tokens at inference: the k largest scores of a row only.

    python -m benchmarks.sparse MODEL --text FILE      the loss of a text against k
    python -m benchmarks.sparse                        the time of a layer, for one input token

MODEL is a checkpoint or an exported folder of a language model. Tables are printed, and written to
benchmarks/results/sparse_loss.csv and sparse_time.csv. A time's ratio is over that of the layer with all of its tokens,
in the same round.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import Row, round_ratios, time_in_turn, write_csv
from tokenformer import Pattention, TokenFormerLM
from tokenformer.growth import pattention_layers

SHARES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
COUNTS = (4096, 16384, 65536)
DIM = 768


def use_top_k(model: torch.nn.Module, share: float) -> None:
    """Let each layer use so many of its tokens, those with a row's largest scores."""
    for layer in pattention_layers(model).values():
        layer.top_k = max(1, round(share * layer.num_tokens))


@torch.no_grad()
def mean_loss(model: TokenFormerLM, ids: torch.Tensor) -> tuple[float, int]:
    """Of a text's tokens, (T,), each given those before it in its piece, and of how many: all whole pieces."""
    length = min(model.config.max_seq_len, len(ids) - 1)
    pieces = ids[: 1 + (len(ids) - 1) // length * length]
    x, targets = pieces[:-1].view(-1, length), pieces[1:].view(-1, length)
    nats = [model.nats_and_entropy(*part)[0] for part in zip(x.split(8), targets.split(8), strict=True)]
    return float(torch.cat(nats).mean()), targets.numel()


def losses(model: TokenFormerLM, ids: torch.Tensor, shares: tuple[float, ...] = SHARES) -> list[Row]:
    """The mean loss of a text, a row for each share.

    Args:
        model: in eval mode; its `top_k` is that of the last share afterwards.
        ids: of the text, (T,).
        shares: of the tokens of each layer.
    """
    rows: list[Row] = []
    for share in shares:
        use_top_k(model, share)
        loss, tokens = mean_loss(model, ids)
        rows.append({"share": share, "loss": loss, "tokens": tokens})
    return rows


@torch.no_grad()
def times(counts: tuple[int, ...] = COUNTS, shares: tuple[float, ...] = SHARES[1:], rounds: int = 9) -> list[Row]:
    """The time of one input token in a layer, a row for each number of its tokens and each share."""
    rows: list[Row] = []
    for N in counts:
        layer = Pattention(DIM, DIM, N).eval()
        x = torch.randn(1, DIM)

        def call(k: int | None, layer: Pattention = layer, x: torch.Tensor = x) -> None:
            layer.top_k = k
            layer(x)

        ks = {share: max(1, round(share * N)) for share in shares}
        seconds = time_in_turn({"all": partial(call, None)} | {str(k): partial(call, k) for k in ks.values()}, rounds)
        for share, k in ks.items():
            ratios = round_ratios(seconds, str(k), "all")
            found = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
            all_ms = 1000 * statistics.median(seconds["all"])
            row: Row = {"N": N, "share": share, "k": k, "all_ms": f"{all_ms:.3f}"}
            rows.append(row | {name: f"{value:.2f}" for name, value in found.items()})
    return rows


def main() -> None:
    """Measure, print, write."""
    from lit_modules.commands.tokenizers import tokenizer_of
    from lit_modules.modules.loading import load_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="without: the times")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what the loss is of")
    given = parser.parse_args()
    if (given.model is None) != (given.text is None):
        parser.error("give MODEL and --text FILE, or neither")
    if given.model is None:
        rows, name = times(), "sparse_time"
    else:
        model = load_model(given.model)
        (ids,) = tokenizer_of(given.model).encode_batch([given.text.read_text(encoding="utf-8")])
        rows, name = losses(model, torch.tensor(ids)), "sparse_loss"
    for line in (list(rows[0]), *(row.values() for row in rows)):
        print(*(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in line), sep=" | ")
    print(f"rows in {write_csv(name, rows)}")


if __name__ == "__main__":
    main()
