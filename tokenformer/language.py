"""TokenFormerLM: a causal language model whose every projection is a Pattention.

B batch, T sequence, D channels, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenformer.backbone import Backbone
from tokenformer.cache import KVCache
from tokenformer.config import LMConfig
from tokenformer.loss import linear_cross_entropy, token_nats_and_entropy


class TokenFormerLM(nn.Module):
    """Embedding, backbone, final norm, output matrix (tied to the embedding by default).

    Initialisation, a table of standard deviations of normal distributions (a test reads it):

        what                              init: official    init: scaled
        embedding, lm_head                0.02              0.02
        keys                              0.02              0.05
        values of query, key, value       2/(L sqrt D)      0.11/sqrt(0.425 N)
        values of out, ffn                2/(L sqrt D)      0.02/sqrt(0.425 N)
        baseline: query, key, value, up   0.02              0.02
        baseline: out, down               0.02/sqrt(2 L)    0.02/sqrt(2 L)

    Example:
        >>> model = TokenFormerLM(LMConfig(vocab_size=257, depth=2, dim=64, num_heads=4))
        >>> logits = model(torch.zeros(1, 8, dtype=torch.long))  # (1, 8, 257)
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.dim)
        self.backbone = Backbone(config, causal=True)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.padded_vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=0.02)

    @property
    def output_weight(self) -> Tensor:
        """(V, D), the rows of the output matrix that stand for token ids."""
        weight = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        return weight[: self.config.vocab_size]

    def new_cache(self, batch_size: int = 1, max_len: int | None = None, joins: bool = False) -> KVCache:
        """A cache for texts that are read in parts.

        Args:
            batch_size: how many texts are read together.
            max_len: tokens of the longest; default: `max_seq_len`.
            joins: read single tokens in less time; the model must stay as it is, see :class:`KVCache`.

        Raises:
            ValueError: for texts longer than the model's context.
        """
        context = self.config.max_seq_len
        if max_len is not None and max_len > context:
            raise ValueError(f"{max_len} tokens are past the model's context, max_seq_len={context}: ask for fewer")
        # Of FSDP2's weights a process has a part, and the others only as long as their block runs; those in int8 are in
        # the model's dtype no longer than that.
        joins = joins and all(type(p) is nn.Parameter for p in self.parameters())
        return KVCache(batch_size, max_len or context, joins)

    def hidden(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Ids (B, T) -> final hidden states (B, T, D). With a cache they follow on what that has read: no gradient."""
        return self.backbone(self.embedding(input_ids), cache)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, only_at: Tensor | None = None) -> Tensor:
        """Ids (B, T) -> logits (B, T, V).

        Args:
            input_ids: the text, or what follows on what `cache` has read.
            cache: of :meth:`new_cache`.
            only_at: one place of each row, (B,), to give only its logits, (B, V).
        """
        hidden = self.hidden(input_ids, cache)
        if only_at is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), only_at]  # (B, D)
        return F.linear(hidden, self.output_weight)

    def loss(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets (B, T) given ids (B, T), without the full logits; -100 is ignored."""
        return linear_cross_entropy(self.hidden(input_ids).flatten(0, 1), self.output_weight, targets.flatten())

    def nats_and_entropy(self, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each target and entropy of each prediction, both (B, T), in nats; 0 where ignored."""
        hidden = self.hidden(input_ids).flatten(0, 1)
        nats, entropy = token_nats_and_entropy(hidden, self.output_weight, targets.flatten())
        return nats.view_as(targets), entropy.view_as(targets)

    def num_params(self) -> int:
        """Parameters as the model is now, growth included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs as the model is now, growth included; counted as in :meth:`LMConfig.flops_per_token`."""
        between_tokens = self.config.flops_between_tokens(seq_len)
        return 2 * self.backbone.matrix_params() + between_tokens + 2 * self.config.vocab_size * self.config.dim
