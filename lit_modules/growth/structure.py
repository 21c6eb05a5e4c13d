"""What the past growths of a module mean for its model: its structure, what is frozen, taus that are on their way."""

import math
from collections.abc import Mapping
from typing import Any

from lit_modules.optim.trained import trained_after_growth, trained_names
from tokenformer.files import check_size
from tokenformer.growth import anneal_taus, pattention_layers
from tokenformer.parts import match_shapes


def match_structure(module: Any, saved: Mapping[str, Any], growths: list[dict[str, Any]]) -> None:
    """Give a module's model the width and the segments of a saved one, and freeze what was frozen in its last growth.

    Args:
        module: a TokenFormerModule.
        saved: what the saved module's state dict has, by name; anything with a shape.
        growths: the saved history.
    """
    module.growths = growths
    width = math.prod(record["width"] for record in growths)
    dim = width * module.config.dim
    if getattr(getattr(module.model, "config", None), "dim", dim) != dim:  # its contents come with the checkpoint
        check_size(module.config, saved, "the checkpoint's history of growths", width)
        wider = module.build_model(dim // module.config.dim)
        module.set_model(wider.to(next(module.model.parameters())))
    prefix = "model."
    shapes = {name.removeprefix(prefix): t.shape for name, t in saved.items() if name.startswith(prefix)}
    match_shapes(module.model, shapes)
    freeze(module)


def freeze(module: Any) -> None:
    """In a training freeze what `model.train` leaves out and, after a growth of `train: new`, what is older."""
    in_training, grows = module._trainer is not None, bool(pattention_layers(module.model) or module.growths)
    trained = trained_names(module.model, module.trained if in_training else "all")
    if in_training and module.growths:
        last = module.growths[-1]
        trained &= trained_after_growth(module.model, last["train"], last["new"])
    for name, parameter in module.model.named_parameters():
        if grows or name not in trained:  # a timm model may have parameters that are never trained
            parameter.requires_grad_(name in trained)
    if in_training and module.trained != "all":
        module.train(module.training)


def anneal_tau(module: Any, step: int) -> None:
    """Move the taus on, by an optimizer step, which the last growth lets go to sqrt(tokens)."""
    left = module.growths[-1]["anneal_until"] - step if module.growths else 0
    if left > 0:
        anneal_taus(module.model, left)
