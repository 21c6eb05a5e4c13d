"""What training costs: FLOPs of a run that grows, memory of a step. Arithmetic alone: a model may be on `meta`.

T input tokens of a device's batch (all its sequences), D channels, H heads, N parameter tokens, V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from tokenformer.backbone import Block, DifferentialAttention, block_matrices
from tokenformer.baseline import MLP, LowRank
from tokenformer.language import TokenFormerLM
from tokenformer.loss import BLOCK_LOGITS, BLOCK_ROWS, KERNEL_BLOCK_BYTES
from tokenformer.pattention import Pattention
from tokenformer.sharding import Layout

# Lightning's name of a precision: bytes of weights, gradients and Adam's moments; bytes of what is multiplied.
PRECISIONS = {
    "64-true": (8, 8),
    "32-true": (4, 4),
    "16-mixed": (4, 2),
    "bf16-mixed": (4, 2),
    "16-true": (2, 2),
    "bf16-true": (2, 2),
}

# T x N buffers that an operator keeps for its backward pass, unless the layer's `recompute_scores` is on.
SCORE_BUFFERS = {"l2_norm_gelu": 1, "gelu_l2_norm": 3, "softmax": 2}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Training at one size, between two growths.

    Attributes:
        num_params: parameters.
        flops_per_token: FLOPs of a forward pass per token.
        num_tokens: training tokens; None where nobody knows beforehand.
    """

    num_params: int
    flops_per_token: int
    num_tokens: int | None

    @property
    def training_flops(self) -> int | None:
        """Forward, and twice that for backward; what activation checkpointing computes again does not count."""
        return None if self.num_tokens is None else 3 * self.flops_per_token * self.num_tokens


def muon_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters that Muon is for."""
    return [p for p in block_matrices(model) if p.requires_grad]


def muon_flops(model: nn.Module, devices: int = 1) -> int:
    """FLOPs that Muon adds to a step: 5 Newton-Schulz steps for each matrix of m x n, m <= n, of three products each.

    Args:
        model: as large as it is at that time.
        devices: that divide the matrices of each shape, as under FSDP2; counted are those of the one with most.
    """
    numbers = Counter(p.shape for p in muon_matrices(model))
    shapes = [(*sorted(shape), -(-number // devices)) for shape, number in numbers.items()]
    return 5 * sum(number * (4 * m * m * n + 2 * m**3) for m, n, number in shapes)


def cumulative_flops(phases: Sequence[Phase]) -> list[int | None]:
    """Training FLOPs from the start of the run to the end of each phase; None from the first unknown one on."""
    totals: list[int | None] = []
    for phase in phases:
        before, flops = totals[-1] if totals else 0, phase.training_flops
        totals.append(None if before is None or flops is None else before + flops)
    return totals


def marginal_flops(phases: Sequence[Phase]) -> int | None:
    """Training FLOPs of all phases but the first, whose model counts as given (paper, tables 6 and 7)."""
    return cumulative_flops(phases[1:])[-1] if len(phases) > 1 else 0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak of a training step; see :func:`training_memory`."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All four."""
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(
    model: TokenFormerLM,
    batch_size: int,
    seq_len: int,
    precision: str = "32-true",
    devices: int = 1,
    sharded: bool = False,
    tensor_parallel: int = 1,
    optimizer: str = "adamw",
) -> Memory:
    """Memory per device of a training step, its gradients kept all the time (as when accumulating).

    Replicated (DDP), every device has everything, and of the gradients a second copy, the buckets in which they
    travel. Sharded (FSDP2, see :class:`~tokenformer.sharding.Layout`), a device has its share, and whole: what is
    outside the blocks, what has come by growth, two blocks' weights (one at work, one on its way) and one's gradients.

    Against what small steps hold at their peak on a CPU (float32, float64, bfloat16, autocast; grown or not):
    activations within 3 %, with checkpointing 7 % (a Transformer's 12 %), sharded totals within 10 %. Not counted:
    scratch memory of kernels and of Muon (some hundred MB when activations are gone), fragments, an EMA, what
    torch.compile saves. With `score_norm` gelu_l2_norm or softmax temporaries of the backward pass are not counted
    either: up to 40 % too little with checkpointing.

    Args:
        model: as large as it is at that time; its `backbone.checkpoint_activations`, frozen parameters and layers that
            `recompute_scores` count.
        batch_size: sequences of a batch on each device.
        seq_len: tokens of a sequence.
        precision: Lightning's name.
        devices: that the model trains on.
        sharded: FSDP2 in place of DDP.
        tensor_parallel: devices of a group that divides the parameter tokens of each layer, and shares its batches.
        optimizer: adamw (two moments), or muon (one for its matrices, two for the rest).

    Raises:
        ValueError: for a precision that is not in `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision={precision!r}: a plan knows {', '.join(PRECISIONS)}")
    wide = PRECISIONS[precision][0]
    activations = activation_bytes(model, batch_size * seq_len, precision, tensor_parallel)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = muon_matrices(model) if optimizer == "muon" else []
    if not sharded:
        weights, gradients = (wide * sum(p.numel() for p in params) for params in (model.parameters(), trained))
        buckets = gradients if devices > 1 else 0
        moments = 2 * gradients - wide * sum(p.numel() for p in matrices)
        return Memory(weights=weights, gradients=gradients + buckets, optimizer=moments, activations=activations)
    layout = Layout(model, devices, tensor_parallel)
    share = layout.share(trained)
    kept = sum(layout.whole(unit.parameters) for unit in layout.units if not unit.resharded)
    blocks = [unit for unit in layout.units if unit.resharded]
    at_work = sum(sorted(layout.whole(block.parameters) for block in blocks)[-2:])
    return Memory(
        weights=wide * (layout.share(model.parameters()) + kept + at_work),
        gradients=wide * (share + max(layout.whole(unit.trained) for unit in layout.units[:-1])),
        optimizer=wide * (2 * share - layout.share(matrices)),
        activations=activations,
    )


def activation_bytes(model: TokenFormerLM, num_tokens: int, precision: str, tensor_parallel: int = 1) -> int:
    """What a step on T = `num_tokens` tokens needs besides weights, gradients and optimizer state, at its peak.

    That is in the loss or in the backward pass of a block, whichever is more, with what is kept until then.
    """
    config, (wide, narrow) = model.config, PRECISIONS[precision]
    residual = num_tokens * config.dim * wide
    stack: list[Block] = list(model.backbone.blocks)  # type: ignore[arg-type]
    blocks = [_block(block, config.rotary_dim > 0, num_tokens, wide, narrow, tensor_parallel) for block in stack]
    kept, recomputed, copies = sum(kept for kept, _ in blocks), 0, 0
    if model.backbone.checkpoint_activations:
        kept, recomputed = residual * len(blocks), max(kept for kept, _ in blocks) - residual
        if config.baseline is not None and wide != narrow:  # autocast caches its copies of linear weights
            copies = narrow * config.depth * config.block_matmul_params()
    output_gradient = wide * config.vocab_size * config.dim if config.tie_embeddings else 0  # waits for the embedding's
    at_backward = recomputed + max(working for _, working in blocks) + output_gradient
    return kept + max(at_backward, residual + copies + _loss(model, num_tokens, wide, narrow))


def _block(block: Block, rotary: bool, T: int, wide: int, narrow: int, parts: int) -> tuple[int, int]:
    """Bytes that a block keeps for its backward pass, and that its largest layer's backward pass works with."""
    D, mixed, attention = block.attention_norm.normalized_shape[0], wide != narrow, block.attention
    kept = 2 * T * (D * wide + 8)  # the norms' inputs, means and deviations
    if isinstance(attention, DifferentialAttention):  # padded q and k, v and out of both maps, out; the norm's
        in_norm = 4 * D * (1 if attention.norm.weight is None else 2)  # input, and output before the weight
        kept += T * (9 * D * narrow + in_norm + 12 * attention.num_heads)
    else:
        kept += T * ((5 if rotary else 4) * D * narrow + 4 * attention.num_heads)  # q, k, v, out (rotated: twice)
    widest = readers = beside = 0
    at_work = 1  # T x N buffers that a backward pass makes
    for layer in (attention.query, attention.key, attention.value, block.ffn, attention.out):
        num_operators = 1
        if isinstance(layer, Pattention):
            counts = [sum(-(-segment.num_tokens // parts) for segment in group) for group in layer.norm_groups()]
            num_operators = len(counts)
            buffers = 0 if layer.recompute_scores else SCORE_BUFFERS[layer.score_norm]
            at_work = 2 if layer.recompute_scores else 1
            for N in counts:
                kept += T * narrow * (buffers * N + 1)  # and a factor for each row
                kept += mixed * 2 * N * D * narrow  # copies of the tokens
                widest = max(widest, N)
        elif isinstance(layer, MLP):
            widest = layer.up.out_features
            kept += 2 * T * widest * narrow + mixed * 2 * widest * D * narrow
            num_operators += len(layer.up.lora)
            # Each update has a gradient of the hidden units; by then what it keeps itself is given back.
            beside = sum(widest - update.down.shape[0] for update in _updates(layer.down))
        elif isinstance(layer, nn.Linear):
            kept += mixed * D * D * narrow
            num_operators += len(getattr(layer, "lora", ()))
        readers += 0 if layer is attention.out else num_operators
    for update in _updates(block):
        kept += T * update.down.shape[0] * narrow + mixed * (update.down.numel() + update.up.numel()) * narrow
    kept += readers * T * D * narrow if mixed else 2 * T * D * wide  # the norms' outputs; autocast: a copy per reader
    working = T * (at_work * widest + beside) * narrow
    return kept, working + T * D * (wide + (2 + mixed) * narrow) + 2 * widest * D * narrow


def _updates(module: nn.Module) -> list[LowRank]:
    return [update for update in module.modules() if isinstance(update, LowRank)]


def _loss(model: TokenFormerLM, T: int, wide: int, narrow: int) -> int:
    """Bytes that :func:`~tokenformer.loss.linear_cross_entropy` needs, its input and the gradients it keeps too."""
    (V, D), single = model.output_weight.shape, max(wide, 4)
    rows = max(1, min(BLOCK_LOGITS // V, BLOCK_ROWS, T))
    logits = 2 * single * rows * V  # and their log-softmax
    logits = max(logits, min(KERNEL_BLOCK_BYTES, narrow * min(BLOCK_ROWS, T) * V))  # a GPU's blocks
    return logits + V * D * (single + (narrow if wide != narrow else 0)) + T * D * (wide + narrow)
