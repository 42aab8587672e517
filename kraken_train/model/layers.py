"""What layers are made of. A Kraken's weights are stacked over sub-layers, which a rank then runs as one product.

Shapes: n sub-layers here, B batch, T tokens, S tokens seen so far (cache included), D hidden size, F FFN size,
H heads of a sub-layer, G <= H key-value heads, each for H / G heads, K head dimension. D = H K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kraken_train.parallel.sharding import ShardedDim, UnitRange
from kraken_train.parallel.weight_role import WeightRole


class KeyValueStore(Protocol):
    """One layer's cache of keys and values during generation."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Adds the keys and values of T new tokens, (rows, G, T, K) each, and attends to all tokens so far.

        The queries (rows, H, T, K) are those of the new tokens, each of which sees itself and what came before it;
        the result is (rows, H, T, K).
        """
        ...


class Layer(nn.Module):
    """A layer of a model: `forward` states its formula and communicates between its parts.

    The parts are its children. They communicate nothing, so that each is compiled and computed again on its own.
    """

    recompute = False

    def run(self, part: nn.Module, *inputs: Any) -> Tensor:
        """A part's output; with `recompute` its activations are not kept but computed again in the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False))
        return cast(Tensor, part(*inputs))


class StackedLinear(nn.Module):
    """n independent bias-free linear maps, (n, B, T, in) -> (n, B, T, out), as one batched product.

    `fused` are the rows of each of the matrices that the weight of a sub-layer consists of, where these are several.
    """

    weight_role = WeightRole.STACKED_MATRIX

    def __init__(self, units: UnitRange, in_features: int, out_features: int, fused: Sequence[int] = ()) -> None:
        super().__init__()
        self.sharded_dim = ShardedDim(units, axis=0)
        self.fused = list(fused) or [out_features]
        self.weight = nn.Parameter(torch.empty(units.count, out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        n, batch, tokens, _ = x.shape
        if n == 1:  # an ordinary product, for which the libraries choose among more kernels
            return F.linear(x, self.weight[0])
        product = torch.bmm(x.reshape(n, batch * tokens, -1), self.weight.transpose(1, 2))
        return product.view(n, batch, tokens, -1)

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """See `kraken_train.parallel.matrices`."""
        return [matrix for of_sub_layer in weight for matrix in of_sub_layer.split(self.fused)]


class StackedLayerNorm(nn.Module):
    """n LayerNorms without bias over the last axis of (n, B, T, D)."""

    weight_role = WeightRole.NORM

    def __init__(self, units: UnitRange, size: int, epsilon: float) -> None:
        super().__init__()
        self.sharded_dim = ShardedDim(units, axis=0)
        self.weight = nn.Parameter(torch.empty(units.count, size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.epsilon) * self.weight[:, None, None, :]


class StackedAttention(nn.Module):
    """MHA_i(LN1_i(x_i)) of all sub-layers here, (n, B, T, D) -> (n, B, T, D)."""

    def __init__(self, units: UnitRange, hidden_size: int, num_heads: int, kv_heads: int, norm_epsilon: float) -> None:
        super().__init__()
        self.head_counts = (num_heads, kv_heads, kv_heads)  # of queries, keys, values
        self.head_dim = hidden_size // num_heads
        self.norm = StackedLayerNorm(units, hidden_size, norm_epsilon)
        sizes = [count * self.head_dim for count in self.head_counts]
        self.qkv = StackedLinear(units, hidden_size, sum(sizes), fused=sizes)
        self.out = StackedLinear(units, hidden_size, hidden_size)

    def forward(self, x: Tensor, cache: KeyValueStore | None = None) -> Tensor:
        n, batch, tokens, width = x.shape
        # To attention, sub-layers are more rows of the batch.
        qkv = self.qkv(self.norm(x)).view(n * batch, tokens, -1, self.head_dim)
        query, key, value = qkv.transpose(1, 2).split(self.head_counts, dim=1)
        attended: Tensor = self.out(causal_attention(query, key, value, cache).view(n, batch, tokens, width))
        return attended


class StackedFFN(nn.Module):
    """x_i + a_i + FFN_i(LN2_i(a_i + s)) of all sub-layers here, each (n, B, T, D), but s (B, T, D).

    The sums belong to it so that compilation can fuse them with the norm and with each other.
    """

    def __init__(self, units: UnitRange, hidden_size: int, ffn_size: int, norm_epsilon: float) -> None:
        super().__init__()
        self.norm = StackedLayerNorm(units, hidden_size, norm_epsilon)
        self.up = StackedLinear(units, hidden_size, ffn_size)
        self.down = StackedLinear(units, ffn_size, hidden_size)

    def forward(self, streams: Tensor, attended: Tensor, total: Tensor) -> Tensor:
        inner = F.gelu(self.up(self.norm(attended + total)), approximate="tanh")
        result: Tensor = streams + attended + self.down(inner)
        return result


def causal_attention(query: Tensor, key: Tensor, value: Tensor, cache: KeyValueStore | None = None) -> Tensor:
    """Causal attention of queries (rows, H, T, K) to keys and values (rows, G, T, K) -> (rows, T, H K).

    Head h attends to key-value head h // (H / G). With a cache the T new tokens come after those that it holds and
    attend to them too.
    """
    mixed = attend_causally(query, key, value) if cache is None else cache.attend(query, key, value)
    return mixed.transpose(1, 2).flatten(2)


def attend_causally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Queries (rows, H, T, K), keys and values (rows, G, T, K) of the same tokens -> (rows, H, T, K)."""
    heads_per_group = query.shape[1] // key.shape[1]
    if heads_per_group > 1 and query.dtype not in (torch.bfloat16, torch.float16):
        # Fused kernels share key-value heads in 16 bits only; without one, all scores would be held at once.
        key, value = (shared.repeat_interleave(heads_per_group, dim=1) for shared in (key, value))
        heads_per_group = 1
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads_per_group > 1)
