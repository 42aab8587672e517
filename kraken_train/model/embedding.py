"""The token embedding and the head, which may be one matrix, whole or sharded over the ranks by rows of the vocabulary.

Sharded, each rank looks up the tokens and computes the logits of its own rows, and no rank ever holds the logits of all
(Megatron-LM, arXiv 1909.08053, section 3). The loss is the same; `kraken_train.model.cross_entropy` computes it.

Shapes: B batch, T tokens, E width of the embedding, V vocabulary size, v rows of it here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kraken_train.model.cross_entropy import CrossEntropy, Losses
from kraken_train.model.divergence import SoftTargets
from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.sharding import ShardedDim, UnitRange
from kraken_train.parallel.weight_role import WeightRole


class Vocabulary(nn.Module):
    """Holds the rows `rows` of a (V, E) matrix: of the embedding, of the head, or of both if they are tied."""

    weight_role = WeightRole.EMBEDDING

    def __init__(self, rows: UnitRange, width: int, communicator: Communicator) -> None:
        super().__init__()
        self.rows = rows
        self.sharded_dim = None if rows.is_whole else ShardedDim(rows, axis=0)
        self.communicator = communicator
        self.weight = nn.Parameter(torch.empty(rows.count, width))
        self.cross_entropy = CrossEntropy(rows, communicator)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, E)."""
        if self.rows.is_whole:
            return F.embedding(ids, self.weight)
        local, here = self.rows.local(ids)
        return self.communicator.all_reduce(F.embedding(local, self.weight) * here[..., None])

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, V), on every rank."""
        if self.rows.is_whole:
            return F.linear(hidden, self.weight)
        after = self.rows.total - self.rows.first - self.rows.count
        return self.communicator.all_reduce(F.pad(self.local_logits(hidden), (self.rows.first, after)))

    def losses(self, hidden: Tensor, targets: Tensor, z_weight: float, soft: SoftTargets | None = None) -> Losses:
        """The sums of `token_losses`, of the z-loss and of the divergence from `soft`, with gradients."""
        shared = hidden if self.rows.is_whole else self.communicator.copy_to_ranks(hidden)
        if soft is not None:
            soft = soft._replace(hidden=soft.hidden.flatten(0, 1))
        return self.cross_entropy.total(shared.flatten(0, 1), self.weight, targets.flatten(), z_weight, soft)

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies in nats (B, T), of at least float32 and without gradients; 0 where a target is `IGNORED`."""
        losses = self.cross_entropy.by_token(hidden.flatten(0, 1), self.weight, targets.flatten())
        return losses.view(targets.shape)

    def local_logits(self, hidden: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, v)."""
        return F.linear(self.communicator.copy_to_ranks(hidden), self.weight)
