"""Sizes of a model, and what follows from them: parameters and FLOPs. All exact, none needs the model.

D (`dim`) channels, H (`num_heads`) heads, N (`*_tokens`) parameter tokens per Pattention, T sequence length.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from tokenformer.pattention import WEIGHT_SECOND_MOMENT, ScoreNorm, TauMode


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What language and vision share: a stack of pre-norm blocks.

    Attributes:
        depth: number of blocks, L.
        dim: channels, D.
        num_heads: attention heads, H; must divide `dim`.
        qkv_tokens: parameter tokens of each of the query, key and value projections.
        proj_tokens: parameter tokens of the attention's output projection.
        ffn_tokens: parameter tokens of the feed-forward layer.
        score_norm: normalisation of the scores between input and parameter tokens; published models: l2_norm_gelu.
        scale: tau, the factor after that normalisation. fixed (published models), learned (one trained scalar a
            layer), or current (follows the number of tokens when it grows, as the released code does; not exact).
        init: official (keys N(0, 0.02), values N(0, 2/(L sqrt D)), as released), or scaled (values so that a layer's
            output has an RMS of 0.11 in query, key and value and 0.02 in what is added to the residual stream,
            whatever depth, width and number of tokens).
        norm_affine: give the blocks' LayerNorms a learned weight and bias (published models: false).
        rotary_fraction: part of each head's channels that rotary embeddings turn; 0 for no position information.
        baseline: build the twin with linear projections, a plain Transformer: `width`, of equal width (feed-forward
            4 x dim), or `parameters`, of equal width and equal parameter count (wider feed-forward). The twin ignores
            `*_tokens` but for that count, and `score_norm`, `scale` and `init`.
    """

    depth: int = 12
    dim: int = 768
    num_heads: int = 12
    qkv_tokens: int = 576
    proj_tokens: int = 576
    ffn_tokens: int = 2304
    score_norm: ScoreNorm = "l2_norm_gelu"
    scale: TauMode = "fixed"
    init: Literal["official", "scaled"] = "official"
    norm_affine: bool = False
    rotary_fraction: float = 0.25
    baseline: Literal["width", "parameters"] | None = None

    def __post_init__(self) -> None:
        for name in ("depth", "dim", "num_heads", "qkv_tokens", "proj_tokens", "ffn_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.dim % self.num_heads:
            divisors = [h for h in range(1, self.dim + 1) if self.dim % h == 0]
            nearest = min(divisors, key=lambda h: abs(h - self.num_heads))
            raise ValueError(
                f"num_heads={self.num_heads} does not divide dim={self.dim}: the nearest that does is {nearest}"
            )
        choices = {
            "score_norm": tuple(WEIGHT_SECOND_MOMENT),
            "scale": ("fixed", "learned", "current"),
            "init": ("official", "scaled"),
            "baseline": (None, "width", "parameters"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, allowed))}")
        if not 0 <= self.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction={self.rotary_fraction}: must be between 0 and 1")
        size = self.rotary_fraction * self.head_dim
        if size != int(size) or int(size) % 2:
            raise ValueError(
                f"rotary_fraction={self.rotary_fraction} of head_dim={self.head_dim} (dim={self.dim} / "
                f"num_heads={self.num_heads}) is {size:g} channels: rotation needs an even number; "
                f"try {2 * round(size / 2) / self.head_dim:g}"
            )
        if self.baseline == "parameters" and self.mlp_hidden < 1:
            raise ValueError(
                f"baseline='parameters': the attention of a Transformer of dim={self.dim} alone has more parameters "
                "than this TokenFormer; use fewer channels, more tokens, or baseline='width'"
            )

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.rotary_fraction * self.head_dim)

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the baseline's feed-forward layer.

        A token costs 2 D parameters, as does a hidden unit; the four D x D projections take the place of 2 D tokens.
        """
        if self.baseline == "parameters":
            return 3 * self.qkv_tokens + self.proj_tokens + self.ffn_tokens - 2 * self.dim
        return 4 * self.dim

    def block_matmul_params(self) -> int:
        """Parameters of a block that take part in matrix products: 2 D (3 n_qkv + n_o + n_ff), paper T3."""
        if self.baseline is not None:
            return 4 * self.dim**2 + 2 * self.dim * self.mlp_hidden
        return 2 * self.dim * (3 * self.qkv_tokens + self.proj_tokens + self.ffn_tokens)

    def backbone_params(self) -> int:
        """Parameters of all blocks, their norms and learned taus too."""
        norms = 4 * self.dim if self.norm_affine else 0
        taus = 5 if self.scale == "learned" and self.baseline is None else 0
        return self.depth * (self.block_matmul_params() + norms + taus)

    def backbone_flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of all blocks per input token: 2 per parameter, and 4 L D T between tokens (paper T3)."""
        return self.depth * (2 * self.block_matmul_params() + 4 * self.dim * seq_len)

    def value_std(self, num_tokens: int, residual: bool) -> float:
        """Standard deviation of the value tokens of a Pattention at initialisation.

        Args:
            num_tokens: N of the layer.
            residual: whether the layer's output is added to the residual stream.
        """
        if self.init == "official":
            return 2 / (self.depth * math.sqrt(self.dim))
        rms = 0.02 if residual else 0.11
        return rms / math.sqrt(WEIGHT_SECOND_MOMENT[self.score_norm] * num_tokens)

    @property
    def key_std(self) -> float:
        """Standard deviation of key tokens at initialisation. The norm makes the output independent of it."""
        return 0.02 if self.init == "official" else 0.05


@dataclass(frozen=True, kw_only=True)
class LMConfig(BackboneConfig):
    """A causal language model (paper section 4.1 and table 9).

    Attributes:
        vocab_size: token ids are 0 .. vocab_size - 1.
        vocab_multiple: the embedding has rows up to a multiple of this, which matrix products like; the rows past
            `vocab_size` are never seen. (GPT-NeoX: 50277 entries, multiple 128, 50304 rows.)
        max_seq_len: the longest sequence that the model is trained on.
        tie_embeddings: use the input embedding as the output matrix too.
    """

    vocab_size: int = 50304
    vocab_multiple: int = 1
    max_seq_len: int = 1024
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "vocab_multiple", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def num_params(self) -> int:
        """Trainable parameters of the model: blocks, embeddings and the final norm."""
        embeddings = (1 if self.tie_embeddings else 2) * self.padded_vocab_size * self.dim
        return self.backbone_params() + embeddings + 2 * self.dim

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """FLOPs of a forward pass per token, of matrix products, at sequence length `seq_len` (paper T3).

        Attention between tokens counts all T x T pairs, masked or not, as the paper does. The output matrix counts
        with the rows that are used. A training step takes three times this (backward: two), without recomputation.

        Args:
            seq_len: T, default `max_seq_len`.
        """
        return self.backbone_flops_per_token(seq_len or self.max_seq_len) + 2 * self.vocab_size * self.dim


Config = TypeVar("Config", bound=BackboneConfig)


def widened(config: Config, factor: int) -> Config:
    """The config of a baseline with `factor` times the channels, heads and hidden units."""
    sizes = ("dim", "num_heads", "qkv_tokens", "proj_tokens", "ffn_tokens")  # the counts set its hidden units
    return replace(config, **{name: factor * getattr(config, name) for name in sizes})
