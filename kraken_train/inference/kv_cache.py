"""Keys and values of the tokens so far, so that each new token costs one token's work.

Shapes: rows are batch times sub-layers, H heads of a sub-layer, K head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kraken_train.model import LanguageModel


class KVCache:
    """One layer's cache, allocated once for `capacity` tokens (a `layers.KeyValueStore`)."""

    def __init__(
        self, rows: int, heads: int, capacity: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.empty(rows, heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # tokens held

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = query.shape[2]
        key, value = self.append(key, value)
        # Query t stands at position seen - tokens + t and sees all up to and including it.
        seen = key.shape[2]
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=query.device).tril(diagonal=seen - tokens)
        grouped = key.shape[1] != query.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (rows, H, T, K) and returns views of all of (rows, H, length, K). Raises ValueError if it is full."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache for {self.capacity}")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def make_caches(model: LanguageModel, batch_size: int, capacity: int) -> list[KVCache]:
    """An empty cache for each layer of the sub-layers that live here."""
    rows, heads, head_dim = model.cache_shape
    weight = model.token_embedding.weight
    return [
        KVCache(rows * batch_size, heads, capacity, head_dim, dtype=weight.dtype, device=weight.device)
        for _ in range(model.num_layers)
    ]
