"""The stack of pre-norm blocks that language and vision share.

B batch, T sequence, S tokens of a cache, D channels, H heads, K channels of a head, R rotated channels of a head.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tokenformer.baseline import MLP, Linear
from tokenformer.cache import Chunk, KVCache
from tokenformer.config import BackboneConfig
from tokenformer.decoding import each
from tokenformer.pattention import Pattention


def projection(config: BackboneConfig, num_tokens: int, *, residual: bool) -> nn.Module:
    """A D -> D projection: a Pattention of `num_tokens` tokens, or a linear layer in the baseline.

    `residual` says that its output is added to the residual stream, where initial values are smaller.
    """
    if config.baseline is not None:
        return Linear(config.dim, config.dim, baseline_std(config, residual))
    return Pattention(
        config.dim,
        config.dim,
        num_tokens,
        score_norm=config.score_norm,
        scale=config.scale,
        key_std=config.key_std,
        value_std=config.value_std(num_tokens, residual),
    )


def baseline_std(config: BackboneConfig, residual: bool) -> float:
    """GPT-2's initialisation: N(0, 0.02), and 1/sqrt(2 L) of it in the two residual projections of a block."""
    return 0.02 / math.sqrt(2 * config.depth) if residual else 0.02


def layer_norm(config: BackboneConfig) -> nn.LayerNorm:
    """A block's norm, without weight and bias unless the config asks for them."""
    return nn.LayerNorm(config.dim, eps=1e-5, elementwise_affine=config.norm_affine)


def rotary_tables(seq_len: int, rotary_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, R) of the rotary embedding, base 10000, half-split: channel j pairs with j + R/2.

    Always float32: in bfloat16 neighbouring positions far into a sequence would be the same.
    """
    return rotary_tables_at(torch.arange(seq_len, device=device), rotary_dim)


def rotary_tables_at(positions: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """:func:`rotary_tables` for positions (..., T), each (..., T, R)."""
    channels = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / 10000 ** (channels / rotary_dim)  # (R/2)
    angles = positions.unsqueeze(-1).float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)  # (..., T, R)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first R channels of each head of x (B, H, T, K) by their positions."""
    cos, sin = tables
    turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin  # at least float32
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The Transformer blocks of a model of this project or of timm; none of another architecture."""
    return list(getattr(getattr(model, "backbone", model), "blocks", ()))


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices inside its blocks: keys and values of each segment, linear weights. Muon's part of a model."""
    return [p for block in blocks_of(model) for p in block.parameters() if p.ndim == 2]


class SelfAttention(nn.Module):
    """Attention between the tokens of a sequence; each of its four projections is attention to parameter tokens."""

    def __init__(self, config: BackboneConfig, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.num_maps, self.causal = config.num_heads, config.num_heads * config.maps_per_head, causal
        self.query = projection(config, config.qkv_tokens, residual=False)
        self.key = projection(config, config.qkv_tokens, residual=False)
        self.value = projection(config, config.qkv_tokens, residual=False)
        self.out = projection(config, config.proj_tokens, residual=True)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, chunk: Chunk | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            x: the tokens.
            rotary: the tables of :func:`rotary_tables`, or None for no positions.
            chunk: which part of a cached sequence the tokens are, or None for all of it.
        """
        project = each if chunk is None else chunk.project
        query, key, value = (
            projected.unflatten(-1, (self.num_maps, -1)).transpose(1, 2)  # (B, H, T, K)
            for projected in project(x, self.query, self.key, self.value)
        )
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        seen = None
        if chunk is not None:
            (key, value), seen = chunk.extend(self, key, value), chunk.seen  # (B, H, S, K)
        mixed = self.mix(query, key, value, seen, is_causal=self.causal and seen is None)  # (B, H, T, K)
        return project(mixed.transpose(1, 2).flatten(2), self.out)[0]

    def mix(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, is_causal: bool) -> Tensor:
        """What each token attends to, (B, H, T, K); `seen` are the tokens (B, 1, T, S) that it may, or None."""
        return F.scaled_dot_product_attention(query, key, value, seen, is_causal=is_causal)


class DifferentialAttention(SelfAttention):
    """The difference of two attention maps in each head, with a learned weight (Ye et al. 2024, arXiv 2410.05258).

        out = (1 - start) norm((softmax(q1 k1' / sqrt(K / 2)) - weight softmax(q2 k2' / sqrt(K / 2))) v)
        weight = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + start

    q1 and q2 are the two halves of a head's channels, norm is an RMSNorm of each head, `start` depends on the depth.
    """

    def __init__(self, config: BackboneConfig, causal: bool, index: int) -> None:
        super().__init__(config, causal)
        self.start = 0.8 - 0.6 * math.exp(-0.3 * index)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(0.1 * torch.randn(config.map_dim)) for _ in range(4)
        )
        self.norm = nn.RMSNorm(config.head_dim, eps=1e-5, elementwise_affine=config.norm_affine)

    def weight(self) -> Tensor:
        """Of the second map, a scalar of at least float32."""
        first, second = self.lambda_q1 * self.lambda_k1, self.lambda_q2 * self.lambda_k2
        wide = torch.promote_types(first.dtype, torch.float32)
        return first.sum(dtype=wide).exp() - second.sum(dtype=wide).exp() + self.start

    def mix(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, is_causal: bool) -> Tensor:
        """As SelfAttention's; all are (B, 2 H, T, K / 2), the two halves of a head next to each other."""
        half = query.shape[-1]
        query, key = F.pad(query, (0, half)), F.pad(key, (0, half))  # fused kernels want them as wide as values
        value = value.unflatten(1, (self.num_heads, 2)).transpose(2, 3).flatten(3)  # (B, H, S, K)
        value, scale = value.repeat_interleave(2, dim=1), half**-0.5
        both = F.scaled_dot_product_attention(query, key, value, seen, is_causal=is_causal, scale=scale)
        first, second = both.unflatten(1, (self.num_heads, 2)).unbind(2)
        mixed = first - self.weight().to(both.dtype) * second
        weight = None if self.norm.weight is None else self.norm.weight.to(mixed.dtype)  # of another one under autocast
        return F.rms_norm(mixed, self.norm.normalized_shape, weight, self.norm.eps) * (1 - self.start)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: BackboneConfig, causal: bool, index: int) -> None:
        super().__init__()
        self.attention_norm = layer_norm(config)
        if config.attention == "differential":
            self.attention: SelfAttention = DifferentialAttention(config, causal, index)
        else:
            self.attention = SelfAttention(config, causal)
        self.ffn_norm = layer_norm(config)
        if config.baseline is not None:
            self.ffn: nn.Module = MLP(config.dim, config.mlp_hidden, baseline_std(config, residual=True))
        else:
            self.ffn = projection(config, config.ffn_tokens, residual=True)
        self.drop_path = nn.Identity()  # vision puts stochastic depth here

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, chunk: Chunk | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.drop_path(self.attention(self.attention_norm(x), rotary, chunk))
        project = each if chunk is None else chunk.project
        return x + self.drop_path(project(self.ffn_norm(x), self.ffn)[0])


class Backbone(nn.Module):
    """`depth` blocks and the affine final norm.

    Attributes:
        checkpoint_activations: keep only each block's input for the backward pass and compute the rest again.
    """

    def __init__(self, config: BackboneConfig, causal: bool) -> None:
        super().__init__()
        self.rotary_dim = config.rotary_dim
        self.checkpoint_activations = False
        self.blocks = nn.ModuleList(Block(config, causal, i) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-5)

    def recompute_scores(self, enable: bool = True) -> None:
        """Set what :class:`Pattention` calls `recompute_scores` in all layers."""
        for module in self.modules():
            if isinstance(module, Pattention):
                module.recompute_scores = enable

    def matrix_params(self) -> int:
        """Parameters of the blocks that take part in matrix products as the model is now."""
        unused = sum(module.unused_params for module in self.modules() if isinstance(module, Pattention | MLP))
        return sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2) - unused

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). With a cache x is what follows on what that has read."""
        if cache is not None:
            return self._read_on(x, cache)
        rotary = rotary_tables(x.shape[1], self.rotary_dim, x.device) if self.rotary_dim else None
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary)
        return self.norm(x)

    @torch.no_grad()
    def _read_on(self, x: Tensor, cache: KVCache) -> Tensor:
        B, T, _ = x.shape
        chunk = Chunk(cache, B, T, x.device)
        rotary = None
        if self.rotary_dim:
            cos, sin = rotary_tables_at(chunk.positions, self.rotary_dim)
            rotary = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, T, R), the same for all heads
        for block in self.blocks:
            x = block(x, rotary, chunk)
        cache.lengths = [length + T for length in cache.lengths]
        return self.norm(x)
