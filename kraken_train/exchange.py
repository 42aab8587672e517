"""The seam between one process and many: how the ranks of a model copy exchange what they compute.

The model calls these operations and never asks how many processes there are. Each has a forward and a backward
meaning, so that an exchange over several ranks is a set of autograd functions (`kraken_train.distributed_exchange`)
and the model does not change:

| operation   | forward                                   | backward                                     |
|-------------|-------------------------------------------|----------------------------------------------|
| `broadcast` | hands the same value to every rank        | sums the gradient over all ranks             |
| `reduce`    | sums the ranks' parts                     | hands the gradient to every rank             |
| `start`     | begins the sum over all sub-layers        | waits for the gradient that `finish` began   |
| `finish`    | waits for the sum                         | begins the sum of the gradient               |
| `maximum`   | the largest of the ranks' values          | (has no gradient)                            |
| `gather`    | joins the ranks' parts                    | (has no gradient)                            |

`broadcast` and `reduce` are the f and g of Megatron-LM (arXiv 1909.08053, section 3); `start` and `finish` are
Kraken's AllReduce, cut in two so that the attention fits in between.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from kraken_train.placement import ModelRank


class Exchange(Protocol):
    """See the table above. Shapes: n sub-layers here, B batch, T tokens, D hidden size."""

    @property
    def model_rank(self) -> ModelRank:
        """This rank among those of the model copy."""
        ...

    def broadcast(self, shared: Tensor) -> Tensor:
        """The same value on every rank of a model copy, on to computations that differ between ranks."""
        ...

    def reduce(self, partial: Tensor) -> Tensor:
        """This rank's part of a sum -> the sum over all ranks; without gradients `partial` may be overwritten."""
        ...

    def start(self, streams: Tensor) -> Any:
        """(n, B, T, D) -> a handle for `finish`."""
        ...

    def finish(self, handle: Any) -> Tensor:
        """The handle of `start` -> (B, T, D), summed over all sub-layers of all ranks."""
        ...

    def maximum(self, values: Tensor) -> Tensor:
        """Element-wise over all ranks, without a gradient."""
        ...

    def gather(self, part: Tensor) -> Tensor:
        """(..., v) of each rank -> (..., P v) of all P ranks, in their order, without a gradient."""
        ...


class LocalExchange:
    """All of the model is in this process: the exchange is a sum over the leading axis."""

    model_rank = ModelRank()

    def broadcast(self, shared: Tensor) -> Tensor:
        return shared

    def reduce(self, partial: Tensor) -> Tensor:
        return partial

    def start(self, streams: Tensor) -> Tensor:
        return streams.sum(dim=0)

    def finish(self, handle: Tensor) -> Tensor:
        return handle

    def maximum(self, values: Tensor) -> Tensor:
        return values.detach()

    def gather(self, part: Tensor) -> Tensor:
        return part.detach()
