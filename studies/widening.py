"""Four times the parameters with what a smaller model has learned: a TokenFormer's growth against a Transformer's.

Table 8 and figure 7 of the paper. A base of 2 blocks of 48 channels is trained on bytes of Python's standard library
(12 sequences of 128 a step, 1,400 steps, Muon at 8e-3), made larger, and trained on for a third of its steps by a new
optimizer. Input and output matrices are two.

model         tokenformer, or transformer of as many parameters
method        what it gets; all have four times the parameters in their blocks then
anchored      four times the tokens, anchored
net2net       twice the channels, heads and hidden units, all of them copies, read in random shares (Chen et al. 2016)
hypercloning  the same, read in halves with noise 10 dB below them (Samragh et al. 2024)
orthogonal    twice the channels, the old ones in random directions of them; new heads and hidden units write nothing
              yet
zero padding  twice the channels, the new ones zero; new heads and hidden units write nothing yet; not exact, since a
              LayerNorm sees the zeros
stacking      its blocks four times, one copy after the other (Gong et al. 2019); not exact
none          nothing: trained on as it is
scratch       the larger model from the start, `budget`: for the steps of the stage, or the FLOPs of base and stage

TFLOP are those of all training from the start.
"""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studies.pretraining import SEQ_LEN, TEXT_BATCH, shape_of
from studies.progressive import add_tokens
from studies.training import DEVICE, once, scaled, text, train, validation_loss
from tokenformer import LMConfig, TokenFormerLM
from tokenformer.config import widened as wider
from tokenformer.net2net import widen

BASES = Path("runs/studies/widening")
STEPS, STAGE, RATE = 1400, 467, 8e-3


def build(model: str, seed: int, whole: bool = False) -> TokenFormerLM:
    """The base, or what it is to become: four times the tokens, or twice the channels."""
    torch.manual_seed(seed)
    shape = shape_of("0.1M") | {"vocab_size": 257, "max_seq_len": SEQ_LEN, "tie_embeddings": False}
    if model == "transformer":
        config = LMConfig(baseline="parameters", **shape)
        return TokenFormerLM(wider(config, 2) if whole else config).to(DEVICE)
    shape |= {name: (4 if whole else 1) * shape[name] for name in ("qkv_tokens", "proj_tokens", "ffn_tokens")}
    return TokenFormerLM(LMConfig(**shape)).to(DEVICE)


def run(model: str, method: str, optimizer: str, lr: float, seed: int, budget: str = "") -> dict[str, Any]:
    """Train a base, make it larger, train on: losses before and after, and at the end."""
    data = text(SEQ_LEN, TEXT_BATCH, seed)
    loss = partial(validation_loss, data=text(SEQ_LEN, TEXT_BATCH, 0))
    net = build(model, seed)
    base_flops = scaled(STEPS) * step_flops(net)
    if method == "scratch":
        net = build(model, seed, whole=True)
        steps = scaled(STAGE) + (round(base_flops / step_flops(net)) if budget == "flops" else 0)
        train(net, data, net.loss, optimizer, lr, steps)
        return {"params": net.num_params(), "flops": steps * step_flops(net), "loss": loss(net)}

    def trained() -> dict[str, Tensor]:
        train(net, data, net.loss, "muon", RATE, scaled(STEPS))
        return net.state_dict()

    net.load_state_dict(once(BASES / f"{model}-{net.config.dim}-{scaled(STEPS)}-{seed}.pt", trained))
    before = loss(net)
    net = larger(net, method, seed)
    after = loss(net)
    train(net, data, net.loss, optimizer, lr, scaled(STAGE), skip=scaled(STEPS))
    flops = base_flops + scaled(STAGE) * step_flops(net)
    return {"params": net.num_params(), "flops": flops, "before": before, "after": after, "loss": loss(net)}


def step_flops(model: TokenFormerLM) -> int:
    """Of a training step."""
    return 3 * model.flops_per_token(SEQ_LEN) * SEQ_LEN * TEXT_BATCH


def larger(model: TokenFormerLM, method: str, seed: int) -> TokenFormerLM:
    """The larger model with what this one has learned."""
    if method == "anchored":
        add_tokens(model, method, 4, seed)
    if method == "net2net":
        return widen(model, 2, seed)
    if method == "stacking":
        return stacked(model, 4)
    if method in ("hypercloning", "orthogonal", "zero padding"):
        torch.manual_seed(seed)
        wide = TokenFormerLM(wider(model.config, 2)).to(DEVICE)
        (clone if method == "hypercloning" else partial(embed, method=method))(model, wide)
        return wide
    return model


def stacked(model: TokenFormerLM, times: int) -> TokenFormerLM:
    """All blocks, several times."""
    deep = TokenFormerLM(replace(model.config, depth=times * model.config.depth)).to(DEVICE)
    deep.backbone.blocks.load_state_dict(
        deepcopy(torch.nn.ModuleList(list(model.backbone.blocks) * times)).state_dict()
    )
    rest = {name: t for name, t in model.state_dict().items() if ".blocks." not in name}
    deep.load_state_dict(rest, strict=False)
    return deep


@torch.no_grad()
def clone(model: TokenFormerLM, wide: TokenFormerLM) -> None:
    """Every channel twice; weights that read both copies are halves, one with noise and one without it."""
    old = dict(model.named_parameters())
    for name, new in wide.named_parameters():
        weight = old[name]
        if name == "embedding.weight" or weight.ndim == 1:
            new.copy_(weight.repeat(*(n // o for n, o in zip(new.shape, weight.shape, strict=True))))
            continue
        halves = weight.repeat(len(new) // len(weight), 1) / 2
        noise = torch.randn(halves.shape).to(halves) * halves.std() * 10**-0.5  # 10 dB below
        noise *= name != "lm_head.weight"
        new.copy_(torch.cat((halves + noise, halves - noise), dim=1))


@torch.no_grad()
def embed(model: TokenFormerLM, wide: TokenFormerLM, method: str) -> None:
    """The old channels as a subspace of the new ones, of the same mean after a LayerNorm; new units write zeros.

    For channels h the new ones are W h, and what reads them after a LayerNorm is multiplied by R' from the right. With
    orthogonal columns of W, sqrt(2) long, that keep the direction of (1, ..., 1), LN(W h) = W LN(h), so R = W / 2.
    """
    old, dim = dict(model.named_parameters()), model.config.dim
    if method == "orthogonal":
        write = 2**0.5 * directions(2 * dim)[:, :dim] @ directions(dim).T
        read = write / 2
    else:
        write = read = torch.eye(2 * dim, dim)
    write, read = (m.to(old["embedding.weight"]) for m in (write, read))
    norm_weight, norm_bias = old["backbone.norm.weight"], old["backbone.norm.bias"]
    for name, new in wide.named_parameters():
        weight = old[name]
        if name == "embedding.weight":
            new.copy_(weight @ write.T)
        elif name == "lm_head.weight":  # with the final norm's weight in it
            new.copy_((weight * norm_weight) @ read.T)
        elif name == "backbone.norm.weight":
            new.fill_(1)
        elif name == "backbone.norm.bias":
            new.copy_(torch.linalg.lstsq(read.T, (norm_bias / norm_weight).unsqueeze(1)).solution.squeeze(1))
        elif name.endswith(("out.weight", "down.weight")):
            new.copy_(torch.cat((write @ weight, torch.zeros_like(write @ weight)), dim=1))
        else:
            fresh = torch.randn(len(new) - len(weight), 2 * dim).to(weight) * weight.std()
            new.copy_(torch.cat((weight @ read.T, fresh)))


def directions(dim: int) -> Tensor:
    """A random orthonormal basis (dim, dim) whose first vector is (1, ..., 1) / sqrt(dim)."""
    basis, signs = torch.linalg.qr(torch.cat((torch.ones(dim, 1), torch.randn(dim, dim - 1)), dim=1).double())
    return basis * signs.diagonal().sign()
