"""What devices send each other in an optimizer step: bytes and messages of one device. Arithmetic alone.

n devices of a group, T input tokens of a batch, D channels. What is all-reduced goes around a ring twice, 2 (n-1) / n
of its bytes from each device; what is all-gathered or reduce-scattered goes around once. Not counted: a few numbers
(losses, the gradient norm, taus), and what validation, logging and checkpoints send.
"""

import math
from dataclasses import dataclass

from torch import nn

from tokenformer.cost import PRECISIONS, muon_matrices
from tokenformer.growth import pattention_layers
from tokenformer.language import TokenFormerLM
from tokenformer.sharding import Layout

BUCKET = 25 * 2**20  # bytes of gradients that DDP sends together


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a device sends to the others of its group in an optimizer step.

    Attributes:
        group: devices of the group, n.
        sent: bytes from this device.
        all_reduces: how many.
        gathers: how many all-gathers and reduce-scatters.
    """

    group: int
    sent: int
    all_reduces: int = 0
    gathers: int = 0

    def hops(self, per_node: int) -> tuple[int, int]:
        """Messages that wait for the one before, within nodes and between nodes.

        An all-gather goes around a ring. An all-reduce has the bytes of a ring, but may go along a tree: in a node
        from one to the next, between nodes to one of two, and back.

        Args:
            per_node: members of the group in a node.
        """
        nodes = -(-self.group // per_node)
        members = min(self.group, per_node)
        within = self.gathers * (self.group - nodes) + 2 * self.all_reduces * (members - 1)
        between = self.gathers * (nodes - 1) + 2 * self.all_reduces * math.ceil(math.log2(nodes))
        return within, between


def ddp_traffic(model: TokenFormerLM, precision: str, devices: int) -> Traffic:
    """DDP: the gradients are all-reduced once a step, after its last batch, in the precision of the weights."""
    size = PRECISIONS[precision][0] * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Traffic(group=devices, sent=_all_reduced(size, devices), all_reduces=-(-size // BUCKET))


def fsdp_traffic(layout: Layout, precision: str, batches: int) -> Traffic:
    """FSDP2, between the replicas of a layout.

    For every batch of the step each unit is all-gathered, once more for the backward pass if it is resharded, and the
    gradients are reduce-scattered (accumulating saves nothing). In mixed precision the weights travel in float32:
    autocast rounds them after that.

    Args:
        layout: the model on its devices.
        precision: Lightning's name.
        batches: of an optimizer step, `accumulate_grad_batches`.
    """
    n, elements, gathers = layout.replicas, 0, 0
    for unit in layout.units:
        times = 2 if unit.resharded else 1
        elements += times * layout.share(unit.parameters) + layout.share(unit.trained)
        gathers += times + bool(unit.trained)
    return Traffic(group=n, sent=batches * (n - 1) * PRECISIONS[precision][0] * elements, gathers=batches * gathers)


def muon_traffic(model: TokenFormerLM, layout: Layout) -> tuple[Traffic, Traffic]:
    """Muon under FSDP2, once a step and waited for: rows of matrices for whole matrices, and back, in 16 bits.

    Each device sends its rows of a matrix to the one that works on it. Matrices of a shape travel together. Of those
    that token parallelism divides, rows come from the replicas first, then from the others of the group.

    Args:
        model: the whole model.
        layout: on its devices.

    Returns:
        Between the replicas, and within a group of token parallelism.
    """
    matrices = muon_matrices(model)
    tokens = [p for p in matrices if layout.whole([p]) < p.numel()]

    def traffic(parameters: list[nn.Parameter], n: int) -> Traffic:
        sent = 2 * -(-2 * (n - 1) * layout.share(parameters) // n)
        return Traffic(group=n, sent=sent, gathers=2 * len({p.shape for p in parameters}))

    return traffic(matrices, layout.replicas), traffic(tokens, layout.tensor_parallel)


def token_parallel_traffic(
    model: TokenFormerLM, num_tokens: int, precision: str, batches: int, devices: int
) -> Traffic:
    """Token parallelism, within a group that divides every layer's parameter tokens and has the same input tokens.

    A layer all-reduces in its forward pass the squared norms of its scores (T float32, for each norm of its own) and
    its output (T x D), in its backward pass a sum per row (T float32, for each norm) and its input's gradient (T x D).
    With activation checkpointing the forward pass is done twice. T x D is in the precision of matrix products.

    Args:
        model: the whole model.
        num_tokens: of a batch, T.
        precision: Lightning's name.
        batches: of an optimizer step.
        devices: of the group.
    """
    wide, narrow = PRECISIONS[precision]
    passes = 3 if model.backbone.checkpoint_activations else 2
    size = all_reduces = 0
    for layer in pattention_layers(model).values():
        norms, forwards = len(layer.norm_groups()), passes - 1
        rows = num_tokens * norms * max(wide, 4)
        size += forwards * (rows + num_tokens * layer.out_features * narrow)
        size += rows + num_tokens * layer.in_features * narrow
        all_reduces += passes * (norms + 1)
    return Traffic(group=devices, sent=batches * _all_reduced(size, devices), all_reduces=batches * all_reduces)


def _all_reduced(size: int, devices: int) -> int:
    return -(-2 * (devices - 1) * size // devices)
