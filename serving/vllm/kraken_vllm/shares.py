"""Which part of an exported weight a rank holds. Imports no vLLM.

vLLM gives whole tensors, which are views of a mapped safetensors file: only what is cut out of them is read.

Shapes: P ranks, N sub-layers, D hidden size, H heads of a sub-layer (of a layer in the baselines), G key-value heads of
it, K head dimension, K' >= K the head dimension of the attention kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """The part of rank `rank` of `size`."""

    rank: int
    size: int

    def of(self, count: int) -> int:
        """How many of `count` things the rank has; `size` divides `count`."""
        return count // self.size

    def along(self, full: Tensor, dim: int = 0) -> Tensor:
        count = self.of(full.shape[dim])
        return full.narrow(dim, self.rank * count, count)

    def kv_heads(self, total: int) -> int:
        """How many of `total` key-value heads; where ranks are more, several hold the same one."""
        return max(1, self.of(total))

    def heads_by_group(self, full: Tensor, head_dim: int) -> Tensor:
        """A baseline's QKV, (G, (H / G + 2) K, D) -> (g, (h + 2) K, D): h query heads for each of g key-value heads.

        Each key-value head stands behind the query heads that it serves. Where there are more ranks than key-value
        heads, P / G ranks hold the same one, and share its query heads.
        """
        groups = len(full)
        if groups >= self.size:
            return self.along(full)
        sharers = self.size // groups
        group = full[self.rank // sharers]
        queries, key_and_value = group[: -2 * head_dim], group[-2 * head_dim :]
        own = Share(self.rank % sharers, sharers).along(queries)
        return torch.cat([own, key_and_value])[None]


@dataclass(frozen=True)
class HeadPadding:
    """Appends zeros to heads, K -> K', as the attention kernel needs it; they change no result.

    With rotary embeddings value j is paired with value j + K/2, so that each half of a head gets its zeros.
    """

    head_dim: int
    kernel_dim: int
    in_halves: bool

    def pad(self, weight: Tensor, dim: int) -> Tensor:
        """Along `dim`: heads x K -> heads x K'."""
        if self.kernel_dim == self.head_dim:
            return weight
        pieces = 2 if self.in_halves else 1
        by_piece = weight.unflatten(dim, (-1, self.head_dim // pieces))
        shape = list(by_piece.shape)
        shape[dim + 1] = self.kernel_dim // pieces
        padded = by_piece.new_zeros(shape)
        padded.narrow(dim + 1, 0, self.head_dim // pieces).copy_(by_piece)
        result: Tensor = padded.flatten(dim, dim + 1)
        return result
