"""A plain GPT, the architecture of nanoGPT and GPT-2 without biases: what a language model is measured against.

B batch, T sequence, D channels, H heads, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal attention, query, key and value in one product."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, H, D / H)
        mixed = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4), is_causal=True)  # (B, H, T, D / H)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.attention = Attention(dim, num_heads)
        self.up, self.down = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Loss(nn.Module):
    """Cross-entropy of the logits of the normed tokens; a module, so that torch.compile makes few kernels of it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, bias=False)

    def forward(self, x: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
        """(B, T, D), (V, D), (B, T) -> scalar, in nats."""
        logits = F.linear(self.norm(x), embedding)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class GPT(nn.Module):
    """Learned positions, blocks, final norm; the output matrix is the embedding.

    Args:
        vocab_size: V.
        seq_len: the longest T.
        depth: blocks.
        dim: D.
        num_heads: H.
        hidden: width of the feed-forward layer; GPT-2's is 4 D.
    """

    def __init__(self, vocab_size: int, seq_len: int, depth: int, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocab_size, dim), nn.Embedding(seq_len, dim)
        self.blocks = nn.Sequential(*(Block(dim, num_heads, hidden) for _ in range(depth)))
        self.loss = Loss(dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T) given ids (B, T)."""
        x = self.embedding(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return self.loss(self.blocks(x), self.embedding.weight, targets)

    def compile_parts(self) -> None:
        """Compile each block, which share a graph, and the loss: as fast as the whole, and sooner."""
        for part in (*self.blocks, self.loss):
            part.compile(dynamic=False)
