"""How large new keys have to be for their scores to be as large as the old ones'.

Two sums a layer over a batch tell: A are the scores of its inputs x to the N tokens that make up its norm. New keys
N(0, s^2) have scores with a mean square of s^2 |x|^2, so s^2 = sum |A|^2 / (N sum |x|^2).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from tokenformer.growth import pattention_layers
from tokenformer.pattention import Pattention


@contextmanager
def measuring_scores(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Sums over what the Pattention layers of a model see meanwhile, by the layer's name: (2,) in float32.

    The squares of the scores that make up the layer's (last) norm, per token; and those of the inputs.
    """
    sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(name: str, layer: Pattention, x: Tensor) -> None:
        operators, group = layer.operators()
        keys = torch.cat(operators[-1].keys)[: operators[-1].norm_tokens].float()
        x = x.reshape(-1, x.shape[-1]).float()
        with torch.autocast(x.device.type, enabled=False):
            score = (x @ keys.T).square().sum() / len(keys)
        if group is not None:
            distributed.all_reduce(score, group=group)
            score /= group.size()
        sums[name] = sums.get(name, 0) + torch.stack((score, x.square().sum()))

    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: measure(name, layer, args[0]))
        for name, layer in pattention_layers(model).items()
    ]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def matched_key_stds(model: nn.Module, sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The standard deviation of normal keys whose scores have the RMS of the old ones, by the layer's name.

    Three digits of it, so that it is the same wherever it is computed. Where scores are all zero: the layer's
    `key_std`.

    Args:
        model: the model.
        sums: what :func:`measuring_scores` has measured.
    """
    found = {}
    for name, layer in pattention_layers(model).items():
        scores, inputs = sums[name].tolist()
        matched = math.sqrt(scores / inputs) if inputs > 0 else 0.0
        found[name] = float(f"{matched:.3g}") if 0 < matched < math.inf else layer.key_std
    return found
