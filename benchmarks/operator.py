"""The fused Pattention operator against an MLP of its shape and against the straightforward transcription.

    python -m benchmarks.operator [--device cpu] [--rounds 5]

Forward+backward, eager and compiled, and what each keeps for the backward pass besides its inputs, in buffers of T x N.
Also against the six matrix products that all of them need, alone and written to memory that is there: the floor.
"""

import sys

if not __package__:  # run by its path: this folder, where operator.py hides the standard library's, must not be on it
    sys.path[0] += "/.."

import statistics
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, Measured, benchmark, round_ratios, time_in_turn
from tokenformer import pattention
from tokenformer.operator import attend, default_tau

# T, D, N: feed-forward layers of the published 150M, 450M and 1.5B, the smallest and largest layer that grew, and the
# projections of the published 354M, whose N is no multiple of 8.
SHAPES = {
    "cpu": [(4096, 768, 576), (4096, 768, 3072), (2048, 1024, 4096), (2048, 1536, 6144), (1024, 768, 34480)],
    "cuda": [
        (32768, 768, 576),
        (32768, 768, 3072),
        (32768, 1024, 4096),
        (32768, 1536, 6144),
        (16384, 768, 34480),
        (16384, 768, 2140),
    ],
}
# Steps between two looks at the clock: a GPU's are short beside a launch.
REPEATS = {"cpu": 1, "cuda": 20}
GOALS = {("cpu", "eager"): "<= 1.05", ("cpu", "compiled"): "<= 1.0", ("cuda", "eager"): "<= 1.10"}
MLP, TRANSCRIPTION, PRODUCTS = "MLP", "transcription", "its matrix products"


def case(device: str, shape: tuple[int, int, int], dtype: str, mode: str) -> Case:
    """A row for each of what it is compared with."""
    T, D, N = shape
    what = f"operator, {mode}"
    goals = {(what, MLP): GOALS.get((device, mode), "<= 1.10"), (what, TRANSCRIPTION): "<= 0.8", (what, PRODUCTS): ""}
    arguments = {"shape": shape, "dtype": dtype, "mode": mode}
    quick = device == "cpu" and mode == "eager" and (D, N) == (768, 3072)
    return Case(f"T {T}, D {D}, N {N}, {dtype}", goals, arguments, device, quick, seconds=10 if mode == "eager" else 15)


CASES = [
    case(device, shape, dtype, mode)
    for device, mode in product(SHAPES, ("eager", "compiled"))
    for shape, dtype in product(SHAPES[device], ("float32", "bfloat16"))
]


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
    "operator": pattention,
    "recomputing": recomputing,
    MLP: mlp,
    TRANSCRIPTION: transcription,
}


def steps(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor, repeats: int) -> None:
    """Forward and backward."""
    for _ in range(repeats):
        torch.autograd.grad(function(*inputs), inputs, grad_out)


class Products:
    """The matrix products of :func:`steps` and nothing else."""

    def __init__(self, inputs: tuple[Tensor, ...], grad_out: Tensor) -> None:
        x, keys, values = (tensor.detach() for tensor in inputs)
        scores, grad_scores = (x.new_empty(len(x), len(keys)) for _ in range(2))
        self.products = [
            (x, keys.T, scores),
            (scores, values, torch.empty_like(grad_out)),
            (scores.T, grad_out, torch.empty_like(values)),
            (grad_out, values.T, grad_scores),
            (grad_scores, keys, torch.empty_like(x)),
            (grad_scores.T, x, torch.empty_like(keys)),
        ]

    def run(self, repeats: int) -> None:
        """All of them."""
        for _ in range(repeats):
            for left, right, out in self.products:
                torch.mm(left, right, out=out)


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


def measure(shape: tuple[int, int, int], dtype: str, mode: str, device: str, rounds: int) -> Measured:
    """Time ratios; milliseconds and kept buffers of each contender."""
    T, D, N = shape
    torch.manual_seed(0)
    factory = {"device": device, "dtype": getattr(torch, dtype)}
    x = torch.randn(T, D, **factory).requires_grad_()
    keys = torch.randn(N, D, **factory).mul_(0.02).requires_grad_()
    values = torch.randn(N, D, **factory).mul_(0.02).requires_grad_()
    grad_out = torch.randn(T, D, **factory)
    inputs, contenders = (x, keys, values), CONTENDERS
    if mode == "compiled":
        torch.compiler.reset()  # it gives up on a function that it has compiled for too many shapes
        contenders = {name: torch.compile(function, dynamic=False) for name, function in CONTENDERS.items()}
    repeats = REPEATS[device]
    calls = {name: partial(steps, function, inputs, grad_out, repeats) for name, function in contenders.items()}
    calls[PRODUCTS] = partial(Products(inputs, grad_out).run, repeats)
    seconds = time_in_turn(calls, rounds)
    what = f"operator, {mode}"
    ratios = {(what, peer): round_ratios(seconds, "operator", peer) for peer in (MLP, TRANSCRIPTION, PRODUCTS)}
    columns: dict[str, object] = {"products_ms": f"{1e3 * statistics.median(seconds[PRODUCTS]) / repeats:.2f}"}
    for name, function in contenders.items():
        columns[f"{name}_ms"] = f"{1e3 * statistics.median(seconds[name]) / repeats:.2f}"
        columns[f"{name}_saved"] = f"{saved_bytes(function, *inputs) / (T * N * x.itemsize):.2f}"
    return ratios, columns


if __name__ == "__main__":
    benchmark("operator", CASES, measure, rounds=5)
