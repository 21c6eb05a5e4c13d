"""Parameter tokens that were added together, and taus: what a Pattention consists of.

Shapes: D channels (D_in, D_out), N parameter tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tokenformer.int8 import dense

# d(log tau) / d(gain): Adam moves `tau_gain` by about one learning rate a step, a tenth of what log tau may need.
TAU_GAIN_RATE = 10.0


class HasTau(nn.Module):
    """What has a tau of its own: a buffer of one element, always float64, times exp(10 * `tau_gain`) where learned."""

    tau: Tensor | None
    tau_gain: nn.Parameter | None

    def __init__(self, has_tau: bool, learned: bool, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.register_buffer("tau", torch.empty(1, dtype=torch.float64, device=device) if has_tau else None)
        gain = nn.Parameter(torch.zeros(1, device=device, dtype=dtype)) if has_tau and learned else None
        self.register_parameter("tau_gain", gain)  # one element and not a 0-dim tensor, which FSDP2 refuses

    def current_tau(self) -> Tensor | None:
        """Tau with its gain, (1,); None without a tau."""
        if self.tau is None or self.tau_gain is None:
            return self.tau
        return self.tau * torch.exp(TAU_GAIN_RATE * self.tau_gain)

    def _apply(self, fn: Any, recurse: bool = True) -> "HasTau":
        # `.half()` or `.bfloat16()` must not round tau: it stays in float64 (float32 where the device has none).
        before = self.tau
        super()._apply(fn, recurse)
        if before is not None and self.tau is not None:
            wide = torch.float32 if self.tau.device.type == "mps" else torch.float64
            source = self.tau if before.is_meta else before
            self.tau = source.to(device=self.tau.device, dtype=wide)
        return self


class _AnyNames(nn.ModuleDict):
    """A ModuleDict whose entries may have the names of its methods: an entry is found by `[name]` all the same."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # type: ignore[assignment]


class TokenSegment(HasTau):
    """Parameter tokens that were added together: ``keys`` (N, D_in) and ``values`` (N, D_out).

    With ``own_norm`` the segment has a tau, and its scores are normalised by themselves; without, they are normalised
    together with those of the segment before it. Those of an ``anchored`` segment are divided by the norm of the others
    in whose norm they take no part: it has a buffer ``norm_weight``, which is 0. Calling a segment returns keys, values
    and the factor of its own norm or None: a module that is called (and not just read) can be sharded on its own. What
    torchao has quantised (:mod:`tokenformer.int8`) is in the model's dtype again then.
    """

    norm_weight: Tensor | None

    def __init__(
        self,
        num_tokens: int,
        in_features: int,
        out_features: int,
        own_norm: bool = False,
        learned: bool = False,
        anchored: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__(own_norm, learned, **factory)
        # A tensor and not a flag, so that a state dict says it.
        self.register_buffer("norm_weight", torch.zeros(1, device=factory.get("device")) if anchored else None)
        self.keys = nn.Parameter(torch.empty(num_tokens, in_features, **factory))
        self.values = nn.Parameter(torch.empty(num_tokens, out_features, **factory))

    def forward(self, _: None = None) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: D102
        return dense(self.keys), dense(self.values), self.current_tau()

    def __setattr__(self, name: str, value: Any) -> None:
        # `torch.nn.utils.parametrize`, by which peft adds LoRA, puts what it does to a parameter into a ModuleDict by
        # the parameter's name, and a ModuleDict takes no `keys` or `values`.
        super().__setattr__(name, _AnyNames() if name == "parametrizations" else value)

    @property
    def num_tokens(self) -> int:
        """N of this segment."""
        return len(self.keys)

    @property
    def is_anchored(self) -> bool:
        """Whether its scores are divided by the norm of others."""
        return self.norm_weight is not None

    @property
    def is_removable(self) -> bool:
        """Whether it takes no part in the norm of those before it, which therefore stay as they are without it."""
        return self.tau is not None or self.is_anchored
