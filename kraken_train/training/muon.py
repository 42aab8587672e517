"""Muon for the matrices of the layers, AdamW for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest
matrix with orthogonal rows or columns, approximately. Updates are scaled by 0.2 sqrt(max(rows, columns)), which gives
them the root mean square of AdamW's, so that both take the same learning rate and weight decay (arXiv 2502.16982,
section 2.2). The result is that of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` on each matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kraken_train.parallel.matrix_exchange import MatrixExchange

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, by Jordan et al.
SMALLEST_NORM = 1e-7
UPDATE_RMS = 0.2  # of AdamW's updates, arXiv 2502.16982
BATCH_ELEMENTS = 1 << 24  # of matrices that are orthogonalised in one call, so that working memory stays small
MATRICES = "matrices"  # key of parameter groups that Muon updates


class Muon(torch.optim.AdamW):
    """Updates groups with a key `matrices` by Muon and the others as AdamW, whose arguments it takes.

    A Muon group has one parameter: the part that this rank updates of all its weights, laid out as one vector. The
    value of `matrices` is a function: the number of elements of that part -> the MatrixExchange. The state is
    `momentum_buffer`.

    As a fused AdamW it reads, where they are set, `found_inf` (not 0: change nothing) and `grad_scale` (divisor of the
    gradients) on the device. It overwrites the gradients.
    """

    def __init__(self, params: Any, momentum: float, ns_steps: int, **adamw: Any) -> None:
        super().__init__(params, **adamw)
        self.momentum = momentum
        self.ns_steps = ns_steps

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if MATRICES not in group]
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if MATRICES in group:
                self.update_matrices(group)

    def update_matrices(self, group: dict[str, Any]) -> None:
        (weights,) = group["params"]
        exchange: MatrixExchange = group[MATRICES](weights.numel())
        gradients, state = weights.grad, self.state[weights]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weights)
        momentum = state["momentum_buffer"]

        # A step that is to be skipped goes through all this with zeros and changes nothing. Numbers are not chosen by
        # `torch.where`, which would copy them to the device and wait for it.
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        skip = torch.zeros((), device=weights.device) if found_inf is None else found_inf.ne(0).float()
        if grad_scale is not None:
            gradients.div_(grad_scale)
        gradients.masked_fill_(skip.bool(), 0.0)

        momentum.lerp_(gradients, (1 - skip) * (1 - self.momentum))
        update = gradients.lerp_(momentum, self.momentum).bfloat16()  # Nesterov's
        matrices = orthogonalize_all(exchange.gather(update.masked_fill_(skip.bool(), 0.0)), self.ns_steps)
        del update
        weights.mul_(skip + (1 - skip) * (1 - group["lr"] * group["weight_decay"]))
        for piece, change in zip(exchange.pieces, exchange.scatter(matrices), strict=True):
            shape = exchange.parts[piece.matrix].whole_shape(exchange.place.ranks)
            rate = group["lr"] * UPDATE_RMS * math.sqrt(max(shape))
            weights[piece.begin : piece.begin + piece.length].sub_(change, alpha=rate)


def orthogonalize_all(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    """`orthogonalize` of matrices of different shapes, those of one shape together."""
    results: dict[int, Tensor] = {}
    for batch in batches(matrices):
        stacked = torch.stack([matrices[number] for number in batch])
        results.update(zip(batch, orthogonalize(stacked, steps), strict=True))
    return [results[number] for number in range(len(matrices))]


def batches(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """The numbers of matrices of one shape, at most BATCH_ELEMENTS elements of them or else one matrix."""
    by_shape: dict[torch.Size, list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(number)
    for shape, numbers in by_shape.items():
        size = max(1, BATCH_ELEMENTS // shape.numel())
        for first in range(0, len(numbers), size):
            yield numbers[first : first + size]


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """(n, rows, columns) -> the same in bfloat16, with singular values between about 0.7 and 1.2.

    Newton-Schulz iteration in bfloat16. PyTorch has it too, in `torch.optim.Muon`, but for one matrix at a time, and
    those of a Kraken are many and small.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
