"""The head at inference: each rank computes the logits of its share of the vocabulary.

Shapes: B sequences, D hidden size, V vocabulary size, P ranks, v = ceil(V / P) rows of the head on each of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kraken_train.parallel.communicator import Communicator


class MostLikely(NamedTuple):
    """The token of the largest logit of each sequence; of equal ones that of the smallest id."""

    ids: Tensor  # (B,) int64
    finite: Tensor  # (B,) bool: whether all logits of the sequence are; if not, the id means nothing

    @classmethod
    def unpack(cls, winners: Tensor) -> MostLikely:
        """Of `ShardedHead.most_likely`."""
        return cls(winners[:, 1].long(), winners[:, 0].isfinite())


class ShardedHead:
    """`weight` (V, D) is whole on each rank, which computes the logits of its rows."""

    def __init__(self, weight: Tensor, communicator: Communicator) -> None:
        place = communicator.model_rank
        self.communicator = communicator
        self.vocab_size = len(weight)
        self.rows = -(-len(weight) // place.size)  # on the last ranks there may be fewer
        self.first = place.rank * self.rows
        self.weight = weight[self.first :][: self.rows]
        exact_ids = torch.float32 if self.vocab_size <= 2**24 else torch.float64
        self.exchanged_dtype = torch.promote_types(weight.dtype, exact_ids)
        self.columns = torch.arange(self.first, self.first + self.rows, device=weight.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, D) -> (B, V)."""
        return self.communicator.gather(self.part(hidden))[:, : self.vocab_size]

    def part(self, hidden: Tensor) -> Tensor:
        """(B, D) -> (B, v); gathered parts must have one size, so that zeros fill it up."""
        part = F.linear(hidden, self.weight)
        missing = self.rows - len(self.weight)
        return F.pad(part, (0, missing)) if missing else part

    def most_likely(self, hidden: Tensor, limit: Tensor) -> Tensor:
        """(B, D) and the number of words, of which one is chosen -> (B, 2): the largest logit and its id.

        Each rank contributes the largest of its logits, or NaN where not all of them are finite, which also wins. The
        type holds the values and the ids exactly.
        """
        part = self.part(hidden)
        finite = part.isfinite().all(dim=-1)
        part = part.masked_fill(self.columns >= limit, -torch.inf)
        index = part.argmax(dim=-1, keepdim=True)  # the first of equal ones
        value = part.gather(-1, index)[:, 0].to(self.exchanged_dtype).masked_fill(~finite, torch.nan)
        own = torch.stack([value, (self.first + index[:, 0]).to(value.dtype)], dim=-1)
        every = self.communicator.gather(own).unflatten(-1, (-1, 2))  # (B, P, 2), in the order of the vocabulary
        best = every[..., 0].argmax(dim=-1)
        pair: Tensor = every.gather(1, best[:, None, None].expand(-1, 1, 2))[:, 0]
        return pair
