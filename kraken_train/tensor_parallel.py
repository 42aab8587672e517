"""The baselines' linear maps, whole or cut over ranks as in Megatron-LM (arXiv 1909.08053, section 3).

The products before the non-linearity are cut by outputs, those after it by inputs; the exchange's `broadcast` stands
before the first and its `reduce` after the second. The modules are ours and not DTensors of PyTorch's
`parallelize_module`, because DeepSpeed's ZeRO moves parameters into flat buffers, which DTensors cannot follow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kraken_train.placement import Partition, Placement


class ColumnParallelLinear(nn.Linear):
    """(..., in) -> (..., the outputs here), without bias."""

    def __init__(self, in_features: int, outputs: Placement) -> None:
        super().__init__(in_features, outputs.count, bias=False)
        self.partition = Partition(outputs, axis=0)


class RowParallelLinear(nn.Linear):
    """(..., the inputs here) -> (..., out), this rank's part of the sum, without bias."""

    def __init__(self, inputs: Placement, out_features: int) -> None:
        super().__init__(inputs.count, out_features, bias=False)
        self.partition = Partition(inputs, axis=1)


class QKVLinear(nn.Module):
    """(..., in) -> (..., 3 x the outputs here): queries, keys and values, without bias.

    The three are an axis of their own, so that a rank's share of each is one range.
    """

    def __init__(self, in_features: int, outputs: Placement) -> None:
        super().__init__()
        self.partition = Partition(outputs, axis=1)
        self.weight = nn.Parameter(torch.empty(3, outputs.count, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(0, 1))
