"""Pattention: the layer. Parameter tokens in segments, with tau, growth and sharing among processes.

Shapes: D channels (D_in, D_out), N parameter tokens.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tokenformer.operator import (
    WEIGHT_SECOND_MOMENT,
    ScoreNorm,
    attend,
    autocast_dtype,
    default_tau,
)
from tokenformer.process_group import copy_to_group, sum_over_group
from tokenformer.segment import HasTau, TokenSegment
from tokenformer.sparse import attend_to_largest

TauMode = Literal["fixed", "learned", "current"]


class Operator(NamedTuple):
    """Tokens under one norm, for `attend`: those of all segments, tau, and how many define the norm if not all do.

    The anchored segments are behind the others.
    """

    keys: list[Tensor]
    values: list[Tensor]
    tau: Tensor
    norm_tokens: int | None


class Pattention(HasTau):
    """A projection D_in -> D_out by attention over N parameter tokens; drop-in for ``nn.Linear`` without bias.

    The tokens are a list of segments. Growing appends one and leaves the others alone, optimizer state included. The
    first segment and those after it without a norm of their own form one operator, with the layer's ``tau``; each
    segment with a norm of its own starts another one, with its ``tau``; the outputs are added.

    The state dict holds ``tau`` (one element, float64), ``segments.{i}.keys|values``, ``segments.{i}.tau`` where the
    segment has its own norm, and ``segments.{i}.norm_weight`` (0) where it is anchored. Loading one with other segments
    changes the layer to match, so a grown checkpoint needs no other knowledge.

    Args:
        in_features: D_in.
        out_features: D_out.
        num_tokens: N at construction.
        score_norm: see :func:`pattention`.
        scale: what tau does: ``fixed`` at its value for the N at construction; ``learned``, that value times
            exp(10 * ``tau_gain``) with one trained scalar; ``current`` follows N (the released code; not exact when
            the layer grows).
        key_std: standard deviation of the normal initialisation of keys.
        value_std: the same for values. Default: the one that gives outputs an RMS of 0.1, whatever N is.

    Attributes:
        recompute_scores: keep no scores for the backward pass, which computes them again: a matrix product more. Only
            for l2_norm_gelu.
        in_use: so many tokens, the first ones, are used in training mode, with the tau of as many: sqrt(n) where it was
            sqrt(N); None for all. Of a layer with one segment (:mod:`tokenformer.elastic`).
        top_k: so many tokens, those with a row's largest scores, are used in evaluation mode; None for all
            (:mod:`tokenformer.sparse`). Only for l2_norm_gelu.

    Raises:
        ValueError: for fewer than one token or an unknown ``score_norm`` or ``scale``.
    """

    tau: Tensor
    segments: nn.ModuleList

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tokens: int,
        score_norm: ScoreNorm = "l2_norm_gelu",
        scale: TauMode = "fixed",
        key_std: float = 0.02,
        value_std: float | None = None,
    ) -> None:
        super().__init__(has_tau=True, learned=scale == "learned")
        if num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens}: a Pattention needs at least one parameter token")
        if score_norm not in WEIGHT_SECOND_MOMENT:
            raise ValueError(f"score_norm={score_norm!r}: choose one of {', '.join(WEIGHT_SECOND_MOMENT)}")
        if scale not in ("fixed", "learned", "current"):
            raise ValueError(f"scale={scale!r}: choose fixed, learned or current")
        self.in_features, self.out_features = in_features, out_features
        self.score_norm: ScoreNorm = score_norm
        self.recompute_scores = False
        self.in_use: int | None = None
        self.top_k: int | None = None
        self.scale: TauMode = scale
        self.key_std = key_std
        self.value_std = value_std_for_rms(0.1, num_tokens, score_norm) if value_std is None else value_std
        self.segments = nn.ModuleList([TokenSegment(num_tokens, in_features, out_features)])
        self.reset_parameters()

    @property
    def num_tokens(self) -> int:
        """N, over all segments."""
        return sum(segment.num_tokens for segment in self._segments())

    def _segments(self) -> list[TokenSegment]:
        """The segments, out of what peft may have wrapped around them."""
        segments: Any = self.segments
        return [segment.get_base_layer() if hasattr(segment, "get_base_layer") else segment for segment in segments]

    @property
    def has_anchored(self) -> bool:
        """Whether some segment takes no part in its norm."""
        return any(segment.is_anchored for segment in self._segments())

    def norm_groups(self) -> list[list[TokenSegment]]:
        """The segments, those that are normalised together in one list."""
        groups: list[list[TokenSegment]] = []
        for segment in self._segments():
            if segment.tau is not None or not groups:
                groups.append([])
            groups[-1].append(segment)
        return groups

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Keys N(0, key_std), values N(0, value_std), tau its default for the present N, ``tau_gain`` 0."""
        for segment in self._segments():
            nn.init.normal_(segment.keys, std=self.key_std)
            nn.init.normal_(segment.values, std=self.value_std)
        self.set_tau_to_default()
        for owner in (self, *self._segments()):
            if owner.tau_gain is not None:
                nn.init.zeros_(owner.tau_gain)

    @torch.no_grad()
    def set_tau_to_default(self) -> None:
        """Let each tau be what the released code has for the tokens that it belongs to: sqrt(N), N for softmax."""
        for owner, tau in self.default_taus():
            owner.fill_(tau)

    def default_taus(self) -> list[tuple[Tensor, float]]:
        """Each tau of the layer, and what the released code would have in its place."""
        taus = []
        for i, group in enumerate(self.norm_groups()):
            tau = self.tau if i == 0 else group[0].tau
            assert tau is not None
            in_norm = sum(segment.num_tokens for segment in group if not segment.is_anchored)
            taus.append((tau, default_tau(in_norm, self.score_norm)))
        return taus

    def learn_tau(self) -> None:
        """Give each tau a trained gain where it has none; the function stays."""
        for owner in (self, *self._segments()):
            if owner.tau is not None and owner.tau_gain is None:
                owner.tau_gain = nn.Parameter(self._segments()[0].keys.new_zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        operators, group = self.operators()
        if self.top_k is not None and not self.training:
            if self.score_norm != "l2_norm_gelu":
                raise ValueError(f"top_k: needs score_norm l2_norm_gelu, not {self.score_norm}")
            if group is not None:
                raise ValueError("top_k: with tokens divided among processes none knows the largest scores of all")
            return attend_to_largest(x, operators, self.top_k)
        if group is not None:
            x = copy_to_group(x.to(autocast_dtype(x.device) or x.dtype), group)
        out = None
        for keys, values, tau, norm_tokens in operators:
            added = attend(x, keys, values, tau, self.score_norm, group, self.recompute_scores, norm_tokens)
            out = added if out is None else out + added
        assert out is not None
        return out if group is None else sum_over_group(out, group)

    def operators(self) -> tuple[list[Operator], ProcessGroup | None]:
        """The tokens of each norm, and the processes among which they are divided: this one's share is given then."""
        found: list[tuple[list[Tensor], list[Tensor], Any, list[int]]] = []
        group = None
        for segment, inner in zip(self.segments, self._segments(), strict=True):
            keys, values, tau = segment(None)  # peft's wrapper of a module wants to pass something on
            if hasattr(keys, "device_mesh"):  # a DTensor: the tokens are divided among processes
                group = keys.device_mesh.get_group()
                keys, values = keys.to_local(), values.to_local()
            if tau is not None or not found:
                found.append(([], [], self.current_tau() if tau is None else tau, []))
            all_keys, all_values, _, in_norm = found[-1]
            place = len(all_keys) if inner.is_anchored else len(in_norm)
            all_keys.insert(place, keys)
            all_values.insert(place, values)
            if not inner.is_anchored:
                in_norm.append(len(keys))
        if self.training and (n := self.in_use) is not None:
            ((keys,), (values,), tau, _), N = found[0], self.num_tokens
            tau = tau * (default_tau(n, self.score_norm) / default_tau(N, self.score_norm))
            return [Operator([keys[:n]], [values[:n]], tau, None)], group
        return [
            Operator(keys, values, tau, sum(in_norm) if len(in_norm) < len(keys) else None)
            for keys, values, tau, in_norm in found
        ], group

    @property
    def unused_params(self) -> int:
        """Parameters of the tokens that are not used as the layer is now; see `in_use`."""
        unused = 0 if self.in_use is None or not self.training else self.num_tokens - self.in_use
        return unused * (self.in_features + self.out_features)

    def extra_repr(self) -> str:  # noqa: D102
        return (
            f"{self.in_features}, {self.out_features}, num_tokens={self.num_tokens}, "
            f"score_norm={self.score_norm}, scale={self.scale}"
        )

    def match(self, shapes: Mapping[str, torch.Size], prefix: str = "") -> None:
        """Change the segments to those of a state dict, given the shapes of its tensors; contents are left undefined.

        Segments that fit are kept. A state dict that knows nothing of this layer changes nothing.
        """
        wanted: list[tuple[int, bool, bool, bool]] = []  # tokens, own norm, own learned gain, anchored
        while (name := f"{prefix}segments.{len(wanted)}.keys") in shapes:
            start = name.removesuffix("keys")
            own_norm = f"{start}tau" in shapes
            learned = own_norm and (self.scale == "learned" or f"{start}tau_gain" in shapes)
            wanted.append((shapes[name][0], own_norm, learned, f"{start}norm_weight" in shapes))
        if not wanted:
            return
        if self.scale != "learned":
            has_gain = f"{prefix}tau_gain" in shapes
            if has_gain != (self.tau_gain is not None):
                self.tau_gain = nn.Parameter(self._segments()[0].keys.new_zeros(1)) if has_gain else None
        present = [(s.num_tokens, s.tau is not None, s.tau_gain is not None, s.is_anchored) for s in self._segments()]
        fit = next((i for i, (a, b) in enumerate(zip(present, wanted, strict=False)) if a != b), len(wanted))
        first = self._segments()[0].keys
        del self.segments[fit:]
        for num_tokens, *kind in wanted[len(self.segments) :]:
            factory: dict[str, Any] = {"device": first.device, "dtype": first.dtype}
            self.segments.append(TokenSegment(num_tokens, self.in_features, self.out_features, *kind, **factory))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        start = f"{prefix}segments."
        self.match({k: v.shape for k, v in state_dict.items() if k.startswith((start, f"{prefix}tau"))}, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name, weight in state_dict.items():
            if name.startswith(start) and name.endswith(".norm_weight") and not weight.is_meta and weight.any():
                raise ValueError(f"{name}={weight.item():g}: scores count in the norm, or not at all (0)")


def value_std_for_rms(rms: float, num_tokens: int, score_norm: ScoreNorm = "l2_norm_gelu") -> float:
    """The std of value tokens that gives a Pattention's output this RMS at initialisation, whatever N is."""
    return rms / math.sqrt(WEIGHT_SECOND_MOMENT[score_norm] * num_tokens)
