"""Pattention: attention between the input tokens and learnable parameter tokens (TokenFormer, eq. 4-6).

    scores = x @ keys.T              A_ij = x_i . k_j
    weights = gelu(tau * A / |A|)    |A| is the Euclidean norm of a row, so the GELU's input has an RMS of tau / sqrt(N)
    out = weights @ values

Shapes: T input tokens, D channels (D_in, D_out), N parameter tokens. Every matrix here has rows = tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

ScoreNorm = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]
TauMode = Literal["fixed", "learned", "current"]

# E[weight^2] of one parameter token at initialisation, where the scores of a row are close to normal.
WEIGHT_SECOND_MOMENT = {"l2_norm_gelu": 0.425, "gelu_l2_norm": 1.0, "softmax": 1.0}

# d(log tau) / d(gain): Adam moves `tau_gain` by about one learning rate a step, a tenth of what log tau may need.
TAU_GAIN_RATE = 10.0

# Elements of a T x N buffer that the operator takes at a time on the CPU.
CPU_BLOCK = 2**22


def default_tau(num_tokens: int, score_norm: ScoreNorm = "l2_norm_gelu") -> float:
    """The factor after the score normalisation in the released code: sqrt(N), or N for softmax."""
    return float(num_tokens) if score_norm == "softmax" else math.sqrt(num_tokens)


def pattention(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: Tensor | float | None = None,
    score_norm: ScoreNorm = "l2_norm_gelu",
) -> Tensor:
    """Attend from input tokens to parameter tokens (paper eq. 4-6; released code, class ``Pattention``).

    Args:
        x: input tokens, (..., D_in).
        keys: key tokens, (N, D_in).
        values: value tokens, (N, D_out).
        scale: tau, the factor after the normalisation, a number or a one-element tensor (which may need a gradient).
            Default: sqrt(N), or N for softmax.
        score_norm: ``l2_norm_gelu`` (all published models), ``gelu_l2_norm`` or ``softmax``.

    Returns:
        (..., D_out). A row whose scores are all zero gives zeros with the two L2 kinds, and zero gradients.

    Raises:
        ValueError: for an unknown ``score_norm``.
    """
    if score_norm not in WEIGHT_SECOND_MOMENT:
        raise ValueError(f"score_norm={score_norm!r}: choose one of {', '.join(WEIGHT_SECOND_MOMENT)}")
    return _attend(x, [keys], [values], default_tau(len(keys), score_norm) if scale is None else scale, score_norm)


def _attend(
    x: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    scale: Tensor | float,
    score_norm: ScoreNorm,
    group: ProcessGroup | None = None,
) -> Tensor:
    """:func:`pattention` to parameter tokens in several segments, which are normalised together.

    With a `group` of processes, these are the process's share of the tokens, as many as each other one's, x is the same
    in all of them, and the result and its gradient for x are what these tokens add.
    """
    if (dtype := autocast_dtype(x.device)) is None:
        return _attend_as_given(x, keys, values, scale, score_norm, group)
    with torch.autocast(x.device.type, enabled=False):  # the operator chooses its own precisions
        keys, values = ([tokens.to(dtype) for tokens in segments] for segments in (keys, values))
        return _attend_as_given(x.to(dtype), keys, values, scale, score_norm, group)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast wants matrix products to run in; None where it is off or not to be had (meta tensors)."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _attend_as_given(
    x: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    scale: Tensor | float,
    score_norm: ScoreNorm,
    group: ProcessGroup | None,
) -> Tensor:
    if score_norm == "l2_norm_gelu":
        tau = scale if isinstance(scale, Tensor) else torch.full((1,), scale, dtype=torch.float64, device=x.device)
        x_TD = x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling():  # writing to columns of a buffer would break its graph
            keys, values = [_joined(keys)], [_joined(values)]
        tensors = (x_TD, tau, *keys, *values)
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        out_TD = _L2NormGELU.apply(group, *tensors) if needs_grad else _forward(group, x_TD, tau, keys, values)[0]
        return out_TD.view(*x.shape[:-1], out_TD.shape[-1])
    if group is not None:
        raise ValueError(f"score_norm={score_norm!r}: only l2_norm_gelu divides its tokens among devices")
    scores = x @ _joined(keys).T  # (..., N)
    if score_norm == "softmax":
        weights = scores.softmax(-1) * scale  # subtracts the row's maximum, so it can't overflow
    else:
        weights = F.gelu(scores)
        weights = weights * _row_factor(weights, scale)
    joined = _joined(values)
    return weights.to(joined.dtype) @ joined


def _joined(segments: list[Tensor]) -> Tensor:
    return segments[0] if len(segments) == 1 else torch.cat(segments)


def _row_factor(rows: Tensor, scale: Tensor | float, group: ProcessGroup | None = None) -> Tensor:
    """Return tau / |row|, shape (..., 1), at least float32; 0 (not infinite) where a row is all zero.

    With a `group`, its processes have different columns of the rows.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    # On the CPU a wide norm of bfloat16 copies all rows to float32 first; its own kernel sums in float32 anyway.
    sum_in = None if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" else wide
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=sum_in).to(wide)
    if group is not None:
        distributed.all_reduce(norm.square_(), group=group)
        norm.sqrt_()
    scale = scale.to(wide) if isinstance(scale, Tensor) else scale
    return torch.where(norm > 0, scale / torch.where(norm > 0, norm, 1), 0)


def _forward(
    group: ProcessGroup | None, x: Tensor, tau: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(out (T, D_out), z (T, N) the GELU's input, factor (T, 1) = tau / |A|). Allocates one T x N buffer, z."""
    sizes = [len(segment) for segment in keys]
    T, N = x.shape[0], sum(sizes)
    z, out, factor = x.new_empty(T, N), x.new_empty(T, values[0].shape[1]), x.new_empty(T, 1)
    # On the CPU a block of rows stays in the cache, and its GELU in memory that the allocator hands out again.
    in_blocks = x.device.type == "cpu" and not torch.compiler.is_compiling()
    num_blocks = max(1, -(-T * N // CPU_BLOCK)) if in_blocks else 1
    blocks = (t.tensor_split(num_blocks) for t in (x, z, out, factor))
    for x_block, z_block, out_block, factor_block in zip(*blocks, strict=True):
        for segment, scores in zip(keys, z_block.split(sizes, dim=1), strict=True):
            torch.mm(x_block, segment.T, out=scores)
        # In z's own precision: a mixed-precision product costs more than a matrix product on the CPU. The clamp keeps
        # the factor of a tiny row finite in float16.
        factor_block.copy_(_row_factor(z_block, tau, group).clamp_max(torch.finfo(z.dtype).max))
        z_block.mul_(factor_block)
        _sum_of_products(F.gelu(z_block).split(sizes, dim=1), values, out_block)
    return out, z, factor


def _sum_of_products(lefts: Sequence[Tensor], rights: Sequence[Tensor], out: Tensor) -> Tensor:
    """Write sum_i left_i @ right_i to `out`."""
    for i, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        torch.addmm(out, left, right, beta=min(i, 1), out=out)
    return out


class _L2NormGELU(torch.autograd.Function):
    """The fused operator. Keeps one T x N buffer (z) for the backward pass; GELU is computed again from it.

    Keys and values come in segments, all keys and then all values; each has its columns of that buffer, so that
    nothing is concatenated. Where a group of processes shares the tokens, the squared norm is added up over it, and so
    is r in the backward pass.

    Backward (paper, App. A): with z = tau A / |A|, g = dL/dz and r = g . z per row,
        dL/dA = (tau / |A|) (g - z r / tau^2),    dL/dtau = sum r / tau.
    The factor tau / |A| belongs to a row, so it is applied to T x D matrices instead of T x N ones.
    """

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup | None, x: Tensor, tau: Tensor, *keys_and_values: Tensor) -> Tensor:
        half = len(keys_and_values) // 2
        out, z, factor = _forward(group, x, tau, keys_and_values[:half], keys_and_values[half:])
        ctx.group = group
        ctx.save_for_backward(x, tau, z, factor, *keys_and_values)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, tau, z, factor, *keys_and_values = ctx.saved_tensors
        half = len(keys_and_values) // 2
        keys, values = keys_and_values[:half], keys_and_values[half:]
        _, needs_x, needs_tau, *needs_segments = ctx.needs_input_grad
        needs_keys, needs_values = needs_segments[:half], needs_segments[half:]
        sizes, num_tokens = [len(segment) for segment in keys], z.shape[1]
        grad_x = grad_tau = None
        grad_keys: list[Tensor | None] = [None] * half
        weights = F.gelu(z) if any(needs_values) else torch.empty_like(z)
        columns = weights.split(sizes, dim=1)  # of the segments
        grad_values = [c.T @ grad_out if needed else None for c, needed in zip(columns, needs_values, strict=True)]
        if needs_x or needs_tau or any(needs_keys):
            for segment, column in zip(values, columns, strict=True):
                torch.mm(grad_out, segment.T, out=column)
            grad = weights  # (T, N) dL/dweights, from here on changed in place
            torch.ops.aten.gelu_backward.grad_input(grad, z, grad_input=grad)  # dL/dz
            # r / N as a batch of dot products: no T x N temporary, and dividing by N keeps it in float16's range.
            zero = grad.new_zeros(())
            r = torch.baddbmm(zero, grad.unsqueeze(1), z.unsqueeze(2), beta=0, alpha=1 / num_tokens).squeeze(2)
            wide = torch.promote_types(z.dtype, torch.float32)
            r_wide, tau_wide = r.to(wide), tau.to(wide)
            if ctx.group is not None:
                distributed.all_reduce(r_wide, group=ctx.group)
            if needs_tau:
                grad_tau = (r_wide.sum() * num_tokens / tau_wide).to(tau.dtype).view_as(tau)
            grad.addcmul_(z, (r_wide * (-num_tokens / tau_wide**2)).to(z.dtype))  # |A| / tau * dL/dA
            if needs_x:
                grad_x = _sum_of_products(columns, keys, torch.empty_like(x)).mul_(factor)
            if any(needs_keys):
                scaled = x * factor
                grad_keys = [c.T @ scaled if needed else None for c, needed in zip(columns, needs_keys, strict=True)]
        return None, grad_x, grad_tau, *grad_keys, *grad_values


class _CopyToGroup(torch.autograd.Function):
    """A tensor that all processes of a group have goes into what each does alone; their gradients are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.clone()
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOverGroup(torch.autograd.Function):
    """What the processes of a group have computed alone is added up, in place; each gets the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, group: ProcessGroup) -> Tensor:
        ctx.mark_dirty(out)
        distributed.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _HasTau(nn.Module):
    """What has a tau of its own: a buffer of one element, always float64, times exp(10 * `tau_gain`) where learned."""

    tau: Tensor | None
    tau_gain: nn.Parameter | None

    def __init__(self, has_tau: bool, learned: bool, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.register_buffer("tau", torch.empty(1, dtype=torch.float64, device=device) if has_tau else None)
        gain = nn.Parameter(torch.zeros(1, device=device, dtype=dtype)) if has_tau and learned else None
        self.register_parameter("tau_gain", gain)  # one element and not a 0-dim tensor, which FSDP2 refuses

    def scale_now(self) -> Tensor | None:
        if self.tau is None or self.tau_gain is None:
            return self.tau
        return self.tau * torch.exp(TAU_GAIN_RATE * self.tau_gain)

    def _apply(self, fn: Any, recurse: bool = True) -> "_HasTau":
        # `.half()` or `.bfloat16()` must not round tau: it stays in float64 (float32 where the device has none).
        before = self.tau
        super()._apply(fn, recurse)
        if before is not None and self.tau is not None:
            wide = torch.float32 if self.tau.device.type == "mps" else torch.float64
            source = self.tau if before.is_meta else before
            self.tau = source.to(device=self.tau.device, dtype=wide)
        return self


class TokenSegment(_HasTau):
    """Parameter tokens that were added together: ``keys`` (N, D_in) and ``values`` (N, D_out).

    With ``own_norm`` the segment has a tau, and its scores are normalised by themselves; without, they are normalised
    together with those of the segment before it. Calling it returns keys, values and the factor of its own norm or
    None: a module that is called (and not just read) can be sharded on its own.
    """

    def __init__(
        self,
        num_tokens: int,
        in_features: int,
        out_features: int,
        own_norm: bool = False,
        learned: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__(own_norm, learned, **factory)
        self.keys = nn.Parameter(torch.empty(num_tokens, in_features, **factory))
        self.values = nn.Parameter(torch.empty(num_tokens, out_features, **factory))

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: D102
        return self.keys, self.values, self.scale_now()

    @property
    def num_tokens(self) -> int:
        """N of this segment."""
        return len(self.keys)


class Pattention(_HasTau):
    """A projection D_in -> D_out by attention over N parameter tokens; drop-in for ``nn.Linear`` without bias.

    The tokens are a list of segments. Growing appends one and leaves the others alone, optimizer state included. The
    first segment and those after it without a norm of their own form one operator, with the layer's ``tau``; each
    segment with a norm of its own starts another one, with its ``tau``; the outputs are added.

    The state dict holds ``tau`` (one element, float64), ``segments.{i}.keys|values``, and ``segments.{i}.tau`` where
    the segment has its own norm. Loading one with other segments changes the layer to match, so a grown checkpoint
    needs no other knowledge.

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
        return list(self.segments)  # type: ignore[arg-type]

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
            taus.append((tau, default_tau(sum(segment.num_tokens for segment in group), self.score_norm)))
        return taus

    def learn_tau(self) -> None:
        """Give each tau a trained gain where it has none; the function stays."""
        for owner in (self, *self._segments()):
            if owner.tau is not None and owner.tau_gain is None:
                owner.tau_gain = nn.Parameter(self._segments()[0].keys.new_zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        operators: list[tuple[list[Tensor], list[Tensor], Any]] = []
        group = None
        for segment in self.segments:
            its_keys, its_values, scale = segment()
            if hasattr(its_keys, "device_mesh"):  # a DTensor: the tokens are divided among processes
                group = its_keys.device_mesh.get_group()
                its_keys, its_values = its_keys.to_local(), its_values.to_local()
            if scale is not None or not operators:
                operators.append(([], [], self.scale_now() if scale is None else scale))
            operators[-1][0].append(its_keys)
            operators[-1][1].append(its_values)
        if group is not None:
            x = _CopyToGroup.apply(x.to(autocast_dtype(x.device) or x.dtype), group)
        out = None
        for keys, values, scale in operators:
            added = _attend(x, keys, values, scale, self.score_norm, group)
            out = added if out is None else out + added
        assert out is not None
        return out if group is None else _SumOverGroup.apply(out, group)

    def extra_repr(self) -> str:  # noqa: D102
        return (
            f"{self.in_features}, {self.out_features}, num_tokens={self.num_tokens}, "
            f"score_norm={self.score_norm}, scale={self.scale}"
        )

    def match(self, shapes: Mapping[str, torch.Size], prefix: str = "") -> None:
        """Change the segments to those of a state dict, given the shapes of its tensors; contents are left undefined.

        Segments that fit are kept. A state dict that knows nothing of this layer changes nothing.
        """
        wanted: list[tuple[int, bool, bool]] = []  # tokens, own norm, own learned gain
        while (name := f"{prefix}segments.{len(wanted)}.keys") in shapes:
            start = name.removesuffix("keys")
            own_norm = f"{start}tau" in shapes
            learned = own_norm and (self.scale == "learned" or f"{start}tau_gain" in shapes)
            wanted.append((shapes[name][0], own_norm, learned))
        if not wanted:
            return
        if self.scale != "learned":
            has_gain = f"{prefix}tau_gain" in shapes
            if has_gain != (self.tau_gain is not None):
                self.tau_gain = nn.Parameter(self._segments()[0].keys.new_zeros(1)) if has_gain else None
        present = [(s.num_tokens, s.tau is not None, s.tau_gain is not None) for s in self._segments()]
        fit = next((i for i, (a, b) in enumerate(zip(present, wanted, strict=False)) if a != b), len(wanted))
        first = self._segments()[0].keys
        del self.segments[fit:]
        for num_tokens, own_norm, learned in wanted[len(self.segments) :]:
            factory = {"device": first.device, "dtype": first.dtype}
            self.segments.append(
                TokenSegment(num_tokens, self.in_features, self.out_features, own_norm, learned, **factory)
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        start = f"{prefix}segments."
        self.match({k: v.shape for k, v in state_dict.items() if k.startswith((start, f"{prefix}tau"))}, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def value_std_for_rms(rms: float, num_tokens: int, score_norm: ScoreNorm = "l2_norm_gelu") -> float:
    """The std of value tokens that gives a Pattention's output this RMS at initialisation, whatever N is."""
    return rms / math.sqrt(WEIGHT_SECOND_MOMENT[score_norm] * num_tokens)
