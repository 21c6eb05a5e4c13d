"""Growing twice, to 3 and to 6 times the tokens, against the same sizes from the start; the paper grows three times.

The base is that of the study of growth, with the same text. `stage` is the length of each stage, over the base's steps;
one rate for both, a schedule for each.

method      anchored     new values of zero, scores under the norm of the old ones; the optimizer's state is kept
            random       one norm, tau follows the number of tokens, a new optimizer: the paper's runs; not exact
            scratch      the TokenFormer of `factor` times the base's tokens from the start
            transformer  its twin of as many parameters from the start, which is what the paper compares with
budget      of scratch and transformer: the steps of the last stage; the FLOPs of base and stages together; or the steps
            of the base, which are ten stages of 10 %

`at x3` is the loss after the first stage, `loss` that at the end. TFLOP are those of all training from the start.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from studies.growth import BASE_STEPS, BATCH_SIZE, SEQ_LEN, base, build, step_flops
from studies.training import DEVICE, LEAST, matched_stds, text, train, validation_loss
from tokenformer import TokenFormerLM
from tokenformer.growth import ScaleAfter, grow_layers, plan_growth

FACTORS = (3, 6)


def run(
    method: str,
    optimizer: str,
    lr: float,
    seed: int,
    stage: float | str = "",
    factor: int | str = "",
    budget: str = "",
    size: str = "small",
) -> dict[str, Any]:
    """Train; the figures of its row."""
    data = text(SEQ_LEN, BATCH_SIZE, seed)
    loss = partial(validation_loss, data=text(SEQ_LEN, BATCH_SIZE, 0))
    sizes = {times: step_flops(build(size, seed, times)) for times in (1, *FACTORS)}
    steps = max(LEAST, round(float(stage or 1) * BASE_STEPS[size]))
    if method in ("scratch", "transformer"):
        times = int(factor)
        before = BASE_STEPS[size] * sizes[1] + sum(steps * sizes[less] for less in FACTORS if less < times)
        steps += round(before / sizes[times]) if budget == "flops" else 0
        model = build(size, seed, times)
        if method == "transformer":
            torch.manual_seed(seed)
            model = TokenFormerLM(replace(model.config, baseline="parameters")).to(DEVICE)
        train(model, data, model.loss, optimizer, lr, steps)
        flops = steps * step_flops(model)
        return {"params": model.num_params(), "flops": flops, "stage flops": flops, "loss": loss(model)}
    saved = base(size, optimizer, seed)
    model, state = build(size, seed), saved["optimizer"]
    model.load_state_dict(saved["model"])
    losses, done = list[float](), BASE_STEPS[size]
    for less, times in zip((1, *FACTORS), FACTORS, strict=False):
        add_tokens(model, method, times / less, seed)
        state = train(
            model, data, model.loss, optimizer, lr, steps, skip=done, state=state if method == "anchored" else None
        )
        losses.append(loss(model))
        done += steps
    stages = [steps * sizes[times] for times in FACTORS]
    spent = {"flops": BASE_STEPS[size] * sizes[1] + sum(stages), "stage flops": stages[-1]}
    return {"params": model.num_params()} | spent | {"at x3": losses[0], "loss": losses[1]}


@torch.no_grad()
def add_tokens(model: TokenFormerLM, method: str, factor: float, seed: int) -> None:
    """Grow all layers."""
    planned = plan_growth(model, {}, factor=factor)
    stds = matched_stds(model, text(SEQ_LEN, BATCH_SIZE, seed), model.loss) if method == "anchored" else None
    scale: ScaleAfter = "current" if method == "random" else "fixed"
    grow_layers(model, planned, init=method, scale=scale, seed=seed, key_stds=stds)  # type: ignore[arg-type]
