"""The cross-entropy after a linear head, in chunks of tokens, so that the logits of all tokens never exist at once.

The gradient needs the logits again. They are neither kept nor computed twice: the forward pass computes the gradient of
each chunk together with its loss, and the backward pass only multiplies it (Liger Kernel, arXiv 2410.10989, section
3.2). Over ranks that each hold some rows of the vocabulary a chunk takes one gather of two numbers per token and rank.

The z-loss of a token is (log Z)^2, with Z the sum over the vocabulary of exp(logit). It keeps log Z near 0, where bf16
logits are precise (PaLM, arXiv 2204.02311, section 5; ST-MoE, arXiv 2202.08906, section 3.2). Its gradient is computed
with that of the cross-entropy and takes no further pass over the logits. A divergence from a teacher's predictions
(`kraken_train.model.divergence`) is computed in the same chunks.

Shapes: R tokens, C of them in a chunk, D hidden size, v rows of the vocabulary here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kraken_train.model.divergence import Divergence, SoftTargets
from kraken_train.model.softmax import at_least_fp32, log_sums, probabilities
from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.sharding import UnitRange

IGNORED = -100  # a target that does not count, as in PyTorch
# 0.5 GiB in fp32. As few chunks as that allows, since each one adds to the gradient of the whole weight.
LOGITS_AT_ONCE = 2**27


class Losses(NamedTuple):
    """Of some tokens, scalars of at least float32."""

    objective: Tensor  # what training minimizes, with a gradient: the weighted sum of the others
    cross_entropy: Tensor  # in nats, without a gradient
    z_loss: Tensor  # weighted, without a gradient
    divergence: Tensor  # from a teacher, in nats, without a gradient; 0 where there is none


class CrossEntropy:
    """The cross-entropy of logits `hidden weight^T`; the rows `rows` of the weight, (v, D), are here."""

    def __init__(self, rows: UnitRange, communicator: Communicator) -> None:
        self.rows = rows
        self.communicator = communicator
        self.logits_at_once = LOGITS_AT_ONCE
        self.divergence = Divergence(rows, communicator)
        self.log_sums: Callable[[Tensor], Tensor] = log_sums
        self.probabilities: Callable[[Tensor, Tensor, Tensor | None], Tensor] = probabilities

    def compile(self) -> None:
        """One kernel for each operation on all logits, so that these never exist in fp32."""
        self.log_sums, self.probabilities = torch.compile(log_sums), torch.compile(probabilities)
        self.divergence.compile()

    @property
    def chunk_tokens(self) -> int:
        """The most tokens whose logits exist at once, the same on all ranks."""
        rows_of_a_rank = -(-self.rows.total // self.communicator.model_rank.size)
        return max(1, self.logits_at_once // rows_of_a_rank)

    def total(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, z_weight: float = 0.0, soft: SoftTargets | None = None
    ) -> Losses:
        """The sums over all tokens: `by_token`, and of each target that counts `z_weight` times the z-loss and, with a
        teacher's `soft` targets, (R, E), the divergence.

        With a sharded vocabulary, the gradient of `hidden` is this rank's part.
        """
        if torch.is_grad_enabled() or soft is not None:
            function: Any = Total  # PyTorch gives `apply` no types
            return Losses(*function.apply(hidden, weight, targets, z_weight, soft, self))
        losses, sums = self.by_token_with_sums(hidden, weight, targets)
        cross_entropy, z_loss = losses.sum(), weighted_squares(sums, targets, z_weight)
        return Losses(cross_entropy + z_loss, cross_entropy, z_loss, torch.zeros_like(z_loss))

    def by_token(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """(R, D) and targets (R,) -> nats (R,), of at least float32, without a gradient; 0 where one is `IGNORED`."""
        return self.by_token_with_sums(hidden, weight, targets)[0]

    @torch.no_grad()
    def by_token_with_sums(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`by_token` and log Z, (R,) each."""
        parts = [self.losses(F.linear(part, weight), of) for part, of in self.chunks(hidden, targets)]
        losses, sums = (torch.cat(of_chunks) for of_chunks in zip(*parts, strict=True))
        return losses, sums

    def chunks(self, *of_tokens: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Chunks of tensors of R rows each, of equal sizes, as far as possible."""
        tokens = len(of_tokens[0])
        number = -(-tokens // self.chunk_tokens)
        size = max(1, -(-tokens // max(1, number)))
        return zip(*(tensor.split(size) for tensor in of_tokens), strict=True)

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

    def gradient(
        self, logits: Tensor, targets: Tensor, losses: Tensor, sums: Tensor, z_weight: float, share: float = 1.0
    ) -> Tensor:
        """What `losses` returned -> the gradient of `share` times their sum with respect to the logits, (C, v), in
        their type.

        The z-loss adds 2 z_weight log Z p to share (p - 1) at the target and share p elsewhere.
        """
        local, here = self.rows.local(targets)
        ignored = targets == IGNORED
        of_z = (2 * z_weight * sums).masked_fill(ignored, 0) if z_weight else None
        factors = None
        if of_z is not None:
            factors = share + of_z
        elif share != 1:
            factors = torch.full_like(sums, share)
        gradient = self.probabilities(logits, sums.masked_fill(ignored, torch.inf), factors)
        # At the target it is p - 1 with p = exp(-loss), which the type of the logits could not tell from 0 or 1.
        column = local[:, None]
        at_target = torch.expm1(-losses) * share
        if of_z is not None:
            at_target += of_z * torch.exp(-losses)
        at_target = at_target.to(gradient.dtype)[:, None]
        return gradient.scatter_(1, column, torch.where(here[:, None], at_target, gradient.gather(1, column)))


class Total(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_weight: float,
        soft: SoftTargets | None,
        entropy: CrossEntropy,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = at_least_fp32(weight.dtype)
        share = 1.0 if soft is None else 1 - soft.share
        hidden_gradients = []
        weight_gradient = torch.zeros_like(weight, dtype=wide)
        cross_entropy = torch.zeros((), dtype=wide, device=hidden.device)
        z_loss, divergence = torch.zeros_like(cross_entropy), torch.zeros_like(cross_entropy)
        of_tokens = (hidden, targets) if soft is None else (hidden, targets, soft.hidden)
        for part, of, *teacher_hidden in entropy.chunks(*of_tokens):
            logits = F.linear(part, weight)
            losses, sums = entropy.losses(logits, of)
            kl_gradient = None
            if soft is not None:  # before the gradient, which may overwrite the logits
                kl, kl_gradient = entropy.divergence.of_chunk(logits, teacher_hidden[0], of != IGNORED, soft)
                divergence += kl
            gradient = entropy.gradient(logits, of, losses, sums, z_weight, share)
            if kl_gradient is not None:
                gradient += kl_gradient
            hidden_gradients.append(gradient @ weight)
            weight_gradient += gradient.T @ part
            cross_entropy += losses.sum()
            if z_weight:
                z_loss += weighted_squares(sums, of, z_weight)
            del logits, gradient, kl_gradient  # before there are those of the next chunk
        ctx.save_for_backward(torch.cat(hidden_gradients), weight_gradient)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(cross_entropy, z_loss, divergence)
        objective = cross_entropy + z_loss
        if soft is not None and soft.share:
            objective = share * cross_entropy + z_loss + soft.share * soft.temperature**2 * divergence
        return objective, cross_entropy, z_loss, divergence

    @staticmethod
    def backward(ctx: Any, factor: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * factor, (weight_gradient * factor).to(ctx.weight_dtype), None, None, None, None


def weighted_squares(sums: Tensor, targets: Tensor, z_weight: float) -> Tensor:
    """log Z (C,), targets (C,) -> the weighted z-loss of those that count, a scalar."""
    return z_weight * sums.square().masked_fill(targets == IGNORED, 0).sum()
