"""Primitives whose weights are stacked over sub-layers, so that a device runs all of its sub-layers as one product.

Shapes: n sub-layers here, B batch, T tokens, S tokens seen so far (cache included), D hidden size, F FFN size,
H heads of a sub-layer, K head dimension. D = H K.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kraken_train.placement import Partition, Placement


class KeyValueStore(Protocol):
    """One layer's cache of keys and values during generation."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (rows, H, T, K) and returns all of (rows, H, S, K), the new tokens last."""
        ...


class StackedLinear(nn.Module):
    """n independent bias-free linear maps, (n, B, T, in) -> (n, B, T, out), as one batched product."""

    def __init__(self, placement: Placement, in_features: int, out_features: int) -> None:
        super().__init__()
        self.partition = Partition(placement, axis=0)
        self.weight = nn.Parameter(torch.empty(placement.count, out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        n, batch, tokens, _ = x.shape
        product = torch.bmm(x.reshape(n, batch * tokens, -1), self.weight.transpose(1, 2))
        return product.view(n, batch, tokens, -1)


class StackedLayerNorm(nn.Module):
    """n LayerNorms without bias over the last axis of (n, B, T, D)."""

    def __init__(self, placement: Placement, size: int, epsilon: float) -> None:
        super().__init__()
        self.partition = Partition(placement, axis=0)
        self.weight = nn.Parameter(torch.empty(placement.count, size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.epsilon) * self.weight[:, None, None, :]


class StackedAttention(nn.Module):
    """MHA_i(LN1_i(x_i)) of all sub-layers here, (n, B, T, D) -> (n, B, T, D)."""

    def __init__(self, placement: Placement, hidden_size: int, num_heads: int, norm_epsilon: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = StackedLayerNorm(placement, hidden_size, norm_epsilon)
        self.qkv = StackedLinear(placement, hidden_size, 3 * hidden_size)
        self.out = StackedLinear(placement, hidden_size, hidden_size)

    def forward(self, x: Tensor, cache: KeyValueStore | None = None) -> Tensor:
        n, batch, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).view(n * batch, tokens, -1)
        # To attention, sub-layers are more rows of the batch.
        heads = causal_attention(qkv, self.num_heads, cache)
        return self.out(heads.view(n, batch, tokens, width))


class StackedFFN(nn.Module):
    """FFN_i(LN2_i(u_i)) of all sub-layers here, (n, B, T, D) -> (n, B, T, D)."""

    def __init__(self, placement: Placement, hidden_size: int, ffn_size: int, norm_epsilon: float) -> None:
        super().__init__()
        self.norm = StackedLayerNorm(placement, hidden_size, norm_epsilon)
        self.up = StackedLinear(placement, hidden_size, ffn_size)
        self.down = StackedLinear(placement, ffn_size, hidden_size)

    def forward(self, u: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(u)), approximate="tanh"))


def causal_attention(qkv: Tensor, num_heads: int, cache: KeyValueStore | None = None) -> Tensor:
    """Causal multi-head attention of fused projections.

    `qkv` is (rows, T, 3 H K), queries first, then keys, then values. The result is (rows, T, H K). With a cache the
    T new tokens come after those that it holds and attend to them too.
    """
    rows, tokens, width = qkv.shape
    qkv = qkv.view(rows, tokens, 3, num_heads, width // (3 * num_heads))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (rows, H, T, K)
    if cache is not None:
        key, value = cache.append(key, value)
    seen = key.shape[2]
    if seen == tokens:
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    else:
        # Query t stands at position seen - tokens + t and sees all up to and including it.
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=qkv.device).tril(diagonal=seen - tokens)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return mixed.transpose(1, 2).reshape(rows, tokens, width // 3)
