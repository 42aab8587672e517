"""The cross-entropy after a linear head, in chunks of tokens, so that the logits of all tokens never exist at once.

The gradient needs the logits again. They are neither kept nor computed twice: the forward pass computes the gradient of
each chunk together with its loss, and the backward pass only multiplies it (Liger Kernel, arXiv 2410.10989, section
3.2). Over ranks that each hold some rows of the vocabulary a chunk takes one gather of two numbers per token and rank.

Shapes: R tokens, C of them in a chunk, D hidden size, v rows of the vocabulary here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.sharding import UnitRange

IGNORED = -100  # a target that does not count, as in PyTorch
# 0.5 GiB in fp32. As few chunks as that allows, since each one adds to the gradient of the whole weight.
LOGITS_AT_ONCE = 2**27


class CrossEntropy:
    """The cross-entropy of logits `hidden weight^T`; the rows `rows` of the weight, (v, D), are here."""

    def __init__(self, rows: UnitRange, communicator: Communicator) -> None:
        self.rows = rows
        self.communicator = communicator
        self.logits_at_once = LOGITS_AT_ONCE
        self.log_sums: Callable[[Tensor], Tensor] = log_sums
        self.probabilities: Callable[[Tensor, Tensor], Tensor] = probabilities

    def compile(self) -> None:
        """One kernel for each operation on all logits, so that these never exist in fp32."""
        self.log_sums, self.probabilities = torch.compile(log_sums), torch.compile(probabilities)

    @property
    def chunk_tokens(self) -> int:
        """The most tokens whose logits exist at once, the same on all ranks."""
        rows_of_a_rank = -(-self.rows.total // self.communicator.model_rank.size)
        return max(1, self.logits_at_once // rows_of_a_rank)

    def total(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """The sum of `by_token`, with a gradient; with a sharded vocabulary, `hidden`'s is this rank's part."""
        if torch.is_grad_enabled():
            function: Any = Total  # PyTorch gives `apply` no types
            return cast(Tensor, function.apply(hidden, weight, targets, self))
        return self.by_token(hidden, weight, targets).sum()

    @torch.no_grad()
    def by_token(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """(R, D) and targets (R,) -> nats (R,), of at least float32, without a gradient; 0 where one is `IGNORED`."""
        return torch.cat([self.losses(F.linear(part, weight), of)[0] for part, of in self.chunks(hidden, targets)])

    def chunks(self, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of equal sizes, as far as possible."""
        number = -(-len(targets) // self.chunk_tokens)
        size = max(1, -(-len(targets) // max(1, number)))
        return zip(hidden.split(size), targets.split(size), strict=True)

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (C, v) here and targets (C,) -> losses (C,) and log sum exp over the whole vocabulary, (C,)."""
        local, here = self.rows.local(targets)
        sums = self.log_sums(logits)
        of_target = logits.gather(1, local[:, None]).squeeze(1).to(sums.dtype) * here
        if not self.rows.is_whole:
            # log sum_V exp = log of the sum over ranks of exp of each one's own; one rank has the target.
            of_ranks = self.communicator.gather(torch.stack([sums, of_target])).unflatten(1, (-1, len(targets)))
            sums, of_target = of_ranks[0].logsumexp(0), of_ranks[1].sum(0)
        return (sums - of_target).masked_fill(targets == IGNORED, 0), sums

    def gradient(self, logits: Tensor, targets: Tensor, losses: Tensor, sums: Tensor) -> Tensor:
        """What `losses` returned -> the gradient of their sum with respect to the logits, (C, v), in their type."""
        local, here = self.rows.local(targets)
        gradient = self.probabilities(logits, sums.masked_fill(targets == IGNORED, torch.inf))
        # At the target it is p - 1 with p = exp(-loss), which the type of the logits could not tell from 0 or 1.
        column = local[:, None]
        at_target = torch.expm1(-losses).to(gradient.dtype)[:, None]
        return gradient.scatter_(1, column, torch.where(here[:, None], at_target, gradient.gather(1, column)))


class Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: CrossEntropy) -> Tensor:
        wide = at_least_fp32(weight.dtype)
        hidden_gradients = []
        weight_gradient = torch.zeros_like(weight, dtype=wide)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for part, of in entropy.chunks(hidden, targets):
            logits = F.linear(part, weight)
            losses, sums = entropy.losses(logits, of)
            gradient = entropy.gradient(logits, of, losses, sums)
            hidden_gradients.append(gradient @ weight)
            weight_gradient += gradient.T @ part
            total += losses.sum()
            del logits, gradient  # before there are those of the next chunk
        ctx.save_for_backward(torch.cat(hidden_gradients), weight_gradient)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * factor, (weight_gradient * factor).to(ctx.weight_dtype), None, None


def log_sums(logits: Tensor) -> Tensor:
    """(C, v) -> log sum exp (C,) of at least float32."""
    wide = at_least_fp32(logits.dtype)
    # PyTorch's log_softmax is one kernel that also widens; its logsumexp is several, and a copy.
    return logits[:, 0].to(wide) - logits.log_softmax(1, dtype=wide)[:, 0]


def probabilities(logits: Tensor, sums: Tensor) -> Tensor:
    """(C, v), (C,) -> exp(logits - sums), in the type of the logits; overwrites these where `sums` has it too."""
    return logits.to(sums.dtype).sub_(sums[:, None]).exp_().to(logits.dtype)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The softmax over V is summed in fp32 even where the model computes in bf16."""
    return torch.promote_types(dtype, torch.float32)
