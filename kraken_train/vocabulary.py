"""The token embedding and the head that is tied to it, whole or cut over the ranks by rows of the vocabulary.

Cut, each rank looks up the tokens and computes the logits of its own rows, and no rank ever holds the logits of all
(Megatron-LM, arXiv 1909.08053, section 3). The loss is the same.

Shapes: B batch, T tokens, D hidden size, V vocabulary size, v rows of it here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kraken_train.exchange import Exchange
from kraken_train.placement import Partition, Placement

IGNORED = -100  # a target that does not count, as in PyTorch


class Vocabulary(nn.Module):
    """Holds the rows `rows` of the (V, D) embedding."""

    def __init__(self, rows: Placement, hidden_size: int, exchange: Exchange) -> None:
        super().__init__()
        self.rows = rows
        self.partition = None if rows.is_whole else Partition(rows, axis=0)
        self.exchange = exchange
        self.weight = nn.Parameter(torch.empty(rows.count, hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        if self.rows.is_whole:
            return F.embedding(ids, self.weight)
        local, here = self.local_rows(ids)
        return self.exchange.reduce(F.embedding(local, self.weight) * here[..., None])

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V), on every rank."""
        if self.rows.is_whole:
            return F.linear(hidden, self.weight)
        after = self.rows.total - self.rows.first - self.rows.count
        return self.exchange.reduce(F.pad(self.local_logits(hidden), (self.rows.first, after)))

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropies in nats (B, T), of at least float32; 0 where a target is `IGNORED`."""
        if self.rows.is_whole:
            losses = F.cross_entropy(
                at_least_fp32(self.logits(hidden)).flatten(0, 1), targets.flatten(), ignore_index=IGNORED,
                reduction="none",
            )  # fmt: skip
            return losses.view(targets.shape)
        logits = at_least_fp32(self.local_logits(hidden))  # (B, T, v)
        # log sum_V exp = log sum over ranks of exp of each rank's own, relative to the largest of these.
        log_sums = logits.logsumexp(dim=-1)
        largest = self.exchange.maximum(log_sums)
        local, here = self.local_rows(targets)
        of_target = logits.gather(-1, local[..., None]).squeeze(-1) * here
        sums, of_target = self.exchange.reduce(torch.stack([(log_sums - largest).exp(), of_target]))
        return (largest + sums.log() - of_target) * (targets != IGNORED)

    def local_logits(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, v)."""
        return F.linear(self.exchange.broadcast(hidden), self.weight)

    def local_rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(index into the rows here, or 0; whether it is here) of token ids."""
        local = ids - self.rows.first
        here = (local >= 0) & (local < self.rows.count)
        return local * here, here


def at_least_fp32(logits: Tensor) -> Tensor:
    """The softmax over V is summed in fp32 even where the model computes in bf16."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
