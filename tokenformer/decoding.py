"""Projections of one token at a time, in few calls: on a CPU it waits for those, and not for the products.

L layers of the same input, B rows, T tokens, D channels (D_in, D_out), N parameter tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenformer.fused import of_norm, row_factor, row_norm, sum_of_products, write_products
from tokenformer.pattention import Operator, Pattention


def each(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What layers give for the same input, (B, T, D_in) -> L times (B, T, D_out)."""
    return [layer(x) for layer in layers]


def join(*layers: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    """:func:`each` of these layers for one token, (B, 1, D_in) -> L times (B, 1, D_out), as they are now.

    Pattentions of as many tokens and one norm are one operator with one norm and one GELU, as query, key and value are
    in a fused `qkv`; it reads the layers' own tensors. Where something watches a layer or takes its place, where its
    tokens are divided among processes, on a GPU, whose kernels do norm and GELU at once, and where layers are of
    another kind, each is called.
    """
    operators = [operator for layer in layers if (operator := _only_operator(layer)) is not None]
    sizes = {(sum(map(len, operator.keys)), operator.norm_tokens) for operator in operators}
    if len(operators) == len(layers) and len(sizes) == 1:
        return _Joined(operators)
    return lambda x: each(x, *layers)


def _only_operator(layer: nn.Module) -> Operator | None:
    if type(layer) is not Pattention or layer.score_norm != "l2_norm_gelu" or layer.top_k is not None:
        return None
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in layer.modules()):
        return None
    (operator, *others), group = layer.operators()
    return operator if not others and group is None and not operator.tau.is_cuda else None


class _Joined:
    """`fused._forward` of several layers, without what a gradient needs."""

    def __init__(self, operators: Sequence[Operator]) -> None:
        self.keys = [keys for operator in operators for keys in operator.keys]
        self.values = [operator.values for operator in operators]
        self.num_tokens = sum(map(len, operators[0].keys))
        self.norm_tokens = operators[0].norm_tokens or self.num_tokens
        wide = torch.promote_types(self.keys[0].dtype, torch.float32)
        self.tau = torch.stack([operator.tau for operator in operators]).to(wide)  # (L, 1)

    def __call__(self, x: Tensor) -> list[Tensor]:
        scores = x.new_empty(len(x), len(self.values) * self.num_tokens)
        scores = write_products(x.flatten(0, 1), self.keys, scores).unflatten(1, (-1, self.num_tokens))  # (B, L, N)
        factor = row_factor(row_norm(of_norm(scores, self.norm_tokens)), self.tau, scores.dtype)
        weights = F.gelu(scores.mul_(factor)).unbind(1)
        return [sum_of_products(w, values).unsqueeze(1) for w, values in zip(weights, self.values, strict=True)]
