"""Parameter groups: with and without weight decay, old and new, by layer, Muon's; and the optimizer over them."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from lightning.pytorch.core.optimizer import _configure_optimizers
from timm.models import group_parameters
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lit_modules.optim.config import OptimConfig
from lit_modules.optim.muon import Muon
from tokenformer.backbone import block_matrices


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    is_old: Callable[[str], bool] | None = None,
    old_lr_scale: float = 1.0,
    no_weight_decay: Collection[str] = (),
    layer_scale: Callable[[str], float] | None = None,
    muon: Collection[nn.Parameter] | None = None,
    lr_adamw: float = 1.0,
) -> list[dict[str, Any]]:
    """Two groups in the order of `named_parameters`: matrices with weight decay; vectors and `no_weight_decay` without.

    With `muon` one before them, for Muon. With `is_old` as many again for the old ones, whose `lr_scale` is
    `old_lr_scale`; with `layer_scale` as many for each of its values. Growth calls it again, so the number of groups
    must not depend on the model's size.

    Args:
        model: whose parameters.
        weight_decay: of matrices.
        is_old: of a parameter's name.
        old_lr_scale: learning rate of old parameters over that of new ones.
        no_weight_decay: names of matrices without weight decay.
        layer_scale: learning rate of a parameter, by its name, over the optimizer's.
        muon: which matrices Muon updates, if it does; those in `no_weight_decay` it leaves alone.
        lr_adamw: learning rate of the others, over Muon's.
    """
    by_muon = set(muon or ())
    kinds = [(True, True)] * (muon is not None) + [(False, True), (False, False)]
    layer_scale = layer_scale or (lambda name: 1.0)
    parameters = dict(model.named_parameters())
    groups: list[dict[str, Any]] = []
    for old in (False,) if is_old is None else (False, True):
        for scale in sorted({layer_scale(name) for name in parameters}, reverse=True):
            for is_muons, decays in kinds:
                params = [
                    (name, p)
                    for name, p in parameters.items()
                    if p.requires_grad
                    and (is_old is None or is_old(name) == old)
                    and layer_scale(name) == scale
                    and (p.ndim >= 2 and name not in no_weight_decay) == decays
                    and (decays and p in by_muon) == is_muons
                ]
                group = {"params": params, "weight_decay": weight_decay if decays else 0.0}
                group["lr_scale"] = scale * (old_lr_scale if old else 1.0) * (1.0 if is_muons else lr_adamw)
                group |= {"muon": is_muons} if muon is not None else {}
                groups.append(group if params else group | {"param_names": []})  # empty, it can't show its names
    return groups


def module_param_groups(module: Any) -> list[dict[str, Any]]:
    """The groups of a TokenFormerModule as it is now; as many before growth as after it."""
    model, optim = module.model, module.optim
    names = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # a timm model has matrices without
    groups: dict[str, Any] = {"no_weight_decay": [f"model.{name}" for name in names]}
    if module.old_lr_scale != 1:
        new = {f"model.{name}" for name in module.growths[-1]["new"]} if module.growths else set()
        groups["is_old"] = lambda name: bool(new) and name not in new
        groups["old_lr_scale"] = module.old_lr_scale
    if optim.layer_decay != 1:
        groups["layer_scale"] = _layer_scales(model, optim.layer_decay).__getitem__
    if optim.name == "muon":
        groups["muon"] = block_matrices(model)
        groups["lr_adamw"] = (optim.lr_adamw or optim.lr) / optim.lr
        if not groups["muon"]:
            raise ValueError("optim.name=muon: this model has no Transformer blocks: set optim.name=adamw")
    return param_groups(module, optim.weight_decay, **groups)


def _layer_scales(model: Any, layer_decay: float) -> dict[str, float]:
    """Learning rate of each parameter over the optimizer's; a timm model says which layer it belongs to."""
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"optim.layer_decay={layer_decay}: this model does not name its layers")
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {f"model.{name}": layer_decay ** (last - layer) for name, layer in layers.items()}


def make_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, *, fused: bool = True
) -> torch.optim.AdamW | Muon:
    """The optimizer of a config over groups of named parameters. `fused`: AdamW updates each group in one pass."""
    kind: Any = Muon if config.name == "muon" else torch.optim.AdamW
    groups = [group | {"lr": config.lr * group["lr_scale"]} for group in groups]
    optimizer = kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
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
            state = saved["state"].get(saved_id.get(name), {})
            moment = state.get("exp_avg", state.get("momentum_buffer"))
            if moment is not None and moment.shape != p.shape:
                raise ValueError(
                    f"the checkpoint trained {name} with the shape {tuple(moment.shape)}, now it has {tuple(p.shape)}: "
                    "a run is resumed at the size that it had (sizes of the model, data.image_size)"
                )
    now = [group["param_names"] for group in optimizer.param_groups]
    if now == [group["param_names"] for group in saved["param_groups"]]:
        return None
    states, groups = {}, []
    for i, names in enumerate(now):
        first = sum(map(len, now[:i]))
        numbers = list(range(first, first + len(names)))
        for number, name in zip(numbers, names, strict=True):
            if saved_id.get(name) in saved["state"]:
                states[number] = saved["state"][saved_id[name]]
        like = saved["param_groups"][min(i, len(saved["param_groups"]) - 1)]
        kind = {key: value for key, value in optimizer.param_groups[i].items() if key == "muon"}
        groups.append(like | kind | {"params": numbers, "param_names": names})
    return {"state": states, "param_groups": groups}


def groups_of(module: Any) -> list[dict[str, Any]]:
    """The groups of a module with a `configure_optimizers` of its own, as that makes them for the model as it is now.

    A run that is resumed at this size has the same, in the same order.

    Raises:
        ValueError: for an optimizer that can't take up new parameters.
    """
    (optimizer,), *_ = _configure_optimizers(module.configure_optimizers())
    if isinstance(optimizer, (torch.optim.LBFGS, ZeroRedundancyOptimizer)):
        raise ValueError(
            f"configure_optimizers: {type(optimizer).__name__} can't take up the parameters of a model that grows: "
            "choose one that keeps the state of each parameter by itself, such as SGD or AdamW"
        )
    names = {p: name for name, p in module.named_parameters()}
    return [{"params": [(names[p], p) for p in group["params"]]} for group in optimizer.param_groups]


def update_param_groups(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Replace the parameters of an optimizer's groups in place: schedulers hold on to the groups, moments stay.

    Raises:
        ValueError: when there are more groups, or fewer.
    """
    if len(optimizer.param_groups) != len(groups):
        raise ValueError(
            f"configure_optimizers: made {len(optimizer.param_groups)} groups of parameters, and {len(groups)} when "
            "asked again: their number must not depend on the model's size"
        )
    for group, now in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [p for _, p in now["params"]]
        if "param_names" in group:
            group["param_names"] = [name for name, _ in now["params"]]
    live = {p for group in optimizer.param_groups for p in group["params"]}
    for gone in set(optimizer.state) - live:
        del optimizer.state[gone]
