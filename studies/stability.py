"""How gradients behave under softmax and under GELU with the L2 norm, at three sizes. Appendix A of the paper.

AdamW, 500 steps on bytes of Python's standard library, 12 sequences of 128 a step; sizes are those of pretraining.py.

what          training      at the best rate; `norm` is the mean norm of all gradients after the warm-up, before they
                            are clipped, `of keys` and `of values` that of theirs alone, `spread` the standard deviation
                            of the first over the steps, over its mean; `unused` the share of tokens whose mean |weight|
                            on held-out text is under a hundredth of their layer's
              largest rate  the `largest rate`, in steps of two from 1e-3, at which 100 steps without clipping end less
                            than half a nat above the lowest loss at smaller ones, and its loss
score_norm    l2_norm_gelu, gelu_l2_norm or softmax (exp, then L1)
"""

import math
import statistics
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from studies.pretraining import SEQ_LEN, TEXT_BATCH, shape_of
from studies.training import DEVICE, scaled, text, train, validation_loss
from tokenformer import LMConfig, TokenFormerLM
from tokenformer.growth import pattention_layers
from tokenformer.inspection import LayerStatistics, watching

STEPS, SHORT_STEPS = 500, 100
UNUSED, TOO_MUCH = 0.01, 0.5


def run(what: str, size: str, score_norm: str, lr: float, seed: int) -> dict[str, Any]:
    """Train; the figures of its row."""
    data = text(SEQ_LEN, TEXT_BATCH, seed)
    held_out = text(SEQ_LEN, TEXT_BATCH, 0)

    def trained(lr: float, steps: int, **more: Any) -> TokenFormerLM:
        torch.manual_seed(seed)
        shape = shape_of(size) | {"score_norm": score_norm, "vocab_size": 257, "max_seq_len": SEQ_LEN}
        model = TokenFormerLM(LMConfig(**shape)).to(DEVICE)
        if "on_gradients" in more:
            more["on_gradients"] = partial(more["on_gradients"], model)
        train(model, data, model.loss, "adamw", lr, steps, **more)
        return model

    if what == "largest rate":
        losses = {lr: math.log(257)}  # of a model that knows nothing
        while True:
            loss = validation_loss(trained(lr, scaled(SHORT_STEPS), clip=math.inf), held_out)
            if loss < min(losses.values()) + TOO_MUCH:
                losses[lr], lr = loss, 2 * lr
            elif lr / 2 in losses:
                return {"largest rate": lr / 2, "loss": losses[lr / 2]}
            else:  # the first one was too large
                losses, lr = {lr / 2: math.log(257)}, lr / 2
    norms = list[tuple[float, float, float]]()

    def keep(model: TokenFormerLM, norm: Tensor) -> None:
        clipped = max(1.0, float(norm))  # by so much
        norms.append((float(norm), *(clipped * norm_of(model, part) for part in ("keys", "values"))))

    steps = scaled(STEPS)
    model = trained(lr, steps, on_gradients=keep)
    sizes, keys, values = zip(*norms[max(1, steps // 10) :], strict=True)
    mean = statistics.mean(sizes)
    figures = {"norm": mean, "of keys": statistics.mean(keys), "of values": statistics.mean(values)}
    figures |= {"spread": statistics.stdev(sizes) / mean, "unused": unused(model, held_out)}
    return figures | {"params": model.num_params(), "loss": validation_loss(model, held_out)}


def norm_of(model: TokenFormerLM, part: str) -> float:
    """The norm of the gradients of all keys or all values."""
    found = [p.grad for name, p in model.named_parameters() if name.endswith(f".{part}") and p.grad is not None]
    return float(torch.nn.utils.get_total_norm(found))


@torch.no_grad()
def unused(model: TokenFormerLM, data: Any, num_batches: int = 10) -> float:
    """The share of tokens with hardly a weight, over all layers."""
    layers = pattention_layers(model)
    seen = {name: LayerStatistics(layer.num_tokens, 1, torch.device(DEVICE)) for name, layer in layers.items()}
    for ids, *_ in islice(data.val_dataloader(), num_batches):
        with watching(model, seen, torch.arange(ids.numel(), device=DEVICE)):
            model(ids.to(DEVICE))
    small = [layer.weights < UNUSED * layer.weights.mean() for layer in seen.values()]
    return float(torch.cat(small).double().mean())
