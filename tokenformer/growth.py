"""Growing a model: append parameter tokens, change nothing else."""

from torch import nn

from tokenformer.pattention import Pattention

QKV = ("query", "key", "value")


def grow(model: nn.Module, qkv: int | None = None, proj: int | None = None, ffn: int | None = None) -> None:
    """Append parameter tokens to every Pattention of a model, in place, up to these counts.

    The model's function stays the same (new keys are zero), unless its tau is ``current`` or its scores are softmax.
    An optimizer must be given the new parameters.

    Args:
        model: a model with Pattention layers.
        qkv: parameter tokens of each query, key and value projection afterwards; None leaves them.
        proj: the same for the output projections.
        ffn: the same for the feed-forward layers.

    Raises:
        ValueError: when a layer already has more tokens than asked for, or the model has no Pattention.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Pattention)}
    if not layers:
        raise ValueError("the model has no Pattention layers: a baseline does not grow by tokens")
    wanted = {"out": proj, "ffn": ffn} | dict.fromkeys(QKV, qkv)
    plan = []
    for name, layer in layers.items():
        target = wanted[name.rsplit(".", 1)[-1]]
        if target is not None and target < layer.num_tokens:
            raise ValueError(f"{name} has {layer.num_tokens} parameter tokens, more than {target}: growth only adds")
        if target is not None and target > layer.num_tokens:
            plan.append((layer, target - layer.num_tokens))
    for layer, added in plan:  # all checked before any is changed
        layer.append_tokens(added)
