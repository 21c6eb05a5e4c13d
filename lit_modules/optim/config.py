"""The settings of the optimizer and its schedule, `model.optim`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule; defaults are the published ones (Pile and OpenWebText runs).

    Attributes:
        name: adamw; or muon: for matrices inside blocks, that is for parameter tokens and linear weights, with AdamW
            for the rest.
        lr: peak learning rate.
        lr_adamw: with muon, that of what AdamW trains. None: `lr`, since Muon's steps are as long as AdamW's.
        lr_batch: samples of an optimizer step that `lr` is meant for; the rate grows in proportion with the samples
            that a step has. None: it is as given.
        betas: AdamW's decay rates of the first and second moment.
        eps: AdamW's epsilon.
        weight_decay: of parameter tokens, linear weights and embeddings; norms and learned taus have none.
        schedule: cosine (warm-up, then down to `min_lr_ratio` when all steps are done), wsd (warm-up, stable, then
            linearly down over the last `decay_fraction` of all steps) or constant (warm-up, then level).
        warmup_steps: steps over which the rate rises linearly from 0.
        min_lr_ratio: rate over `lr` when all steps are done, for cosine and wsd.
        decay_fraction: part of all steps in which wsd goes down.
        layer_decay: learning rate of a block over that of the next one, for vision models.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 6e-4
    lr_adamw: float | None = None
    lr_batch: int | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 2000
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optim.name={self.name!r}: choose adamw or muon")
        if self.lr_adamw is not None and (self.lr_adamw <= 0 or self.name != "muon"):
            raise ValueError(f"optim.lr_adamw={self.lr_adamw}: must be above 0, and goes with optim.name=muon")
        if self.lr <= 0:
            raise ValueError(f"optim.lr={self.lr}: must be above 0")
        if self.lr_batch is not None and self.lr_batch < 1:
            raise ValueError(f"optim.lr_batch={self.lr_batch}: must be at least 1 sample")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay={self.layer_decay}: must be above 0 and at most 1")
        if self.schedule not in ("cosine", "wsd", "constant"):
            raise ValueError(f"optim.schedule={self.schedule!r}: choose cosine, wsd or constant")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps={self.warmup_steps}: must be at least 0")
        for name in ("min_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: must lie between 0 and 1")
