"""Sizes of a model, and what follows from them: parameters and FLOPs. All exact, none needs the model.

D (`dim`) channels, H (`num_heads`) heads, N (`*_tokens`) parameter tokens per Pattention, T sequence length.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from tokenformer.operator import WEIGHT_SECOND_MOMENT, ScoreNorm
from tokenformer.pattention import TauMode


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
        attention: between the tokens of a sequence: softmax (published models), or differential (Ye et al. 2024: the
            difference of two softmax maps, each of half of a head's channels, with a learned weight).
        baseline: build a plain Transformer, with linear projections: `width`, of equal width (feed-forward
            4 x dim), or `parameters`, of equal width and equal parameter count (wider feed-forward). It ignores
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
    attention: Literal["softmax", "differential"] = "softmax"
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
            "attention": ("softmax", "differential"),
            "baseline": (None, "width", "parameters"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, allowed))}")
        if not 0 <= self.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction={self.rotary_fraction}: must be between 0 and 1")
        if self.head_dim % self.maps_per_head:
            raise ValueError(
                f"attention='differential': head_dim={self.head_dim} (dim={self.dim} / num_heads={self.num_heads}) is "
                "odd, and each of the two maps of a head has half of it; use another num_heads"
            )
        size = self.rotary_fraction * self.map_dim
        if size != int(size) or int(size) % 2:
            head = f"head_dim={self.head_dim} (dim={self.dim} / num_heads={self.num_heads})"
            raise ValueError(
                f"rotary_fraction={self.rotary_fraction} of {'half of ' if self.maps_per_head == 2 else ''}{head} is "
                f"{size:g} channels: rotation needs an even number; try {2 * round(size / 2) / self.map_dim:g}"
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
    def maps_per_head(self) -> int:
        """Attention maps of a head."""
        return 2 if self.attention == "differential" else 1

    @property
    def map_dim(self) -> int:
        """Channels of queries and keys in a map."""
        return self.head_dim // self.maps_per_head

    @property
    def rotary_dim(self) -> int:
        """Those of them that are rotated."""
        return int(self.rotary_fraction * self.map_dim)

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
        weights = 4 * self.map_dim + self.norm_affine * self.head_dim if self.attention == "differential" else 0
        return self.depth * (self.block_matmul_params() + norms + taus + weights)

    def backbone_flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of all blocks per input token: 2 per parameter, and those between tokens."""
        return 2 * self.depth * self.block_matmul_params() + self.flops_between_tokens(seq_len)

    def flops_between_tokens(self, seq_len: int) -> int:
        """Forward FLOPs of attention per input token: 4 L D T (paper T3).

        Twice as many where it is differential: two maps, each computed as one of whole heads.
        """
        return 4 * self.depth * self.maps_per_head * self.dim * seq_len

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


@dataclass(frozen=True, kw_only=True)
class ViTConfig(BackboneConfig):
    """An image classifier (paper section 4.2 and table 9). P patches of an image, T = P or P + 1 tokens.

    Attributes:
        image_size: height and width that position embeddings are made for; others are resampled to.
        patch_size: height and width of a patch; must divide `image_size`.
        in_channels: of an image.
        num_classes: outputs; 0 for a model without classifier.
        pool: what is classified: token (a learned token in front of the patches) or avg (the mean over patches).
        position: learned, or sincos (fixed sines and cosines in two dimensions).
        drop_path: rate of stochastic depth in the last block; it rises linearly from 0 in the first.
    """

    rotary_fraction: float = 0.0
    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000
    pool: Literal["token", "avg"] = "token"
    position: Literal["learned", "sincos"] = "learned"
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("image_size", 1), ("patch_size", 1), ("in_channels", 1), ("num_classes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}: the nearest size is "
                f"{max(1, round(self.image_size / self.patch_size)) * self.patch_size}"
            )
        for name, allowed in {"pool": ("token", "avg"), "position": ("learned", "sincos")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}: must be at least 0 and below 1")
        if self.position == "sincos" and self.dim % 4:
            raise ValueError(f"position='sincos': dim={self.dim} must be a multiple of 4")

    @property
    def grid(self) -> int:
        """Patches in a row of an image."""
        return self.image_size // self.patch_size

    def num_tokens(self, image_size: int | None = None) -> int:
        """T of an image: its patches, and the class token."""
        return ((image_size or self.image_size) // self.patch_size) ** 2 + (self.pool == "token")

    def num_params(self) -> int:
        """Trainable parameters: blocks, patch and position embeddings, class token, final norm, classifier."""
        patches = self.in_channels * self.patch_size**2 * self.dim + self.dim
        positions = self.num_tokens() * self.dim if self.position == "learned" else 0
        class_token = self.dim if self.pool == "token" else 0
        head = (self.dim + 1) * self.num_classes
        return self.backbone_params() + patches + positions + class_token + 2 * self.dim + head

    def flops_per_image(self, image_size: int | None = None) -> int:
        """FLOPs of a forward pass, of matrix products (paper T3, and those of patch embedding and classifier).

        Args:
            image_size: default: the config's.
        """
        tokens = self.num_tokens(image_size)
        patches = tokens - (self.pool == "token")
        embedding = 2 * patches * self.in_channels * self.patch_size**2 * self.dim
        return tokens * self.backbone_flops_per_token(tokens) + embedding + 2 * self.dim * self.num_classes


Config = TypeVar("Config", bound=BackboneConfig)


def widened(config: Config, factor: int) -> Config:
    """The config of a baseline with `factor` times the channels, heads and hidden units."""
    sizes = ("dim", "num_heads", "qkv_tokens", "proj_tokens", "ffn_tokens")  # the counts set its hidden units
    return replace(config, **{name: factor * getattr(config, name) for name in sizes})
