"""What parameter tokens do on data, and how their keys lie: how often each fires, what fires it most, angles, ranks.

A token fires where its score is above 0: there its weight, which is the GELU of the normalised score, is positive, like
a neuron that is on in a ReLU network (Voita et al., 2023, whose dead neurons are those that never are). A random key
fires at half of all inputs.

T inputs of a layer, D channels, N parameter tokens, in the order of `Pattention.operators`; k inputs kept of each.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenformer.backbone import blocks_of
from tokenformer.fused import joined, norm_factor, row_norm
from tokenformer.growth import COUNT_OF, pattention_layers
from tokenformer.operator import ScoreNorm
from tokenformer.pattention import Pattention

BLOCK_ROWS = 1024  # keys whose angles to all others, or predictions whose logits, are held at a time
DEGREES = 180  # bins of angles


class LayerStatistics:
    """Sums over the inputs of a layer: so many numbers for each of its tokens, however many inputs there are.

    Attributes:
        inputs: how many there were.
        fires: at how many of them each token fired, (N).
        weights: the sum of its |weight|, (N).
        squares: the sum of its squared scores, (N).
        top: its largest weights, the largest first, (N, k); -inf where there were fewer inputs.
        places: where these were, (N, k).
    """

    def __init__(self, num_tokens: int, k: int, device: torch.device) -> None:
        self.inputs = 0
        self.fires, self.weights, self.squares = torch.zeros(3, num_tokens, dtype=torch.float64, device=device)
        self.top = torch.full((num_tokens, k), -math.inf, device=device)
        self.places = torch.full((num_tokens, k), -1, device=device)

    def add(self, scores: Tensor, weights: Tensor, places: Tensor) -> None:
        """Take scores and weights (T, N) of inputs at these places, (T), into account."""
        self.inputs += len(scores)
        self.fires += (scores > 0).sum(0)
        self.weights += weights.abs().sum(0, dtype=torch.float64)
        self.squares += scores.square().sum(0, dtype=torch.float64)
        k = self.top.shape[1]
        self.top, index = torch.cat((self.top, weights.T.to(self.top)), 1).topk(k)  # both (N, k)
        kept = self.places.gather(1, index.clamp(max=k - 1))
        self.places = torch.where(index < k, kept, places[(index - k).clamp(min=0)])


@contextmanager
def watching(model: nn.Module, statistics: Mapping[str, LayerStatistics], places: Tensor) -> Iterator[None]:
    """Add what the layers of a model see meanwhile, in one forward pass, to the statistics by their names.

    Args:
        model: the model.
        statistics: of each Pattention layer.
        places: a number for each input of a layer, (T); inputs with a negative one do not count.
    """
    counts = places >= 0

    def measure(name: str, layer: Pattention, x: Tensor) -> None:
        scores, weights = scores_and_weights(layer, x.reshape(-1, x.shape[-1])[counts])
        statistics[name].add(scores, weights, places[counts])

    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: measure(name, layer, args[0]))
        for name, layer in pattention_layers(model).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def scores_and_weights(layer: Pattention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of inputs (T, D) to all tokens of a layer that is in one process, both (T, N), at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    found = []
    for keys, _, tau, norm_tokens in layer.operators()[0]:
        scores = x @ joined(keys).to(x.dtype).T
        found.append((scores, _weights(scores, tau, layer.score_norm, norm_tokens)))
    scores, weights = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return scores, weights


def _weights(scores: Tensor, tau: Tensor, score_norm: ScoreNorm, norm_tokens: int | None) -> Tensor:
    if score_norm == "softmax":
        return scores.softmax(-1) * tau.to(scores.dtype)
    if score_norm == "gelu_l2_norm":
        weights = F.gelu(scores)
        return weights * norm_factor(row_norm(weights), tau)
    return F.gelu(scores * norm_factor(row_norm(scores[..., :norm_tokens]), tau))


class Segment(NamedTuple):
    """One of a layer's: its number, keys (N, D_in), values (N, D_out), and the tau of its norm."""

    number: int
    keys: Tensor
    values: Tensor
    tau: float


def segments_of(layer: Pattention) -> Iterator[Segment]:
    """A layer's segments in the order in which their tokens stand here: anchored ones behind the others of the norm."""
    number = {id(segment): i for i, segment in enumerate(layer.segments)}
    for operator, group in zip(layer.operators()[0], layer.norm_groups(), strict=True):
        ordered = sorted(group, key=lambda segment: segment.is_anchored)
        for segment, keys, values in zip(ordered, operator.keys, operator.values, strict=True):
            yield Segment(number[id(segment)], keys, values, float(operator.tau.detach()))


class Geometry(NamedTuple):
    """How vectors that are not zero lie in their space.

    Attributes:
        effective_rank: exp of the entropy of the singular values over their sum (Roy and Vetterli, 2007); 0 of none.
        cos_rms: root mean square of the cosines of all pairs; 1/sqrt(D) of random vectors; nan of fewer than two.
        cos_max: the largest |cosine|.
        angles: how many pairs have an angle of 0 to 1 degrees, 1 to 2, ... (180).
    """

    effective_rank: float
    cos_rms: float
    cos_max: float
    angles: Tensor


@torch.no_grad()
def geometry(vectors: Tensor) -> Geometry:
    """Of vectors (N, D)."""
    vectors = vectors.double()
    vectors = vectors[vectors.any(1)]
    num, angles = len(vectors), torch.zeros(DEGREES, dtype=torch.float64)
    if not num:
        return Geometry(0.0, math.nan, math.nan, angles)
    gram = vectors @ vectors.T if num < vectors.shape[1] else vectors.T @ vectors
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    rank = float(torch.special.entr(singular / singular.sum()).sum().exp())
    unit, squares, largest = F.normalize(vectors), 0.0, 0.0
    for start in range(0, num, BLOCK_ROWS):
        cosines = unit[start : start + BLOCK_ROWS] @ unit.T
        later = torch.ones_like(cosines, dtype=torch.bool).triu(start + 1)  # each pair once
        cosines = cosines[later].clamp(-1, 1)
        if len(cosines):
            squares += float(cosines.square().sum())
            largest = max(largest, float(cosines.abs().max()))
            angles += torch.histc(torch.rad2deg(cosines.acos()), DEGREES, 0, 180).cpu()
    if num == 1:
        return Geometry(rank, math.nan, math.nan, angles)
    return Geometry(rank, math.sqrt(2 * squares / (num * (num - 1))), largest, angles)


@lru_cache
def random_geometry(num: int, dim: int) -> Geometry:
    """Of as many normal vectors, always the same ones: almost at right angles, the more so the larger D is."""
    return geometry(torch.randn(num, dim, generator=torch.Generator().manual_seed(0)))


def parts_of(model: nn.Module) -> dict[str, list[Pattention]]:
    """The layers of all feed-forwards, of all projections, and of each block, by what they are together."""
    layers = pattention_layers(model)
    is_ffn = {name: COUNT_OF[name.rpartition(".")[2]] == "ffn" for name in layers}
    parts = {
        "feed-forward": [layer for name, layer in layers.items() if is_ffn[name]],
        "projections": [layer for name, layer in layers.items() if not is_ffn[name]],
    }
    for i, block in enumerate(blocks_of(model)):
        parts[f"block {i}"] = list(pattention_layers(block).values())
    return parts


@contextmanager
def silenced(layers: Iterable[Pattention]) -> Iterator[None]:
    """Let layers give zeros meanwhile, as they do when all their value tokens are zero."""
    hooks = [layer.register_forward_hook(lambda layer, args, out: torch.zeros_like(out)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Scored(NamedTuple):
    """Cross-entropy of the target and entropy of the prediction, in nats; the likeliest, and its probability."""

    nats: Tensor
    entropy: Tensor
    confidence: Tensor
    likeliest: Tensor


@torch.no_grad()
def scored(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Scored:
    """What a head makes of hidden states (T, D), in blocks, since all logits at once may not fit; all (T).

    The cross-entropy is nan where the target (T) is below 0, which is to say unknown.
    """
    found = []
    for rows, ids in zip(hidden.split(BLOCK_ROWS), targets.split(BLOCK_ROWS), strict=True):
        logits = head(rows)
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        nats = -log_probs.gather(-1, ids.clamp(min=0).unsqueeze(1)).squeeze(1)
        largest, likeliest = log_probs.max(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        found.append(Scored(nats.where(ids >= 0, math.nan), entropy, largest.exp(), likeliest))
    return Scored(*(torch.cat(parts) for parts in zip(*found, strict=True)))
