"""The seam between one process and many: how sub-layers exchange their residual streams.

The model calls these four operations and never asks how many processes there are. Each has a forward and a backward
meaning, so that an exchange over several ranks is a set of autograd functions and the model does not change:

| operation   | forward                                   | backward                                     |
|-------------|-------------------------------------------|----------------------------------------------|
| `broadcast` | the embedding, to the sub-layers here     | sums the gradient over all ranks             |
| `start`     | begins the sum over all sub-layers        | waits for the gradient that `finish` began   |
| `finish`    | waits for the sum                         | begins the sum of the gradient               |
| `reduce`    | sums the ranks' parts of the conjunction  | hands the gradient to every rank             |
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Exchange(Protocol):
    """See the table above. Shapes: n sub-layers here, B batch, T tokens, D hidden size."""

    def broadcast(self, embedding: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), the same on every rank of a model copy."""
        ...

    def start(self, streams: Tensor) -> Any:
        """(n, B, T, D) -> a handle for `finish`."""
        ...

    def finish(self, handle: Any) -> Tensor:
        """The handle of `start` -> (B, T, D), summed over all sub-layers of all ranks."""
        ...

    def reduce(self, partial: Tensor) -> Tensor:
        """(B, T, D), summed over the sub-layers here -> (B, T, D), summed over all ranks."""
        ...


class LocalExchange:
    """All sub-layers are in this process: the exchange is a sum over the leading axis."""

    def broadcast(self, embedding: Tensor) -> Tensor:
        return embedding

    def start(self, streams: Tensor) -> Tensor:
        return streams.sum(dim=0)

    def finish(self, handle: Tensor) -> Tensor:
        return handle

    def reduce(self, partial: Tensor) -> Tensor:
        return partial
