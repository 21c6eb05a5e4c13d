"""The fused Pattention operator against an MLP of its shape and against the straightforward transcription.

    python -m benchmarks.operator [--tokens 4096] [--dim 768] [--num-tokens 3072] [--rounds 7] [--device cpu]

One row a precision: forward+backward time ratios (median of the rounds, lowest and highest), and the bytes that each
keeps for the backward pass besides its inputs.
"""

import sys

if not __package__:  # run by its path: this folder, where operator.py hides the standard library's, must not be on it
    sys.path[0] += "/.."

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import ratio, time_in_turn, write_csv
from tokenformer import pattention


def transcription(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Paper, eq. 5, line by line."""
    scores = x @ keys.T
    scores = scores / scores.norm(dim=-1, keepdim=True) * keys.shape[0] ** 0.5
    return F.gelu(scores) @ values


def mlp(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The floor: the same two matrix products with a GELU between."""
    return F.gelu(x @ keys.T) @ values


def step(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor) -> None:
    """Forward and backward."""
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


def main() -> None:
    """Run the comparison and write benchmarks/results/operator.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="T, input tokens")
    parser.add_argument("--dim", type=int, default=768, help="D, channels in and out")
    parser.add_argument("--num-tokens", type=int, default=3072, help="N, parameter tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    T, D, N = args.tokens, args.dim, args.num_tokens
    contenders = {"fused": pattention, "mlp": mlp, "transcription": transcription}
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        factory = {"device": args.device, "dtype": dtype}
        x = torch.randn(T, D, **factory).requires_grad_()
        keys = torch.randn(N, D, **factory).mul_(0.02).requires_grad_()
        values = torch.randn(N, D, **factory).mul_(0.02).requires_grad_()
        grad_out = torch.randn(T, D, **factory)

        inputs = (x, keys, values)
        steps = {name: partial(step, function, inputs, grad_out) for name, function in contenders.items()}
        seconds = time_in_turn(steps, args.rounds)
        row: dict[str, object] = {"dtype": str(dtype).removeprefix("torch."), "T": T, "D": D, "N": N}
        for peer in ("mlp", "transcription"):
            median, low, high = ratio(seconds, "fused", peer)
            row |= {f"time_ratio_{peer}": f"{median:.3f}", f"range_{peer}": f"{low:.3f}-{high:.3f}"}
        for name, function in contenders.items():
            row[f"{name}_ms"] = f"{1e3 * statistics.median(seconds[name]):.1f}"
            row[f"{name}_saved_bytes"] = saved_bytes(function, *inputs)
        rows.append(row)
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ")
    print(f"one T x N buffer is {4 * T * N} bytes in float32; rows in {write_csv('operator', rows)}")


if __name__ == "__main__":
    main()
