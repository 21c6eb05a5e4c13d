"""Growing a model: append parameter tokens, change nothing else. N old tokens, M new ones."""

import math
import zlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tokenformer.net2net import divide
from tokenformer.operator import default_tau
from tokenformer.parts import pattention_layers as pattention_layers
from tokenformer.parts import remove_segments as remove_segments
from tokenformer.pattention import Pattention
from tokenformer.segment import TokenSegment

Init = Literal["anchored", "zero_keys", "segment_norm", "pairs", "split", "random"]
ScaleAfter = Literal["fixed", "anneal", "learned", "current"]

# Which count of `grow` a layer follows, by the last part of its name.
COUNT_OF = {"query": "qkv", "key": "qkv", "value": "qkv", "out": "proj", "ffn": "ffn"}


def grow(
    model: nn.Module,
    qkv: int | None = None,
    proj: int | None = None,
    ffn: int | None = None,
    *,
    init: Init = "anchored",
    scale: ScaleAfter = "fixed",
    layers: str | Sequence[str] = "all",
    seed: int = 0,
) -> None:
    """Append parameter tokens to the Pattention layers of a model, in place, up to these counts.

    An optimizer must be given the new parameters. The new tokens depend on `seed`, the layer's name and how often it
    has grown, and on nothing else: every process and every resumed run makes the same ones.

    Args:
        model: a model with Pattention layers.
        qkv: parameter tokens of each query, key and value projection afterwards; None leaves them.
        proj: the same for the output projections.
        ffn: the same for the feed-forward layers.
        init: how new tokens start, see :func:`append_tokens`.
        scale: what tau does: ``fixed`` and ``anneal`` (see :func:`anneal_taus`) leave it as it is; ``learned`` adds a
            trained gain where a layer has none; ``current`` sets it to sqrt(N + M), as the released code does.
        layers: ``all``, or which: the last parts of names (``ffn``), or patterns of whole ones (``*.blocks.0.*``).
        seed: of the new tokens.

    Raises:
        ValueError: when the model has no Pattention of a kind that is asked for, a layer has more tokens than asked
            for, or a kind of initialisation can't make that many tokens. Nothing is changed then.
    """
    counts = {"qkv": qkv, "proj": proj, "ffn": ffn}
    if all(count is None for count in counts.values()):
        raise ValueError("give at least one of qkv, proj, ffn")
    planned = plan_growth(model, counts, layers)
    grow_layers(model, planned, init=init, scale=scale, seed=seed)


def grow_layers(
    model: nn.Module,
    planned: Mapping[str, int],
    *,
    init: Init = "anchored",
    scale: ScaleAfter = "fixed",
    seed: int = 0,
    key_stds: Mapping[str, float] | None = None,
) -> None:
    """:func:`grow`, by so many tokens for each layer (its name in the model).

    `key_stds` are the standard deviations of the new keys of ``anchored``, by layer
    (:func:`tokenformer.matched_keys.matched_key_stds`).
    """
    found = pattention_layers(model)
    if scale not in get_args(ScaleAfter):
        raise ValueError(f"scale={scale!r}: choose one of {', '.join(get_args(ScaleAfter))}")
    for name, added in planned.items():
        check_init(found[name], added, init, name)
    for name, added in planned.items():
        layer = found[name]
        start = zlib.crc32(f"{seed}:{len(layer.segments)}:{name}".encode())
        append_tokens(layer, added, init, torch.Generator().manual_seed(start), (key_stds or {}).get(name))
        if scale == "learned":
            layer.learn_tau()
        elif scale == "current":
            layer.set_tau_to_default()


def plan_growth(
    model: nn.Module,
    counts: Mapping[str, int | None],
    layers: str | Sequence[str] = "all",
    factor: float | None = None,
) -> dict[str, int]:
    """How many tokens each layer would get, by the layer's name; layers that get none are left out.

    Args:
        model: a model with Pattention layers.
        counts: tokens afterwards of the layers of kind ``qkv``, ``proj``, ``ffn``; None leaves them.
        layers: which, see :func:`grow`.
        factor: in place of counts: tokens afterwards over tokens now, rounded.

    Raises:
        ValueError: see :func:`grow`.
    """
    found = pattention_layers(model)
    if not found:
        raise ValueError("the model has no Pattention layers: a Transformer baseline does not grow by tokens")
    planned = {}
    chosen = _chosen(found, layers)
    kinds = {COUNT_OF.get(name.rsplit(".", 1)[-1]) for name in chosen}
    if missing := [kind for kind, count in counts.items() if count is not None and kind not in kinds]:
        raise ValueError(
            f"{missing[0]}={counts[missing[0]]}: there is no such layer among {', '.join(chosen) or 'none'}"
        )
    for name in chosen:
        now = found[name].num_tokens
        wanted = counts.get(COUNT_OF.get(name.rsplit(".", 1)[-1], "")) if factor is None else round(factor * now)
        if wanted is not None and wanted < now:
            raise ValueError(f"{name} has {now} parameter tokens, more than {wanted}: growth only adds")
        if wanted is not None and wanted > now:
            planned[name] = wanted - now
    return planned


def _chosen(found: Mapping[str, Pattention], layers: str | Sequence[str]) -> list[str]:
    if layers == "all":
        return list(found)
    chosen = set()
    for pattern in [layers] if isinstance(layers, str) else layers:
        matching = {name for name in found if fnmatch(name, pattern) or name.rsplit(".", 1)[-1] == pattern}
        if not matching:
            raise ValueError(
                f"layers: {pattern!r} is none of the model's: choose all, some of {', '.join(COUNT_OF)}, "
                f"or patterns of names such as {next(iter(found))}"
            )
        chosen |= matching
    return [name for name in found if name in chosen]


def check_init(layer: Pattention, added: int, init: Init, name: str) -> None:
    """Whether this kind of initialisation can add that many tokens to a layer.

    Raises:
        ValueError: for an unknown kind, an odd count with ``pairs``, a fraction of the layer with ``split``, or another
            score normalisation than l2_norm_gelu with ``anchored``.
    """
    if init not in get_args(Init):
        raise ValueError(f"init={init!r}: choose one of {', '.join(get_args(Init))}")
    now = layer.num_tokens
    if init == "pairs" and added % 2:
        raise ValueError(f"init: pairs adds tokens two at a time, {name} would get {added}: ask for {now + added + 1}")
    if init == "anchored" and layer.score_norm != "l2_norm_gelu":
        raise ValueError(
            f"init: anchored needs score_norm l2_norm_gelu, {name} has {layer.score_norm}: choose segment_norm"
        )
    if init == "split" and (len(layer.norm_groups()) > 1 or layer.has_anchored):
        raise ValueError(f"init: split needs one norm of all tokens, {name} has segments with another")
    if init == "split" and added % now:
        raise ValueError(
            f"init: split copies all {now} tokens of {name} a whole number of times: ask for "
            f"{now * (1 + max(1, round(added / now)))} instead of {now + added}"
        )


def why_not_exact(init: Init, scale: ScaleAfter, score_norm: str) -> str | None:
    """Why growth of this kind changes the function of a layer; None if it does not (paper, App. B; facts in docs)."""
    if init == "random":
        return "init: random adds keys that change the scores' norm and values that are added to the output"
    if scale == "current" and init == "zero_keys":
        return "scale: current changes tau with the number of tokens, and the function with it"
    if score_norm == "softmax" and init == "zero_keys":
        return "score_norm: softmax gives zero keys a weight (exp(0) = 1): zero keys are not exact with it"
    return None


@torch.no_grad()
def append_tokens(
    layer: Pattention,
    num_tokens: int,
    init: Init = "anchored",
    generator: torch.Generator | None = None,
    key_std: float | None = None,
) -> None:
    """Append parameter tokens to one layer as a new segment. All kinds but ``random`` leave its function as it is.

    ``zero_keys``: keys 0, values N(0, value_std). New scores are 0, so the norm stays and GELU(0) = 0 (paper, App. B).
    ``anchored``: values 0, keys N(0, `key_std`) whose scores are divided by the norm of the old ones and never count in
    it: |A| is that of the tokens that are not anchored.
    ``segment_norm``: the new tokens have a norm and a tau of their own; keys N(0, key_std), values 0.
    ``pairs``: as `segment_norm`, but tokens come in pairs of equal key and opposite value N(0, value_std), that cancel.
    ``split``: all tokens copied (M a multiple of N), the values divided in random shares; tau grows by
    sqrt((N + M) / N), as the norm does.
    ``random``: keys N(0, key_std), values N(0, value_std): the paper's runs. Not exact.

    Args:
        layer: the layer to grow.
        num_tokens: M, at least 1.
        init: the kind.
        generator: a CPU generator of what is random.
        key_std: standard deviation of the keys of ``anchored`` (:func:`tokenformer.matched_keys.matched_key_stds`).
            Default: twice the RMS of the keys whose norm it is.

    Raises:
        ValueError: see :func:`check_init`; for fewer than one token.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens}: append at least one parameter token")
    check_init(layer, num_tokens, init, "the layer")
    old: list[TokenSegment] = list(layer.segments)  # type: ignore[arg-type]
    like = old[0].keys
    own_norm = init in ("segment_norm", "pairs")
    new = TokenSegment(
        num_tokens,
        layer.in_features,
        layer.out_features,
        own_norm,
        own_norm and layer.tau_gain is not None,
        init == "anchored",
        device=like.device,
        dtype=like.dtype,
    )

    def normal(rows: int, columns: int, std: float) -> Tensor:
        if like.is_meta:  # only sizes are asked for
            return torch.empty(rows, columns, device="meta")
        return torch.randn(rows, columns, generator=generator) * std

    if init == "zero_keys":
        new.keys.zero_()
        new.values.copy_(normal(num_tokens, layer.out_features, layer.value_std))
    elif init == "anchored":
        if key_std is None:
            in_norm: list[Tensor] = [segment.keys for segment in layer.norm_groups()[-1] if not segment.is_anchored]
            key_std = 0.0 if like.is_meta else 2 * float(torch.cat(in_norm).double().square().mean().sqrt())
        new.keys.copy_(normal(num_tokens, layer.in_features, key_std))
        new.values.zero_()
    elif init == "random":
        new.keys.copy_(normal(num_tokens, layer.in_features, layer.key_std))
        new.values.copy_(normal(num_tokens, layer.out_features, layer.value_std))
    elif init == "segment_norm":
        new.keys.copy_(normal(num_tokens, layer.in_features, layer.key_std))
        new.values.zero_()
    elif init == "pairs":  # the two side by side, so that a sum over tokens meets both halves at once
        half = num_tokens // 2
        new.keys.copy_(normal(half, layer.in_features, layer.key_std).repeat_interleave(2, dim=0))
        value = normal(half, layer.out_features, layer.value_std)
        new.values.copy_(torch.stack((value, -value), dim=1).flatten(0, 1))
    else:
        keys, values = (torch.cat(parts) for parts in zip(*((s.keys, s.values) for s in old), strict=True))
        copies = 1 + num_tokens // len(keys)
        divided = divide(values, copies, generator)
        for segment, part in zip(old, divided[0].split([s.num_tokens for s in old]), strict=True):
            segment.values.copy_(part)
        new.keys.copy_(keys.repeat(copies - 1, 1))
        new.values.copy_(divided[1:].flatten(0, 1))
        layer.tau.mul_(copies if layer.score_norm == "softmax" else math.sqrt(copies))
    if new.tau is not None:
        new.tau.fill_(default_tau(num_tokens, layer.score_norm))
    layer.segments.append(new)
    if layer.scale == "current":
        layer.set_tau_to_default()


@torch.no_grad()
def anneal_taus(model: nn.Module, steps_left: int) -> None:
    """One step of every tau on its straight way to sqrt(N), which it reaches when `steps_left` was 1."""
    for layer in pattention_layers(model).values():
        for tau, goal in layer.default_taus():
            tau += (goal - tau) / steps_left
