"""What a causal model keeps of the tokens that it has read.

B rows, T new tokens, S tokens of the cache, H heads, K channels of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenformer.decoding import each, join
from tokenformer.operator import autocast_dtype


class KVCache:
    """Keys and values of the tokens that a causal model has read, so that reading on costs the new tokens alone.

    Each row stands at a place of its own. So texts of different lengths are read together with padding on the right,
    and then `lengths` is set back to the true ones: what lies behind is not seen, and is written over.

    Args:
        batch_size: rows, B.
        max_len: tokens of a row that there is room for.
        joins: read single tokens with layers of the same input as one, which takes less time. The model must stay as it
            is from the first of them on.

    Attributes:
        lengths: how many tokens each row has read.
        layers: keys and values (B, H, max_len, K) of each attention layer, made when it reads the first tokens.
        joined: what computes layers of the same input, made when they read the first single token.

    Example:
        >>> cache = model.new_cache(batch_size=2)
        >>> model(ids[:, :100], cache)
        >>> model(ids[:, 100:], cache)  # equals model(ids)[:, 100:]
    """

    def __init__(self, batch_size: int, max_len: int, joins: bool = False) -> None:
        self.max_len, self.joins = max_len, joins
        self.lengths = [0] * batch_size
        self.layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.joined: dict[tuple[nn.Module, ...], Callable[[Tensor], list[Tensor]]] = {}

    def keep(self, rows: list[int]) -> None:
        """Forget all other rows."""
        self.lengths = [self.lengths[row] for row in rows]
        self.layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.layers.items()}


class Chunk:
    """The next tokens of each row of a cache: where they go, and what they see.

    Raises:
        ValueError: when the cache has no room for them, or other rows.

    Attributes:
        positions: of the tokens in their rows, (B, T).
        end: places of the cache that are in use afterwards, S.
        seen: which of them each token attends to, (B, 1, T, S); None for the first chunk of all, which is causal.
    """

    def __init__(self, cache: KVCache, batch_size: int, num_tokens: int, device: torch.device) -> None:
        self.cache = cache
        if batch_size != len(cache.lengths):
            raise ValueError(f"a batch of {batch_size} rows for a cache of {len(cache.lengths)}")
        self.end = max(cache.lengths) + num_tokens
        if self.end > cache.max_len:
            raise ValueError(
                f"{num_tokens} tokens after {max(cache.lengths)} are {self.end}, more than the {cache.max_len} of the "
                "cache, at most max_seq_len: read fewer, or begin a new cache with the end of the text"
            )
        starts = torch.tensor(cache.lengths, device=device).unsqueeze(1)
        self.positions = starts + torch.arange(num_tokens, device=device)
        self.seen = None
        if max(cache.lengths) > 0:
            self.seen = (torch.arange(self.end, device=device) <= self.positions.unsqueeze(-1)).unsqueeze(1)

    def extend(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values (B, H, T, K) to the cache; return all that it has, (B, H, S, K)."""
        if layer not in self.cache.layers:
            B, H, _, K = key.shape
            # Zeros: what is behind a row's end counts nothing, but nothing times NaN would be NaN.
            keys, values = (new.new_zeros(B, H, self.cache.max_len, K) for new in (key, value))
            self.cache.layers[layer] = keys, values
        keys, values = self.cache.layers[layer]
        rows = torch.arange(len(key), device=key.device).unsqueeze(1)  # (B, 1)
        for cached, new in ((keys, key), (values, value)):
            cached[rows, :, self.positions] = new.transpose(1, 2)  # (B, T, H, K)
        return keys[:, :, : self.end], values[:, :, : self.end]

    def project(self, x: Tensor, *layers: nn.Module) -> list[Tensor]:
        """What layers give for the same x, (B, T, D) each."""
        if not self.cache.joins or x.shape[1] != 1 or autocast_dtype(x.device) is not None:
            return each(x, *layers)
        if layers not in self.cache.joined:
            self.cache.joined[layers] = join(*layers)
        return self.cache.joined[layers](x)
