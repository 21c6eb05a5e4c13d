"""AdamW with decay groups, and learning rate schedules that depend on the step alone."""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule; defaults are the published ones (Pile and OpenWebText runs).

    Attributes:
        lr: peak learning rate.
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

    lr: float = 6e-4
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


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    is_old: Callable[[str], bool] | None = None,
    old_lr_scale: float = 1.0,
    undecayed: Collection[str] = (),
    layer_scale: Callable[[str], float] | None = None,
) -> list[dict[str, Any]]:
    """Two groups in the order of `named_parameters`: matrices with weight decay; vectors, and `undecayed`, without.

    With `is_old` two more for the old ones, whose `lr_scale` is `old_lr_scale`; with `layer_scale` as many for each of
    its values. Growth calls it again, so the number of groups must not depend on the model's size.

    Args:
        model: whose parameters.
        weight_decay: of matrices.
        is_old: of a parameter's name.
        old_lr_scale: learning rate of old parameters over that of new ones.
        undecayed: names of matrices without weight decay.
        layer_scale: learning rate of a parameter, by its name, over the optimizer's.
    """
    layer_scale = layer_scale or (lambda name: 1.0)
    parameters = dict(model.named_parameters())
    groups: list[dict[str, Any]] = []
    for old in (False,) if is_old is None else (False, True):
        for scale in sorted({layer_scale(name) for name in parameters}, reverse=True):
            for decays in (True, False):
                params = [
                    (name, p)
                    for name, p in parameters.items()
                    if p.requires_grad
                    and (is_old is None or is_old(name) == old)
                    and layer_scale(name) == scale
                    and (p.ndim >= 2 and name not in undecayed) == decays
                ]
                group = {"params": params, "weight_decay": weight_decay if decays else 0.0}
                group["lr_scale"] = scale * (old_lr_scale if old else 1.0)
                groups.append(group if params else group | {"param_names": []})  # empty, it can't show its names
    return groups


def adamw(groups: list[dict[str, Any]], config: OptimConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over groups of named parameters. `fused` does each group's update in one pass."""
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    optimizer.register_load_state_dict_pre_hook(match_by_name)
    return optimizer


def match_by_name(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any] | None:
    """Bring a saved optimizer state into this optimizer's groups; parameters that it does not know start afresh.

    Raises:
        ValueError: when a moment has another shape than its parameter (an image size has changed), which the fused
            update would not notice.
    """
    if not all("param_names" in group for group in (*optimizer.param_groups, *saved["param_groups"])):
        return None
    saved_id = {
        name: number
        for group in saved["param_groups"]
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            moment = saved["state"].get(saved_id.get(name), {}).get("exp_avg")
            if moment is not None and moment.shape != p.shape:
                raise ValueError(
                    f"the checkpoint trained {name} with the shape {tuple(moment.shape)}, now it has {tuple(p.shape)}: "
                    "a training goes on at the size that it had (sizes of the model, data.image_size)"
                )
    now = [group["param_names"] for group in optimizer.param_groups]
    if now == [group["param_names"] for group in saved["param_groups"]]:
        return None
    state, groups = {}, []
    for i, names in enumerate(now):
        first = sum(map(len, now[:i]))
        numbers = list(range(first, first + len(names)))
        for number, name in zip(numbers, names, strict=True):
            if saved_id.get(name) in saved["state"]:
                state[number] = saved["state"][saved_id[name]]
        like = saved["param_groups"][min(i, len(saved["param_groups"]) - 1)]
        groups.append(like | {"params": numbers, "param_names": names})
    return {"state": state, "param_groups": groups}


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """Torch's clip_grad_norm_, also for gradients on several meshes of devices; returns the total norm, one element."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            by_mesh.setdefault(getattr(p.grad, "device_mesh", None), []).append(p)
    norms = [nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]) for params in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)
    if limit < math.inf:
        for params in by_mesh.values():
            nn.utils.clip_grads_with_norm_(params, limit, total)
    return total


def regroup(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Replace the parameters of an optimizer's groups in place: schedulers hold on to the groups, moments stay."""
    for group, now in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [p for _, p in now["params"]]
        group["param_names"] = [name for name, _ in now["params"]]
    live = {p for group in optimizer.param_groups for p in group["params"]}
    for gone in set(optimizer.state) - live:
        del optimizer.state[gone]


def lr_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, max_steps: int) -> LambdaLR:
    """The schedule, to be stepped after every optimizer step. Raises as :func:`check_schedule` does."""
    check_schedule(config, max_steps, f"trainer.max_steps={max_steps}")
    return LambdaLR(optimizer, lr_factor(config, max_steps))


def check_schedule(config: OptimConfig, steps: int, what: str) -> None:
    """Whether warm-up and decay fit into so many steps.

    Raises:
        ValueError: when they don't; `what` says which steps are meant.
    """
    decay = decay_steps(config, steps) if config.schedule == "wsd" else 0
    if config.schedule != "constant" and config.warmup_steps + decay >= steps + (decay > 0):
        rest = f" and the {decay} steps of optim.decay_fraction={config.decay_fraction}" if decay else ""
        raise ValueError(
            f"optim.warmup_steps={config.warmup_steps}{rest} don't fit into {what}: lower optim.warmup_steps"
        )


def decay_steps(config: OptimConfig, max_steps: int) -> int:
    """Steps in which wsd goes down."""
    return max(1, round(config.decay_fraction * max_steps))


def lr_factor(config: OptimConfig, max_steps: int) -> Callable[[int], float]:
    """Step (0 is the first) -> learning rate over its peak."""
    warmup, floor = config.warmup_steps, config.min_lr_ratio

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "cosine":
            progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))  # a plateau may leave too few steps
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        decay = decay_steps(config, max_steps)
        progress = min(1.0, max(0.0, (step - (max_steps - decay)) / decay))
        return 1 - (1 - floor) * progress

    return factor
