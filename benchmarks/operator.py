"""The fused Pattention operator against an MLP of its shape and against the straightforward transcription.

    python -m benchmarks.operator [--shapes 768x3072 ...] [--tokens 512] [--rounds 7] [--device cpu]

One row a shape, a precision, and eager or compiled: forward+backward time ratios (median of the rounds, lowest and
highest), and what each keeps for the backward pass besides its inputs, in buffers of T x N.
"""

import sys

if not __package__:  # run by its path: this folder, where operator.py hides the standard library's, must not be on it
    sys.path[0] += "/.."

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import ratio, time_in_turn, write_csv
from tokenformer import pattention
from tokenformer.operator import attend, default_tau

# D x N: feed-forward layers of the published 150M, 450M and 1.5B, and the smallest and largest layer that grew.
SHAPES = ("768x576", "768x3072", "1024x4096", "1536x6144", "768x34480")
TOKENS = {"cpu": 512, "cuda": 32768}
# Steps between two looks at the clock: a GPU's are short beside a launch.
REPEATS = {"cpu": 1, "cuda": 5}


def transcription(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Paper, eq. 5, line by line."""
    scores = x @ keys.T
    scores = scores / scores.norm(dim=-1, keepdim=True) * keys.shape[0] ** 0.5
    return F.gelu(scores) @ values


def mlp(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The floor: the same two matrix products with a GELU between."""
    return F.gelu(x @ keys.T) @ values


def recomputing(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The fused operator that keeps no scores."""
    return attend(x, [keys], [values], default_tau(len(keys)), "l2_norm_gelu", recompute=True)


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "fused": pattention,
    "recomputing": recomputing,
    "mlp": mlp,
    "transcription": transcription,
}


def steps(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor, repeats: int) -> None:
    """Forward and backward."""
    for _ in range(repeats):
        torch.autograd.grad(function(*inputs), inputs, grad_out)


def saved_bytes(function: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, without the inputs themselves."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*inputs)
    del out
    mine = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return sum(size for pointer, size in storages.items() if pointer not in mine)


def compare(shape: str, dtype: torch.dtype, compiled: bool, args: argparse.Namespace) -> dict[str, object]:
    """A row of the table."""
    T, (D, N) = args.tokens, map(int, shape.split("x"))
    torch.manual_seed(0)
    factory = {"device": args.device, "dtype": dtype}
    x = torch.randn(T, D, **factory).requires_grad_()
    keys = torch.randn(N, D, **factory).mul_(0.02).requires_grad_()
    values = torch.randn(N, D, **factory).mul_(0.02).requires_grad_()
    grad_out = torch.randn(T, D, **factory)

    inputs, contenders = (x, keys, values), CONTENDERS
    if compiled:
        torch.compiler.reset()  # it gives up on a function that it has compiled for too many shapes
        contenders = {name: torch.compile(function, dynamic=False) for name, function in CONTENDERS.items()}
    repeats = REPEATS[args.device]
    calls = {name: partial(steps, function, inputs, grad_out, repeats) for name, function in contenders.items()}
    seconds = time_in_turn(calls, args.rounds)
    mode = "compiled" if compiled else "eager"
    row: dict[str, object] = {"dtype": str(dtype).removeprefix("torch."), "mode": mode, "T": T, "D": D, "N": N}
    for peer in ("mlp", "transcription"):
        median, low, high = ratio(seconds, "fused", peer)
        row |= {f"time_ratio_{peer}": f"{median:.3f}", f"range_{peer}": f"{low:.3f}-{high:.3f}"}
    for name, function in contenders.items():
        row[f"{name}_ms"] = f"{1e3 * statistics.median(seconds[name]) / repeats:.2f}"
        row[f"{name}_saved"] = f"{saved_bytes(function, *inputs) / (T * N * dtype.itemsize):.2f}"
    return row


def main() -> None:
    """Run the comparison and write benchmarks/results/operator.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="DxN", help="channels x parameter tokens")
    parser.add_argument("--tokens", type=int, help="T, input tokens; default: 512 on the CPU, 32768 on a GPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=REPEATS, default="cpu")
    args = parser.parse_args()
    args.tokens = args.tokens or TOKENS[args.device]
    rows = []
    for shape, dtype, compiled in product(args.shapes, (torch.float32, torch.bfloat16), (False, True)):
        rows.append(compare(shape, dtype, compiled, args))
        print(*(f"{key} {value}" for key, value in rows[-1].items()), sep="  ", flush=True)
    print(f"rows in {write_csv('operator', rows)}")


if __name__ == "__main__":
    main()
