"""How far a model's predictions are from a teacher's, in the chunks of tokens in which the cross-entropy is computed.

It is the Kullback-Leibler divergence KL(t || s) = sum_v t (log t - log s), in which t and s are the softmax of the
teacher's and of the student's logits divided by a temperature T (Hinton et al., arXiv 1503.02531, section 2). The
gradient of T^2 KL with respect to the student's logits is T (s - t). It is as large as that of a cross-entropy at any
temperature, is computed together with the divergence, and takes no gradient of the teacher.

Over ranks that each hold some rows of the vocabulary a chunk takes one gather of three numbers per token and rank.

Shapes: R tokens, C of them in a chunk, E hidden size of the teacher, v rows of the vocabulary here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kraken_train.model.softmax import at_least_fp32, log_sums
from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.sharding import UnitRange


class SoftTargets(NamedTuple):
    """What a teacher predicts after some tokens, and how much that counts. Its logits are made chunk by chunk."""

    hidden: Tensor  # what its head sees, (B, T, E), or (R, E) where the tokens are in one row
    head: Tensor  # (v, E): the rows of its head that the student's head has here
    share: float  # of T^2 KL in the loss; that of the cross-entropy is 1 - share
    temperature: float  # T


class Divergence:
    """The divergence of logits (C, v), of which the rows `rows` of the vocabulary are here."""

    def __init__(self, rows: UnitRange, communicator: Communicator) -> None:
        self.rows = rows
        self.communicator = communicator
        self.moments: Callable[[Tensor, Tensor, float], Tensor] = moments
        self.differences: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor] = differences

    def compile(self) -> None:
        """One kernel for each operation on all logits."""
        self.moments, self.differences = torch.compile(moments), torch.compile(differences)

    def of_chunk(
        self, logits: Tensor, teacher_hidden: Tensor, counted: Tensor, soft: SoftTargets
    ) -> tuple[Tensor, Tensor | None]:
        """Of a chunk: the student's logits (C, v), what the teacher's head sees (C, E), which tokens count (C,).

        Returns KL, summed over the tokens that count, a scalar of at least float32; and the gradient of share T^2 KL
        with respect to the logits, (C, v) in their type, or None for a share of 0.
        """
        temperature = soft.temperature
        teacher_logits = F.linear(teacher_hidden, soft.head)
        sums, teacher_sums, distance = self.moments(logits, teacher_logits, temperature)
        if not self.rows.is_whole:
            here = torch.stack([sums, teacher_sums, distance])
            of_ranks = self.communicator.gather(here).unflatten(1, (-1, len(logits)))
            sums, teacher_sums = of_ranks[:2].logsumexp(1)
            distance = ((of_ranks[1] - teacher_sums).exp() * of_ranks[2]).sum(0)
        total = (distance - teacher_sums + sums).masked_fill(~counted, 0).sum()
        if not soft.share:
            return total, None
        factors = counted.to(sums.dtype) * (soft.share * temperature)
        return total, self.differences(logits, teacher_logits, sums, teacher_sums, factors, temperature)


def moments(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """(C, v) of student and teacher -> (3, C) of at least float32, each over the rows here and of logits over T.

    They are log sum exp of the student's, that of the teacher's, and the teacher's mean of (its logit - the student's).
    """
    wide = at_least_fp32(logits.dtype)
    student, teacher = logits.to(wide) / temperature, teacher_logits.to(wide) / temperature
    sums, teacher_sums = log_sums(student), log_sums(teacher)
    gaps = torch.sub(teacher, student)
    distance = gaps.mul_(teacher.sub_(teacher_sums[:, None]).exp_()).sum(1)
    return torch.stack([sums, teacher_sums, distance])


def differences(
    logits: Tensor, teacher_logits: Tensor, sums: Tensor, teacher_sums: Tensor, factors: Tensor, temperature: float
) -> Tensor:
    """(C, v), (C, v), (C,), (C,), (C,) -> factors (s - t), in the type of the logits."""
    student = (logits.to(sums.dtype) / temperature).sub_(sums[:, None]).exp_()
    teacher = (teacher_logits.to(sums.dtype) / temperature).sub_(teacher_sums[:, None]).exp_()
    return student.sub_(teacher).mul_(factors[:, None]).to(logits.dtype)
