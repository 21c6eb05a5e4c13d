"""Fewer parameter tokens: how much each is used, and a model without those that are used least.

N parameter tokens of a layer, in segments.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tokenformer.elastic import check_share, first
from tokenformer.growth import pattention_layers
from tokenformer.inspection import LayerStatistics, segments_of
from tokenformer.pattention import Pattention

By = Literal["use", "gradient"]


class Kept(NamedTuple):
    """What stays of a layer.

    Attributes:
        rows: the indices of those tokens of each segment.
        tau_factors: of each norm, what its tau is multiplied by.
    """

    rows: list[Tensor]
    tau_factors: list[float]


def values_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """The value tokens of each layer by its name, a tensor for each segment."""
    return {name: [segment.values for segment in layer.segments] for name, layer in pattention_layers(model).items()}  # type: ignore[misc]


def use(model: nn.Module, statistics: Mapping[str, LayerStatistics]) -> dict[str, list[Tensor]]:
    """Mean |weight| times |value| of each token: how much of a layer's output it makes up."""
    values = values_of(model)
    return {
        name: [
            weights / statistics[name].inputs * value.norm(dim=1)
            for weights, value in zip(by_segment(layer, statistics[name].weights), values[name], strict=True)
        ]
        for name, layer in pattention_layers(model).items()
    }


def gradient_use(model: nn.Module, loss: Tensor) -> dict[str, list[Tensor]]:
    """How far the loss of a batch goes without each token, to first order: |dL/dv . v| (Molchanov et al., 2017)."""
    values = values_of(model)
    gradients = iter(torch.autograd.grad(loss, [value for parts in values.values() for value in parts]))
    return {name: [(next(gradients) * v.detach()).sum(1).abs() for v in parts] for name, parts in values.items()}


def most_used(
    model: nn.Module, uses: Mapping[str, list[Tensor]], statistics: Mapping[str, LayerStatistics], keep: float
) -> dict[str, Kept]:
    """The share `keep` of each layer's tokens that is used most, and at least one of each segment.

    What goes has taken part in the norm. Each tau is multiplied by the RMS of what is left of its norm over that of all
    of it, so that the weights of the tokens that stay are what they were, but for what differs from input to input.

    Args:
        model: whose layers.
        uses: of the tokens of each segment of each layer, of :func:`use` or of :func:`gradient_use`.
        statistics: of each layer.
        keep: above 0 and up to 1.

    Raises:
        ValueError: for another share, and for score norms other than l2_norm_gelu.
    """
    check_share(keep)
    found = {}
    for name, layer in pattention_layers(model).items():
        if layer.score_norm != "l2_norm_gelu":
            raise ValueError(f"score_norm={layer.score_norm} of {name}: tokens are ranked by use for l2_norm_gelu only")
        ranked = [use.double().clone() for use in uses[name]]
        for of_segment in ranked:
            of_segment[of_segment.argmax()] = math.inf
        order = torch.cat(ranked).argsort(descending=True, stable=True)
        is_kept = torch.zeros(layer.num_tokens, dtype=torch.bool)
        is_kept[order[: max(len(ranked), first(layer.num_tokens, keep))].cpu()] = True
        rows = [part.nonzero().flatten() for part in is_kept.split([len(part) for part in ranked])]
        found[name] = Kept(rows, _tau_factors(layer, rows, by_segment(layer, statistics[name].squares)))
    return found


def _tau_factors(layer: Pattention, rows: list[Tensor], squares: list[Tensor]) -> list[float]:
    factors, i = [], 0
    for group in layer.norm_groups():
        left = all_of_it = 0.0
        for segment in group:
            if not segment.is_anchored:
                left += float(squares[i][rows[i].to(squares[i].device)].sum())
                all_of_it += float(squares[i].sum())
            i += 1
        factors.append(math.sqrt(left / all_of_it) if left else 1.0)
    return factors


def by_segment(layer: Pattention, of_tokens: Tensor) -> list[Tensor]:
    """Numbers (N) of a layer's tokens in the order of :class:`LayerStatistics`, for each of its segments in theirs."""
    segments = list(segments_of(layer))
    parts = of_tokens.split([len(segment.keys) for segment in segments])
    return [part for _, part in sorted(zip((s.number for s in segments), parts, strict=True), key=lambda pair: pair[0])]


@torch.no_grad()
def keep_tokens(model: nn.Module, kept: Mapping[str, Kept]) -> None:
    """Leave layers some of their tokens, in place; the parameters are new ones, their names are not."""
    for name, (rows, tau_factors) in kept.items():
        layer = pattention_layers(model)[name]
        for segment, index in zip(layer.segments, rows, strict=True):
            for kind in ("keys", "values"):
                tokens = getattr(segment, kind)
                setattr(segment, kind, nn.Parameter(tokens[index.to(tokens.device)], tokens.requires_grad))
        for (tau, _), factor in zip(layer.default_taus(), tau_factors, strict=True):
            tau.mul_(factor)
