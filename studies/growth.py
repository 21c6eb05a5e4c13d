"""What should new tokens start from, and when is growing cheaper than starting over? Small models, grown once.

A base is trained, grown by `factor`, and trained on for `stage` of its steps, with a schedule of its own and the
optimizer's state. Bytes of Python's standard library, 12 sequences of 96 a step.

kind        what growth adds
none        nothing: the base is trained on
zero_keys   keys 0, values random, one norm
random      keys and values random, one norm, tau kept (the paper's runs let it follow the tokens); not exact
segment_norm  keys random, values 0, a norm of their own
anchored    values 0, scores divided by the norm of the old ones, which they never join
gate        the same, but from step to step they join that norm more, with a weight that goes from 0 to 1 over `ramp` of
            the stage, while tau goes to tau sqrt(1 + M / N)
raised      values 0, one norm at once, tau raised to tau sqrt(1 + M / N) at once; not exact
gram        values 0, keys with K'K = (M / N) K_old'K_old, so that one norm and tau sqrt(1 + M / N) change nothing
scratch     the full size from the start, `as_long` as the stage, or for as many FLOPs or steps as base and stage
base        the base alone, for `stage` of its steps, to see whether its curve is flat

keys, of anchored, gate and raised: `matched` to the scores of the old ones on a batch; `key_std`, that of a new layer;
`channels`, with the deviation that old keys have in each channel; `rms` and `2 rms` of the old keys.

The base has a rate of its own, BASE_RATES, and the first row that needs it has its training in its `seconds`.
`precision` is that of the stage's training alone.
"""

import math
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from studies.training import DEVICE, LEAST, matched_stds, once, scaled, text, train, validation_loss, widened
from tokenformer import LMConfig, TokenFormerLM
from tokenformer.growth import grow_layers, pattention_layers, plan_growth
from tokenformer.pattention import Pattention

SEQ_LEN, BATCH_SIZE = 96, 12
BASES = Path("runs/studies/growth")
WIDTHS = ("dim", "num_heads", "qkv_tokens", "proj_tokens", "ffn_tokens")
SIZES = {
    name: {"depth": depth, **dict(zip(WIDTHS, map(widened, widths), strict=True))}
    for name, depth, *widths in (("small", 2, 64, 4, 16, 16, 64), ("medium", 3, 96, 4, 24, 24, 96))
}
BASE_STEPS = {"small": scaled(2400), "medium": scaled(3600)}
BASE_RATES = {"adamw": 4e-3, "muon": 8e-3}

Keys = Literal["matched", "key_std", "channels", "rms", "2 rms"]


def build(size: str, seed: int, factor: int = 1) -> TokenFormerLM:
    """A model, `factor` times its size in tokens."""
    torch.manual_seed(seed)
    sizes = {name: value * (factor if name.endswith("tokens") else 1) for name, value in SIZES[size].items()}
    config = LMConfig(vocab_size=257, max_seq_len=SEQ_LEN, init="scaled", scale="learned", **sizes)  # type: ignore[arg-type]
    return TokenFormerLM(config).to(DEVICE)


@cache
def base(size: str, optimizer: str, seed: int) -> dict[str, Any]:
    """Weights and optimizer state of the base, trained once by whoever needs it first."""
    sizes = "-".join(map(str, SIZES[size].values()))
    trained = f"{optimizer}-{BASE_RATES[optimizer]:g}-{BASE_STEPS[size]}x{BATCH_SIZE}x{SEQ_LEN}"

    def make() -> dict[str, Any]:
        model = build(size, seed)
        data = text(SEQ_LEN, BATCH_SIZE, seed)
        state = train(model, data, model.loss, optimizer, BASE_RATES[optimizer], BASE_STEPS[size])
        return {"model": model.state_dict(), "optimizer": state}

    return once(BASES / f"{sizes}-{trained}-{seed}.pt", make)  # type: ignore[no-any-return]


def run(
    size: str,
    optimizer: str,
    kind: str,
    lr: float,
    seed: int,
    stage: float,
    factor: int = 1,
    keys: Keys | str = "",
    ramp: float | str = "",
    as_long: str = "",
    state: str = "kept",
    precision: str = "float32",
) -> dict[str, Any]:
    """Train, grow, train: parameters, training FLOPs from the start, losses before and after growth and at the end."""
    data = text(SEQ_LEN, BATCH_SIZE, seed)
    loss = partial(validation_loss, data=text(SEQ_LEN, BATCH_SIZE, 0))

    def go(model: TokenFormerLM, steps: int, **more: Any) -> None:
        train(model, data, model.loss, optimizer, lr, steps, precision=getattr(torch, precision), **more)

    base_steps = BASE_STEPS[size]
    steps = max(LEAST, round(stage * base_steps))
    model = build(size, seed)
    base_flops = base_steps * step_flops(model)
    if kind == "base":
        if stage == 1 and lr == BASE_RATES[optimizer]:  # that of all other kinds
            model.load_state_dict(base(size, optimizer, seed)["model"])
        else:
            go(model, steps)
        return {"params": model.num_params(), "flops": steps * step_flops(model), "loss": loss(model)}
    if kind == "scratch":
        model = build(size, seed, factor)
        flops = step_flops(model)
        steps = {"stage": steps, "flops": steps + round(base_flops / flops), "steps": steps + base_steps}[as_long]
        go(model, steps)
        return {"params": model.num_params(), "flops": steps * flops, "loss": loss(model)}
    saved = base(size, optimizer, seed)
    model.load_state_dict(saved["model"])
    before = loss(model)
    gates = [] if kind == "none" else add_tokens(model, kind, keys, factor, seed)
    after = loss(model)

    def open_gates(step: int) -> None:
        for gate in gates:
            gate.weight = min(1.0, step / (float(ramp) * steps)) if ramp else 0.0

    go(model, steps, skip=base_steps, state=saved["optimizer"] if state == "kept" else None, before_step=open_gates)
    flops = base_flops + steps * step_flops(model)
    return {"params": model.num_params(), "flops": flops, "before": before, "after": after, "loss": loss(model)}


def step_flops(model: TokenFormerLM) -> int:
    """Of a training step."""
    return 3 * model.flops_per_token(SEQ_LEN) * SEQ_LEN * BATCH_SIZE


@torch.no_grad()
def add_tokens(model: TokenFormerLM, kind: str, keys: Keys | str, factor: int, seed: int) -> list["Gate"]:
    """Grow all layers; the gates of kind `gate`."""
    planned = plan_growth(model, {}, factor=factor)
    if kind in ("zero_keys", "random", "segment_norm"):
        grow_layers(model, planned, init=kind, seed=seed)  # type: ignore[arg-type]
        return []
    old_keys = {name: layer.segments[0].keys.clone() for name, layer in pattention_layers(model).items()}
    stds = matched_stds(model, text(SEQ_LEN, BATCH_SIZE, seed), model.loss)
    for name, layer in pattention_layers(model).items():
        rms = float(old_keys[name].square().mean().sqrt())
        others = {"key_std": layer.key_std, "rms": rms, "2 rms": 2 * rms}
        stds[name] = others.get(keys, stds[name])
    grow_layers(model, planned, init="anchored", seed=seed, key_stds=stds)
    gates = []
    for name, layer in pattention_layers(model).items():
        old, new = layer.segments
        rise = math.sqrt(1 + new.num_tokens / old.num_tokens)
        if keys == "channels":
            new.keys.mul_(old_keys[name].std(0) / stds[name])
        if kind == "gram":
            _, sizes, channels = torch.linalg.svd(old_keys[name], full_matrices=False)
            rows = torch.linalg.qr(torch.randn_like(new.keys[:, : len(sizes)]))[0]
            new.keys.copy_(rows * (rise**2 - 1) ** 0.5 * sizes @ channels)
        if kind in ("gram", "raised"):
            new.norm_weight = None  # one norm
            layer.tau *= rise
        if kind == "gate":
            gates.append(Gate(layer))
    return gates


class Gate:
    """How much the scores of a layer's new tokens count in its norm; takes the place of the layer's forward pass."""

    def __init__(self, layer: Pattention) -> None:
        self.layer, self.weight = layer, 0.0
        layer.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        """GELU(tau_w A / |A|_w) V with |A|_w^2 = |A_old|^2 + w |A_new|^2 and tau_w = tau sqrt(1 + w M / N)."""
        old, new = self.layer.segments
        old_scores, new_scores = x @ old.keys.T, x @ new.keys.T
        squares = old_scores.square().sum(-1, keepdim=True) + self.weight * new_scores.square().sum(-1, keepdim=True)
        tau = self.layer.current_tau() * math.sqrt(1 + self.weight * new.num_tokens / old.num_tokens)
        scale = tau.to(x.dtype) / squares.sqrt()
        gelu = nn.functional.gelu
        return gelu(old_scores * scale) @ old.values + gelu(new_scores * scale) @ new.values  # type: ignore[no-any-return]
