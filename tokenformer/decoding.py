"""Projections of one token at a time, in few calls: it waits for those, and not for the products.

L layers of the same input, B rows, D channels (D_in, D_out), N parameter tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenformer.fused import joined, of_norm, row_factor, row_norm
from tokenformer.pattention import Operator, Pattention


def each(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """What layers give for the same input."""
    return [layer(x) for layer in layers]


class JoinedLayers:
    """Layers of the same input as one: their parameter tokens together, as they are now.

    The tokens of several layers are copied, those of one layer with one segment are not.
    """

    def __init__(self, operators: list[Operator]) -> None:
        self.keys = joined([keys for operator in operators for keys in operator.keys])  # (L N, D_in)
        values = [joined(operator.values) for operator in operators]
        self.values = torch.stack(values) if len(values) > 1 else values[0].unsqueeze(0)  # (L, N, D_out)
        wide = torch.promote_types(self.keys.dtype, torch.float32)
        self.tau = torch.stack([operator.tau for operator in operators]).unsqueeze(-1).to(wide)  # (L, 1, 1)
        self.norm_tokens = operators[0].norm_tokens or self.values.shape[1]

    @classmethod
    def of(cls, layers: Sequence[nn.Module]) -> "JoinedLayers | None":
        """None where they are not Pattentions that can be joined, or something watches them."""
        operators: list[Operator] = []
        for layer in layers:
            if type(layer) is not Pattention or layer.score_norm != "l2_norm_gelu" or layer.top_k is not None:
                return None
            if any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules()):
                return None
            (operator, *others), _ = layer.operators()
            if others:
                return None
            operators.append(operator)
        sizes = {(sum(map(len, o.keys)), o.values[0].shape[1], o.norm_tokens) for o in operators}
        return cls(operators) if len(sizes) == 1 else None

    def __call__(self, x: Tensor) -> Tensor:
        """(B, 1, D_in) -> (L, B, 1, D_out): `fused._forward` of all layers, without what a gradient needs."""
        scores = (x.flatten(0, 1) @ self.keys.T).unflatten(1, (len(self.values), -1)).transpose(0, 1)  # (L, B, N)
        factor = row_factor(row_norm(of_norm(scores, self.norm_tokens)), self.tau, scores.dtype)
        return torch.bmm(F.gelu(scores.mul_(factor)), self.values).unsqueeze(2)
