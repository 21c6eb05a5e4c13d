"""Any size from one model: the first tokens of every layer alone, or the first hidden units of a baseline's MLPs.

Nested dropout (Rippel et al. 2014) over tokens: a model that was trained with the first n of them in turn, for several
n, can be cut to any of those sizes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tokenformer.baseline import MLP, Linear
from tokenformer.growth import pattention_layers
from tokenformer.interop import consolidated_state, load_checked, precision, present_config
from tokenformer.language import TokenFormerLM
from tokenformer.operator import default_tau
from tokenformer.vision import TokenFormerViT


def elastic_layers(model: nn.Module) -> dict[str, Any]:
    """What has a size of its own, by name: the Pattention layers of a model, and a baseline's MLPs.

    Raises:
        ValueError: for a model without, and a layer whose tokens are in several norms.
    """
    layers: dict[str, Any] = dict(pattention_layers(model))
    for name, layer in layers.items():
        if len(layer.norm_groups()) > 1 or layer.has_anchored:
            raise ValueError(f"{name} has tokens with a norm of their own: only tokens of one norm have an order")
    layers |= {name: module for name, module in model.named_modules() if isinstance(module, MLP)}
    if any(isinstance(module, Linear) and module.lora for module in model.modules()):
        raise ValueError("the model has updates of low rank (LoRA) beside its MLPs: `tokenformer export` merges them")
    if not layers:
        raise ValueError("the model has neither parameter tokens nor the MLPs of a baseline of ours")
    return layers


def check_share(keep: float) -> None:
    """Refuse what is no share of the tokens."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}: the share of the tokens that is kept, above 0 and up to 1")


def first(count: int, keep: float) -> int:
    """How many of so many tokens, or hidden units, a share of them is."""
    return max(1, round(keep * count))


def use_first(layers: Mapping[str, Any], keep: float) -> None:
    """Let the layers of :func:`elastic_layers` use the first of their tokens alone in training mode."""
    for layer in layers.values():
        count = len(layer.up.weight) if isinstance(layer, MLP) else layer.num_tokens
        layer.in_use = first(count, keep)


def shrunk(model: TokenFormerLM | TokenFormerViT, keep: float) -> TokenFormerLM | TokenFormerViT:
    """A model with the first tokens of every layer, tau sqrt(n / N) of what it was; in eval mode.

    Of a baseline: with the first hidden units of every MLP.

    Args:
        model: is left as it is.
        keep: the share that is kept, above 0 and up to 1.

    Raises:
        ValueError: for another share; see :func:`elastic_layers`.
    """
    check_share(keep)
    state, config = consolidated_state(model), present_config(model)
    sizes: dict[str, Any] = {
        name: first(getattr(config, name), keep) for name in ("qkv_tokens", "proj_tokens", "ffn_tokens")
    }
    for name, layer in elastic_layers(model).items():
        if isinstance(layer, MLP):
            n = first(config.mlp_hidden, keep)
            state[f"{name}.up.weight"] = state[f"{name}.up.weight"][:n]
            state[f"{name}.down.weight"] = state[f"{name}.down.weight"][:, :n]
            # The config says an MLP's size by those of the TokenFormer that has as many parameters.
            sizes = {"baseline": "parameters", "qkv_tokens": 1, "proj_tokens": 1}
            sizes["ffn_tokens"] = n + 2 * config.dim - 4
            continue
        N = layer.num_tokens
        n = first(N, keep)
        for kind in ("keys", "values"):
            state[f"{name}.segments.0.{kind}"] = state[f"{name}.segments.0.{kind}"][:n]
        factor = default_tau(n, layer.score_norm) / default_tau(N, layer.score_norm)
        state[f"{name}.tau"] = state[f"{name}.tau"] * factor
    smaller: Any = type(model)(replace(config, **sizes)).to(precision(state))  # type: ignore[arg-type]
    load_checked(smaller, state, "the model that is shrunk")
    if isinstance(model, TokenFormerViT):
        smaller.pretrained_cfg = model.pretrained_cfg
    return smaller.eval()
