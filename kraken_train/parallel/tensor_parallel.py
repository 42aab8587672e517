"""The baselines' linear maps, whole or sharded over ranks as in Megatron-LM (arXiv 1909.08053, section 3).

The products before the non-linearity are sharded by outputs, those after it by inputs; `copy_to_ranks` comes before the
first and `all_reduce` after the second. The modules are ours and not DTensors of PyTorch's
`parallelize_module`, because DeepSpeed's ZeRO moves parameters into flat buffers, which DTensors cannot follow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kraken_train.parallel.sharding import KVGroupsDim, ShardedDim, UnitRange
from kraken_train.parallel.weight_role import WeightRole


class ColumnParallelLinear(nn.Linear):
    """(..., in) -> (..., the outputs here), without bias."""

    def __init__(self, in_features: int, outputs: UnitRange) -> None:
        super().__init__(in_features, outputs.count, bias=False)
        self.sharded_dim = ShardedDim(outputs, axis=0)


class RowParallelLinear(nn.Linear):
    """(..., the inputs here) -> (..., out), this rank's part of the sum, without bias."""

    def __init__(self, inputs: UnitRange, out_features: int) -> None:
        super().__init__(inputs.count, out_features, bias=False)
        self.sharded_dim = ShardedDim(inputs, axis=1)


class QKVLinear(nn.Module):
    """(B, T, in) -> queries (B, H, T, K), keys and values (B, G, T, K) of the groups here, without bias.

    A group is a key-value head with the heads that it serves. The weight is (G, rows, in); the rows of a group are its
    queries, key and value one after the other, as in Megatron-LM, so that a rank's share is one range.
    """

    weight_role = WeightRole.MATRIX

    def __init__(self, in_features: int, groups: UnitRange, heads_per_group: int, head_size: int) -> None:
        super().__init__()
        self.sharded_dim = KVGroupsDim(groups, axis=0, head_size=head_size)
        self.heads_per_group = heads_per_group
        self.head_size = head_size
        self.weight = nn.Parameter(torch.empty(groups.count, (heads_per_group + 2) * head_size, in_features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grouped = F.linear(x, self.weight.flatten(0, 1)).unflatten(-1, (len(self.weight), -1, self.head_size))
        by_head = grouped.permute(0, 2, 3, 1, 4)  # (B, G, H / G + 2, T, K)
        query, key, value = by_head.split((self.heads_per_group, 1, 1), dim=2)
        return query.flatten(1, 2), key.squeeze(2), value.squeeze(2)

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """Queries, keys and values of all groups; see `kraken_train.parallel.matrices`."""
        rows = [self.heads_per_group * self.head_size, self.head_size, self.head_size]
        return list(weight.split(rows, dim=1))
