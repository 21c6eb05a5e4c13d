"""The optimizer's step on a model of 124M parameters, against torch's fused AdamW on one flat buffer of as many.

    python -m benchmarks.optimizer [--rounds 9] [--device cpu]

The parameter groups are those of a training; also after two growths from half the size, as a run makes them; and with
Muon, whose Newton-Schulz steps are about 1.4 TFLOP there (`muon_gflop`), in bfloat16.
"""

import statistics
from typing import Any, Literal

import torch

from benchmarks.harness import Case, Measured, benchmark, round_ratios, time_in_turn
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.groups import make_optimizer, param_groups, update_param_groups
from tokenformer import LMConfig, TokenFormerLM, grow
from tokenformer.backbone import block_matrices
from tokenformer.cost import muon_flops

STEP = ("optimizer step", "fused AdamW, one buffer")
SIZES = {"depth": 12, "dim": 768, "num_heads": 12}
STAGES = ((288, 1152), (432, 1728), (576, 2304))  # tokens of attention and feed-forward layer


def cases(device: str) -> list[Case]:
    """Built at its size, and grown to it."""
    return [
        Case("124M parameters", {STEP: "<= 1.1"}, {"stages": STAGES[-1:]}, device),
        Case("124M parameters, grown twice", {STEP: "<= 1.1"}, {"stages": STAGES}, device),
        Case("124M parameters, Muon", {STEP: "<= 1.3"}, {"stages": STAGES[-1:], "name": "muon"}, device),
        Case("12M parameters", {STEP: "<= 1.1"}, {"stages": ((192, 768),), "sizes": {"depth": 2}}, device, quick=True),
    ]


CASES = cases("cpu") + cases("cuda")


def flat(count: int, device: str) -> torch.optim.AdamW:
    """The peer: as many elements in one parameter, with a gradient."""
    buffer = torch.nn.Parameter(torch.randn(count, device=device))
    buffer.grad = torch.randn_like(buffer)
    config = OptimConfig()
    return torch.optim.AdamW([buffer], lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def measure(
    stages: tuple[tuple[int, int], ...],
    device: str,
    rounds: int,
    sizes: dict[str, Any] | None = None,
    name: Literal["adamw", "muon"] = "adamw",
) -> Measured:
    """Build at the first stage, grow through the others, take turns."""
    tokens, ffn_tokens = stages[0]
    config = LMConfig(**SIZES | (sizes or {}), qkv_tokens=tokens, proj_tokens=tokens, ffn_tokens=ffn_tokens)
    model = TokenFormerLM(config).to(device)
    optimizer = make_optimizer(_groups(model, name), OptimConfig(name=name))
    for tokens, ffn_tokens in stages[1:]:
        grow(model, qkv=tokens, proj=tokens, ffn=ffn_tokens, init="zero_keys")
        update_param_groups(optimizer, _groups(model, name))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    peer = flat(model.num_params(), device)
    seconds = time_in_turn({"ours": optimizer.step, "flat": peer.step}, rounds)
    columns: dict[str, object] = {"params": model.num_params(), "tensors": len(list(model.parameters()))}
    columns |= {"muon_gflop": f"{muon_flops(model) / 1e9:.0f}"} if name == "muon" else {}
    columns |= {f"{name}_ms": f"{1e3 * statistics.median(found):.2f}" for name, found in seconds.items()}
    return {STEP: round_ratios(seconds, "ours", "flat")}, columns


def _groups(model: TokenFormerLM, name: str) -> list[dict[str, Any]]:
    return param_groups(model, 0.1, muon=block_matrices(model) if name == "muon" else None)


if __name__ == "__main__":
    benchmark("optimizer", CASES, measure, rounds=9)
