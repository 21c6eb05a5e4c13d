"""Whether a device computes what it should: every figure is an error over the error that is allowed.

    python -m benchmarks.correctness [--device cuda]

The operator, the loss and their gradients against float64 at odd shapes; a tiny run that grows twice, with what each
growth does to the loss of a batch, and the same run resumed between the two; the compiled model against the eager one.
"""

import csv
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, Measured, benchmark
from benchmarks.loops import fit, fit_arguments, read_log, text
from tokenformer import LMConfig, TokenFormerLM
from tokenformer.loss import IGNORE, linear_cross_entropy
from tokenformer.operator import attend

ALLOWED = "what is allowed"
OPERATOR, GRADIENTS = ("error of the operator", ALLOWED), ("error of its gradients", ALLOWED)
LOSS, LOSS_GRADIENTS = ("error of the loss", ALLOWED), ("error of its gradients", ALLOWED)
GROWTH, RESUME = ("loss moved by growth", ALLOWED), ("losses moved by a resume", ALLOWED)
COMPILED = ("loss and gradients moved by torch.compile", ALLOWED)
EXACT = "<= 1.0"

# Relative errors that are allowed: a few roundings of the precision. TF32 has 10 bits for its products' factors.
OPERATOR_ERRORS = {"float64": 1e-12, "float32": 5e-6, "tf32": 3e-3, "bfloat16": 2.5e-2, "float16": 4e-3}
# T, D, N of each segment: tiles that are not full, rows that begin anywhere, one token, the longest that grew.
SHAPES = ((5, 16, (6, 1)), (33, 17, (30, 513, 1)), (257, 96, (2140,)), (1000, 768, (576,)), (64, 768, (8560, 25920)))
LOSS_SHAPES = ((5, 16, 7), (100, 17, 257), (3000, 64, 50257))  # T, D, V: rows that begin anywhere, several blocks

TINY = {"depth": 2, "dim": 64, "num_heads": 2, "qkv_tokens": 32, "proj_tokens": 32, "ffn_tokens": 64}
STEPS, RESUMED_FROM = 12, 6
STAGES = "[{at_step: 4, qkv: 48, proj: 48, ffn: 96}, {at_step: 8, factor: 1.5}]"
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")

CASES = [
    Case(
        f"odd shapes, {precision}",
        {OPERATOR: EXACT, GRADIENTS: EXACT},
        {"what": "operator", "precision": precision},
        device="cuda",
        seconds=10,
    )
    for precision in OPERATOR_ERRORS
]
CASES += [
    Case(
        f"loss at odd shapes, {precision}",
        {LOSS: EXACT, LOSS_GRADIENTS: EXACT},
        {"what": "loss", "precision": precision},
        device="cuda",
        seconds=5,
    )
    for precision in OPERATOR_ERRORS
]
CASES += [
    Case(
        f"2 x 64, grown twice, {precision}",
        {GROWTH: EXACT, RESUME: EXACT},
        {"what": "growth", "precision": precision},
        device="cuda",
        seconds=15,
    )
    for precision in PRECISIONS
]
CASES += [
    Case(
        "2 x 64, bf16-mixed",
        {COMPILED: EXACT},
        {"what": "compile", "precision": "bf16-mixed"},
        device="cuda",
        seconds=40,
    ),
    Case(
        "2 x 64, grown twice, bf16-mixed, compiled",
        {GROWTH: EXACT, RESUME: EXACT},
        {"what": "growth", "precision": "bf16-mixed", "compiled": True},
        device="cuda",
        seconds=60,
    ),
]


def error(mine: Tensor, right: Tensor) -> float:
    """|mine - right| / |right|; infinite where one of them is not finite."""
    found = (mine.double() - right.double()).norm() / right.double().norm()
    return found.item() if found.isfinite() else float("inf")


def operator_errors(T: int, D: int, sizes: tuple[int, ...], precision: str, device: str) -> tuple[float, float]:
    """Of the output, and the worst of a gradient, for inputs that are equal in both precisions."""
    dtype = getattr(torch, "float32" if precision == "tf32" else precision)
    N = sum(sizes)
    x, noise = torch.randn(2, T, D, dtype=torch.float64, device=device).to(dtype)
    x[1] = 0  # a row whose scores are all zero
    keys, values = torch.randn(2, N, D, dtype=torch.float64, device=device).to(dtype)
    tau = torch.tensor([1.3 * N**0.5], dtype=torch.float64, device=device, requires_grad=True)
    segments = [part.clone().requires_grad_() for tokens in (keys, values) for part in tokens.split(sizes)]
    inputs = (x.requires_grad_(), tau, *segments)
    half = len(sizes)
    out = attend(x, segments[:half], segments[half:], tau, "l2_norm_gelu")
    grad_out = noise + out.detach() / out.detach().std()  # with noise alone tau's gradient is a sum that cancels
    grads = torch.autograd.grad(out, inputs, grad_out)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    scores = wide[0] @ torch.cat(wide[2 : 2 + half]).T
    norm = scores.norm(dim=-1, keepdim=True)
    factor = torch.where(norm > 0, wide[1] / torch.where(norm > 0, norm, 1), 0)
    right = F.gelu(factor * scores) @ torch.cat(wide[2 + half :])
    right_grads = torch.autograd.grad(right, wide, grad_out.double())
    return error(out, right), max(map(error, grads, right_grads))


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """TF32 for `tf32` and for nothing else."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def operator(precision: str, device: str) -> Measured:
    """The worst over all shapes."""
    with matmul_precision(precision):
        found = [operator_errors(*shape, precision, device) for shape in SHAPES]
    allowed = OPERATOR_ERRORS[precision]
    forward, backward = (max(errors) for errors in zip(*found, strict=True))
    return {OPERATOR: [forward / allowed], GRADIENTS: [backward / (2 * allowed)]}, {
        "error": f"{forward:.2e}",
        "gradient_error": f"{backward:.2e}",
    }


def loss(precision: str, device: str) -> Measured:
    """The worst over all shapes, with a target that does not count."""
    worst = [0.0, 0.0]
    dtype = getattr(torch, "float32" if precision == "tf32" else precision)
    with matmul_precision(precision):
        for T, D, V in LOSS_SHAPES:
            hidden, weight = (torch.randn(n, D, dtype=torch.float64, device=device).to(dtype) for n in (T, V))
            targets = torch.randint(V, (T,), device=device).index_fill(0, torch.tensor([1], device=device), IGNORE)
            found = []
            for inputs in ([hidden, weight], [hidden.double(), weight.double()]):
                inputs = [tensor.requires_grad_() for tensor in inputs]
                function = linear_cross_entropy if not found else lambda h, w, t: F.cross_entropy(h @ w.T, t)
                nats = function(*inputs, targets)
                found.append((nats, *torch.autograd.grad(nats, inputs)))
            errors = list(map(error, *found))
            worst = [max(worst[0], errors[0]), max(worst[1], *errors[1:])]
    allowed = OPERATOR_ERRORS[precision]
    return {LOSS: [worst[0] / allowed], LOSS_GRADIENTS: [worst[1] / (2 * allowed)]}, {
        "error": f"{worst[0]:.2e}",
        "gradient_error": f"{worst[1]:.2e}",
    }


def growth(precision: str, device: str, compiled: bool = False) -> Measured:
    """A run that grows at steps 4 and 8, and the same again from its checkpoint of step 6."""
    data = text(64, 8, 257)
    config = LMConfig(**TINY, max_seq_len=64, vocab_size=257)  # type: ignore[arg-type]
    settings = {
        "trainer.accelerator": device,
        "trainer.precision": precision,
        "model.compile": str(compiled).lower(),
        "checkpoint.every_n_train_steps": RESUMED_FROM,
        "checkpoint.save_top_k": -1,
        "trainer.callbacks": f"{{class_path: GrowParameterTokens, init_args: {{stages: {STAGES}, verify: false}}}}",
    }
    arguments = fit_arguments(config, data, STEPS, 1, **settings)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        fit(arguments, whole)
        saved = whole / f"checkpoints/step-{RESUMED_FROM:08d}.ckpt"
        fit([*arguments, f"--ckpt_path={saved}"], Path(folder) / "resumed")
        losses, again = (
            [line["train/loss"] for line in read_log(Path(folder) / name)][-(STEPS - RESUMED_FROM) :]
            for name in ("whole", "resumed")
        )
        with (whole / "growth.csv").open(newline="") as file:
            grown = [(float(row["loss_before"]), float(row["loss_after"])) for row in csv.DictReader(file)]
    assert len(grown) == 2
    assert len(losses) == len(again) == STEPS - RESUMED_FROM
    moved = max(abs(after - before) / before for before, after in grown)
    resumed = max(abs(b - a) / a for a, b in zip(losses, again, strict=True))
    # What GrowParameterTokens allows, and what atomic additions in another order may do.
    limit = 1e-5 if precision.startswith("32") else 5e-4
    return {GROWTH: [moved / limit], RESUME: [resumed / limit]}, {
        "error": f"{moved:.2e}",
        "resume_error": f"{resumed:.2e}",
    }


def compiled_model(precision: str, device: str) -> Measured:
    """Loss and gradients of a model and of the same, compiled."""
    assert precision == "bf16-mixed"
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = TokenFormerLM(LMConfig(**TINY, max_seq_len=64, vocab_size=257, init="scaled")).to(device)  # type: ignore[arg-type]
        ids = torch.randint(0, 257, (4, 65), generator=torch.Generator().manual_seed(1)).to(device)
        if compiled:
            for block in model.backbone.blocks:
                block.compile()
        with torch.autocast(device, torch.bfloat16):
            nats = model.loss(ids[:, :-1], ids[:, 1:])
        results.append([nats, *torch.autograd.grad(nats, list(model.parameters()), materialize_grads=True)])
    worst = max(error(mine, right) for mine, right in zip(*reversed(results), strict=True))
    return {COMPILED: [worst / (3 * OPERATOR_ERRORS["bfloat16"])]}, {"error": f"{worst:.2e}"}


def measure(what: str, device: str, rounds: int, precision: str, compiled: bool = False) -> Measured:
    """One of the four. One round: what is random has a seed."""
    torch.manual_seed(0)
    if what in ("operator", "loss"):
        return (operator if what == "operator" else loss)(precision, device)
    return growth(precision, device, compiled) if what == "growth" else compiled_model(precision, device)


if __name__ == "__main__":
    benchmark("correctness", CASES, measure, rounds=1)
