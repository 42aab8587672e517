"""The communication of a model copy, behind one interface for one process and for many ranks.

The model calls these operations and does not depend on the number of ranks. Each has a forward and a backward meaning;
over several ranks they are autograd functions (`kraken_train.parallel.distributed`):

| operation          | forward                                    | backward                                      |
|--------------------|--------------------------------------------|-----------------------------------------------|
| `copy_to_ranks`    | identity: the value is equal on all ranks  | sums the gradient over the ranks              |
| `all_reduce`       | sums the ranks' partial values             | identity                                      |
| `start_all_reduce` | launches the sum over all sub-layers       | waits for the gradient's sum                  |
| `wait`             | waits for the sum                          | launches the sum of the gradient              |
| `maximum`          | the element-wise maximum over the ranks    | (no gradient)                                 |
| `gather`           | concatenates the ranks' parts              | (no gradient)                                 |

`copy_to_ranks` and `all_reduce` are the f and g of Megatron-LM (arXiv 1909.08053, section 3). `start_all_reduce` and
`wait` are Kraken's AllReduce in two halves; the attention runs between them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from kraken_train.parallel.sharding import ModelRank


class Communicator(Protocol):
    """See the table above. Shapes: n sub-layers here, B batch, T tokens, D hidden size."""

    @property
    def model_rank(self) -> ModelRank:
        """This rank among those of the model copy."""
        ...

    def copy_to_ranks(self, shared: Tensor) -> Tensor:
        """A value that is equal on all ranks -> the same value, for computations that differ between ranks."""
        ...

    def all_reduce(self, partial: Tensor) -> Tensor:
        """This rank's partial value -> the sum over all ranks; without gradients `partial` may be overwritten."""
        ...

    def start_all_reduce(self, streams: Tensor) -> Any:
        """(n, B, T, D) -> a handle for `wait`."""
        ...

    def wait(self, handle: Any) -> Tensor:
        """The handle of `start_all_reduce` -> (B, T, D), summed over all sub-layers of all ranks."""
        ...

    def reduction_dtype(self, tensor: Tensor) -> torch.dtype:
        """The format in which sums of such tensors are computed."""
        ...

    def maximum(self, values: Tensor) -> Tensor:
        """Element-wise over all ranks, without a gradient."""
        ...

    def gather(self, part: Tensor) -> Tensor:
        """(..., v) of each rank -> (..., P v) of all P ranks, in their order, without a gradient."""
        ...


class LocalCommunicator:
    """The whole model is in this process: the all-reduce is a sum over the leading axis."""

    model_rank = ModelRank()

    def copy_to_ranks(self, shared: Tensor) -> Tensor:
        return shared

    def all_reduce(self, partial: Tensor) -> Tensor:
        return partial

    def start_all_reduce(self, streams: Tensor) -> Tensor:
        return streams.sum(dim=0)

    def wait(self, handle: Tensor) -> Tensor:
        return handle

    def reduction_dtype(self, tensor: Tensor) -> torch.dtype:
        return tensor.dtype

    def maximum(self, values: Tensor) -> Tensor:
        return values.detach()

    def gather(self, part: Tensor) -> Tensor:
        return part.detach()
